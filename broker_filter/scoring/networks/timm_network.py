"""Any timm vision backbone with BTSbot's head and its optional metadata branch.

timm: https://github.com/huggingface/pytorch-image-models (Apache-2.0; some of its published weights have other
licences). timm is imported only when such a network is built: serving through onnxruntime needs neither timm nor torch.
This module never downloads anything: a backbone is built from its name, and its weights come from the bundle.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from broker_filter.scoring.networks.fusion import CUTOUTS, Encoder, FusionNetwork

LARGEST_SHAPE = {"patch_size": 128, "embed_dim": 2048, "depth": 64, "num_heads": 64}
"""Largest values of a vision transformer's shape. A card comes from outside, and must not make the process build a
network without end."""


class TimmEncoder(Encoder):
    """A backbone without its classifier: images [N, 3 + psf, S, S] -> pooled, normalised features [N, features].

    `image_size`: size in pixels to which images are interpolated (bilinear). If absent, it is the size of a backbone
    with fixed input size (`maxvit_tiny_rw_224`: 224); other backbones take images at their own size. A backbone with
    fixed input size is built for `image_size`. `last_norm`: `removed` drops the last normalisation of a ConvNeXt, as
    BTSbot does if it joins metadata (`mm_ConvNeXt`). `padding`: `same` pads convolutions as TensorFlow does, for
    weights that were trained there. `psf`: number of PSF images. `shape`: arguments of a vision transformer that differ
    from the backbone's (see LARGEST_SHAPE).
    """

    def __init__(
        self,
        backbone: str,
        image_size: int | None = None,
        last_norm: Literal["kept", "removed"] = "kept",
        padding: Literal["symmetric", "same"] = "symmetric",
        psf: int = 0,
        **shape: int | None,
    ) -> None:
        import timm

        super().__init__()
        if not 0 <= psf <= CUTOUTS:
            raise ValueError(f"psf must be between 0 and {CUTOUTS}, one PSF image for each cutout, not {psf}")
        if not timm.is_model(backbone):  # refuses paths and hub names, which `create_model` would open
            raise ValueError(f"timm {timm.__version__} has no backbone named {backbone!r}")
        changed: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
        for name, value in changed.items():
            if not 1 <= value <= LARGEST_SHAPE[name]:
                raise ValueError(f"{name} must be between 1 and {LARGEST_SHAPE[name]}, not {value}")
        if padding == "same":
            changed["pad_type"] = "same"
        published = timm.get_pretrained_cfg(backbone)
        if published is not None and published.fixed_input_size:
            if image_size is None:
                image_size = published.input_size[-1]
            elif image_size != published.input_size[-1]:
                changed["img_size"] = image_size
        encoder: Any = timm.create_model(backbone, num_classes=0, in_chans=CUTOUTS + psf, **changed)
        if last_norm == "removed":
            encoder.head.norm = nn.Identity()
        self.backbone = encoder
        self.psf = psf
        self.image_size = image_size
        self.features: int = encoder.head_hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled, normalised features [N, features] of images [N, 3 + psf, S, S]."""
        return self.backbone(self.resize(images))  # type: ignore[no-any-return]

    def resize(self, images: Tensor) -> Tensor:
        """Return the images [N, 3 + psf, S, S] at the size that the backbone takes."""
        if self.image_size is not None and images.shape[-1] != self.image_size:
            images = interpolate(images, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return images


def timm_network(
    backbone: str,
    image_size: int | None = None,
    last_norm: Literal["kept", "removed"] = "kept",
    padding: Literal["symmetric", "same"] = "symmetric",
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    psf: int = 0,
    **heads: Any,
) -> FusionNetwork:
    """Return a FusionNetwork with a TimmEncoder. `heads`: arguments of FusionNetwork.

    `patch_size`, `embed_dim`, `depth`, `num_heads`: shape of a vision transformer, if it differs from the backbone's.
    `psf`: number of PSF images that the network takes.
    """
    shape = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return FusionNetwork(TimmEncoder(backbone, image_size, last_norm, padding, psf, **shape), **heads)
