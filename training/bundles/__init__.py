"""What makes the bundles `default` and `classes`, which ship."""
