"""Data sets of labelled alerts: building and reading."""
