"""Importers: published weights -> model bundles. `write_bundle` writes a bundle, also for training."""
