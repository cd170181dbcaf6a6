"""Alerts and labels into data sets, and data sets read: what everything else in training learns from."""
