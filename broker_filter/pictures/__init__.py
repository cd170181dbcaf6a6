"""Draws pictures of alerts. It needs matplotlib (the extra `explore`), which the service itself does not need."""
