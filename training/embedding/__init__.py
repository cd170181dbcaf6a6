"""What makes the bundle `embedder`, which ships, and what embeddings are worth: probes, strangeness, suspects."""
