"""Pictures of alerts. Needs matplotlib, which the service does without: the extra `explore` brings it."""
