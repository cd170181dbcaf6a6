"""Simulated alerts, labelled by truth, to pre-train an encoder on. No person and no network has labelled them."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import numpy as np

from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import BOGUS, REAL, SCHEMAS, simulate_night
from training.vision.galaxies import AnsweredImages, equal

KINDS = (*REAL, *BOGUS)
QUESTIONS = ("alert_real", *(f"alert_{kind}" for kind in KINDS))
"""Whether the alert shows a change in the sky, and whether it is of a kind, each 0 or 1."""
RATES = dict.fromkeys(KINDS, 1.0)
"""All kinds are equally frequent, so that the rare kinds of a real night are learnt as well."""
PACKETS_AT_ONCE = 256


def simulate_alerts(n: int, seed: int, survey: Literal["ztf", "lsst"], size: int = 63) -> AnsweredImages:
    """Simulate `n` alerts of a survey, with the cutouts that the decoder delivers for slots of `size` pixels."""
    decoder = Decoder(open_registry(SCHEMAS), cutout_size=size, columns=())
    images, boxes, answers = [], [], []
    night = simulate_night(n, seed, survey, RATES)
    while some := list(islice(night, PACKETS_AT_ONCE)):
        kinds = {alert.alert_id: alert.kind for alert in some}
        batch, _ = decoder.decode([Packet(alert.packet, FilePosition("")) for alert in some])
        images.append(batch.cutouts)
        boxes.append(batch.cutout_box)
        of_batch = [kinds[alert_id] for alert_id in batch.alert_id.tolist()]
        answers += [[float(kind in REAL), *(float(kind == other) for other in KINDS)] for kind in of_batch]
    return AnsweredImages(
        np.concatenate(images),
        np.concatenate(boxes),
        np.array(answers, np.float32),
        QUESTIONS,
        f"{len(answers)} simulated alerts of {survey.upper()}, labelled by truth",
        equal(len(answers)),
    )
