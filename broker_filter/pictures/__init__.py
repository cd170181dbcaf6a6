"""Draws pictures of alerts.

All but the page of explanations need matplotlib (the extra `explore`), which the service itself does not need.
"""
