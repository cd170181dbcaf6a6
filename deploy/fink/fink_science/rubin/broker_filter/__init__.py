"""Real-bogus scores of broker-filter for alerts of Rubin."""
