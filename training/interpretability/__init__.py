"""What networks see in alerts: sparse autoencoders (SAEs) on the outputs of their attention layers.

Source: Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", arXiv:2406.17759.
"""
