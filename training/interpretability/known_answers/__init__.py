"""Measurements where the truth is known: a planted dictionary, and a transformer with a known mechanism."""
