"""A run: the directory with the activations of an attention layer, and the sparse autoencoders trained on them."""
