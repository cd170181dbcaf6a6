"""Training of the shipped bundles `default` and `classes`."""
