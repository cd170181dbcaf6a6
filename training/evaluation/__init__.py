"""Evaluation of models: metrics with intervals, calibration, policies, speed, and reports."""
