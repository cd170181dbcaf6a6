"""Attention layers of networks, opened: what they computed, and the outputs with another result in its place."""
