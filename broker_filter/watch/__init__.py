"""A page on loopback that shows scored alerts to a person and records labels. It needs the extra `watch`."""
