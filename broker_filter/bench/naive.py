"""The baseline: an alert broker as it is usually written, which processes one alert at a time with common libraries.

fastavro reads and writes the containers, astropy reads the stamps, and torch scores with batch size 1. The comparison
must be fair: this code must never be slower than what a newcomer would write.
"""

from __future__ import annotations

import gzip
import warnings
from io import BytesIO
from typing import Any, cast

import fastavro
import numpy as np
import torch
from astropy.io import fits
from astropy.io.fits.verify import VerifyWarning
from numpy.typing import NDArray
from safetensors.torch import load_file

from broker_filter.packets.batch import CUTOUTS
from broker_filter.scoring.bundle import WEIGHTS, BundleError, Part
from broker_filter.scoring.networks import ServedNetwork, load_network

Alert = dict[str, Any]
Schema = dict[str, Any]

SCORES_FIELD = {"name": "scores", "type": {"type": "map", "values": "float"}}


class NaiveBroker:
    """Turns one ZTF packet at a time into an output record."""

    def __init__(self, bundle: Part) -> None:
        """`bundle`: a network for ZTF whose only inputs are images, divided by their norm.

        Raises BundleError for a network with the normalisation `snr`.
        """
        if bundle.card.inputs.planes:
            raise BundleError(
                f"{bundle.directory}: needs {', '.join(bundle.card.inputs.planes)} planes, which the usual way of the "
                "benchmark does not read; name another model first"
            )
        warnings.simplefilter("ignore", VerifyWarning)  # some published stamps violate the FITS standard
        torch.set_num_threads(1)  # one alert is too little work for several threads
        self._card = bundle.card
        network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
        self._network = ServedNetwork(network, bundle.card.outputs).eval()

    def process(self, packet: bytes) -> bytes:
        """Return the output record of a packet: a container with the alert and its scores."""
        schema, alert = self.decode(packet)
        return self.encode(schema, alert, self.score(self.cutouts(alert)))

    def decode(self, packet: bytes) -> tuple[Schema, Alert]:
        """Return the container's schema and its alert."""
        reader = fastavro.reader(BytesIO(packet))
        return cast(Schema, reader.writer_schema), cast(Alert, next(reader))

    def cutouts(self, alert: Alert) -> list[NDArray[np.float32]]:
        """Return the science, template and difference images, float32[height, width] each."""
        images = []
        for name in CUTOUTS:
            stamp = gzip.decompress(alert[f"cutout{name.capitalize()}"]["stampData"])
            with fits.open(BytesIO(stamp)) as hdus:
                images.append(hdus[0].data.astype(np.float32))
        return images

    def score(self, cutouts: list[NDArray[np.float32]]) -> dict[str, float]:
        """Return the network's probabilities by label."""
        return self.infer(self.normalise(cutouts))

    def normalise(self, cutouts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the network's input, float32[1, C, size, size]."""
        wanted = self._card.inputs.images
        images = np.full((1, len(wanted.order), wanted.size, wanted.size), wanted.padding, np.float32)
        axis = 1 if wanted.normalisation == "l2_row" else None
        for channel, name in enumerate(wanted.order):
            cutout = np.nan_to_num(cutouts[CUTOUTS.index(name)])
            with np.errstate(over="ignore"):  # some pixels are 3.4e38, whose square is infinite
                norm = np.linalg.norm(cutout, axis=axis, keepdims=True)
            height, width = cutout.shape
            images[0, channel, :height, :width] = cutout / np.where(norm == 0, 1, norm)
        return images

    def infer(self, images: NDArray[np.float32]) -> dict[str, float]:
        """Return the network's probabilities by label, for normalised images."""
        with torch.inference_mode():
            probabilities, *_ = self._network(torch.from_numpy(images))
        return dict(zip(self._card.outputs.labels, probabilities[0].tolist(), strict=True))

    def encode(self, schema: Schema, alert: Alert, scores: dict[str, float]) -> bytes:
        """Return an Avro container with the alert and its scores."""
        out = BytesIO()
        fastavro.writer(out, {**schema, "fields": [*schema["fields"], SCORES_FIELD]}, [{**alert, "scores": scores}])
        return out.getvalue()
