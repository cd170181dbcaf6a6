"""Any timm vision backbone with BTSbot's head and its optional metadata branch.

timm: https://github.com/huggingface/pytorch-image-models (Apache-2.0; some of its published weights have other
licences). timm is imported only when such a network is built: serving through onnxruntime needs neither timm nor torch.
This module never downloads anything: a backbone is built from its name, and its weights come from the bundle.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from broker_filter.scoring.networks.fusion import Encoder, FusionNetwork


class TimmEncoder(Encoder):
    """A backbone without its classifier: images [N, 3, S, S] -> pooled, normalised features [N, features].

    `image_size`: size in pixels to which images are interpolated (bilinear). If absent, it is the size of a backbone
    with fixed input size (`maxvit_tiny_rw_224`: 224); other backbones take images at their own size. `last_norm`:
    `removed` drops the last normalisation of a ConvNeXt, as BTSbot does if it joins metadata (`mm_ConvNeXt`).
    """

    def __init__(
        self, backbone: str, image_size: int | None = None, last_norm: Literal["kept", "removed"] = "kept"
    ) -> None:
        import timm

        super().__init__()
        if not timm.is_model(backbone):  # refuses paths and hub names, which `create_model` would open
            raise ValueError(f"timm {timm.__version__} has no backbone named {backbone!r}")
        published = timm.get_pretrained_cfg(backbone)
        if image_size is None and published is not None and published.fixed_input_size:
            image_size = published.input_size[-1]
        encoder: Any = timm.create_model(backbone, num_classes=0)
        if last_norm == "removed":
            encoder.head.norm = nn.Identity()
        self.backbone = encoder
        self.image_size = image_size
        self.features: int = encoder.head_hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled, normalised features [N, features] of images [N, 3, S, S]."""
        if self.image_size is not None and images.shape[-1] != self.image_size:
            images = interpolate(images, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return self.backbone(images)  # type: ignore[no-any-return]


def timm_network(
    backbone: str, image_size: int | None = None, last_norm: Literal["kept", "removed"] = "kept", **heads: Any
) -> FusionNetwork:
    """Return a FusionNetwork with a TimmEncoder. `heads`: arguments of FusionNetwork."""
    return FusionNetwork(TimmEncoder(backbone, image_size, last_norm), **heads)
