"""Training AstroM3 in its published modes, and the study of what its contrastive pre-training is worth.

Rizhko & Bloom 2025 (arXiv:2411.08842); the networks and their preprocessing are `training.astrom3.model`.
"""
