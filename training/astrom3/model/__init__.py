"""AstroM3, the multimodal model of variable stars; its published checkpoints load by name and shape.

Rizhko & Bloom 2024, "AstroM3: A self-supervised multimodal model for astronomy", AJ (arXiv:2411.08842); code
https://github.com/MeriDK/AstroM3; weights `AstroMLCore/AstroM3-CLIP*` on Hugging Face (CC BY 4.0). Photometry, spectrum
and catalogue metadata of a star become three embeddings in a common space.

`preprocess.py` converts raw observations into inputs; `informer.py`, `galspecnet.py` and `metadata.py` encode one
modality each; `network.py` joins them; `checkpoint.py` reads published weights. Nothing is downloaded, and random
numbers are drawn only on request: a star's embedding is deterministic.
"""
