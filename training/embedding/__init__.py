"""Training of the shipped bundle `embedder`, and the evaluation of embeddings."""
