"""VGG6: the convolutional network of braai, ZTF's real/bogus classifier.

Duev et al. 2019, "Real-bogus classification for the Zwicky Transient Facility using deep learning", MNRAS 489, 3582
(arXiv:1907.11259), figure 4; code and weights https://github.com/dmitryduev/braai (MIT). Images of 63 px.
"""

from __future__ import annotations

from torch import Tensor, nn

from broker_filter.scoring.networks.initialisation import initialise_as_keras


class VGG6(nn.Module):
    """Images [N, 3, 63, 63] -> logits [N, labels] and the embedding [N, 256], the input of the last layer."""

    def __init__(self, labels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, 256),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, labels))
        initialise_as_keras(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, labels] and the embedding [N, 256] of images [N, 3, 63, 63]."""
        embedding = self.features(images)
        return self.head(embedding), embedding
