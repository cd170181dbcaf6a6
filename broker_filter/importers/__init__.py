"""Trained networks into model bundles: published weights are read, and `write_bundle` writes the bundle."""
