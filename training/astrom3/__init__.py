"""Training of AstroM3 in its published modes, and a study of the benefit of its contrastive pre-training.

Rizhko & Bloom 2024 (arXiv:2411.08842); networks and preprocessing are in `training.astrom3.model`.
"""
