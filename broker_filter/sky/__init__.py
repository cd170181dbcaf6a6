"""Regions of the sky and lists of targets, read from files: what `in_moc` and `near` in filters look up."""
