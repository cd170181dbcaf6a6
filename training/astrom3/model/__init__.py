"""AstroM3, the multimodal model of variable stars, such that its published checkpoints load by name and shape.

Rizhko & Bloom 2025, "AstroM3: A self-supervised multimodal model for astronomy", AJ (arXiv:2411.08842); code
https://github.com/MeriDK/AstroM3; weights `AstroMLCore/AstroM3-CLIP*` on Hugging Face (CC BY 4.0). Photometry, a
spectrum and catalogue metadata of one star become three embeddings in one space.

`preprocess.py` makes the inputs of raw observations, `informer.py`, `galspecnet.py` and `metadata.py` encode one
modality each, `model.py` joins them, `checkpoint.py` reads published weights. Nothing here downloads anything, and
nothing draws random numbers unasked: a star's embedding is always the same.
"""
