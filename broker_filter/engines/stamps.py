"""Real-bogus scores from cutouts alone, for functions over columns that see nothing else of an alert.

It imports no engine. Scores from whole alerts are the task of `broker_filter.ArrowScorer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from broker_filter import config
from broker_filter.packets.batch import CUTOUTS, Survey
from broker_filter.packets.stamps import decode_stamps
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import PROBABILITIES
from broker_filter.scoring.scorer import LoadedPart, open_model
from broker_filter.streaming.filtering import BATCH_SIZE

BUNDLE, LABEL = "default", "real"
"""The shipped bundle and its output. Its network for ZTF reads the cutouts and nothing else."""
GZIP = b"\x1f\x8b"
"""The first bytes of a stamp of ZTF, which is compressed with gzip. LSST's stamps are plain FITS files."""

Stamps = Sequence[bytes | None]


def real_bogus(science: Stamps, template: Stamps, difference: Stamps) -> NDArray[np.float32]:
    """Return the probability that each of N alerts of ZTF is real, float32[N], from its three stamps.

    A stamp is a FITS image compressed with gzip, as in `cutoutScience.stampData`. The score is the one of the bundle
    `default` for the whole alert. It is NaN where a stamp is missing or unusable, and where a stamp is not compressed,
    as LSST's are: the network for LSST also reads fluxes of the alert, which no cutout has.

    Raises TypeError if a stamp is neither bytes nor None.
    """
    scores = np.full(len(science), np.nan, np.float32)
    for start in range(0, len(scores), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        scores[part] = _score(list(zip(science[part], template[part], difference[part], strict=True)))
    return scores


def _score(triplets: list[tuple[bytes | None, ...]]) -> NDArray[np.float32]:
    n, size = len(triplets), network().inputs.images.size
    spans = np.full((n, len(CUTOUTS), 2), -1, np.int64)  # -1: there is no stamp
    for i, triplet in enumerate(triplets):
        begin = 0
        for c, stamp in enumerate(triplet):
            if not isinstance(stamp, bytes | None):
                raise TypeError(
                    f"a stamp is of type {type(stamp).__name__}, not bytes: give the three columns of stamps, such as "
                    "cutoutScience.stampData"
                )
            if stamp is not None and stamp.startswith(GZIP):
                spans[i, c] = begin, begin + len(stamp)
            begin += len(stamp or b"")
    bodies = [memoryview(b"".join(stamp or b"" for stamp in triplet)) for triplet in triplets]
    cutouts, boxes = np.zeros((n, len(CUTOUTS), size, size), np.float32), np.zeros((n, len(CUTOUTS), 4), np.int16)
    failed = decode_stamps(bodies, spans, np.zeros(n, np.bool_), cutouts, boxes)
    sound = np.ones(n, np.bool_)
    sound[list(failed)] = False
    scores = np.full(n, np.nan, np.float32)
    alerts = RawAlerts(cutouts[sound], boxes[sound], metadata=np.empty((sound.sum(), 0)), columns=())
    scores[sound] = network().run(alerts)[PROBABILITIES][:, network().bundle.card.outputs.labels.index(LABEL)]
    return scores


@cache
def network() -> LoadedPart:
    """Return the network for ZTF, opened once in a process, on one thread."""
    return open_model(BUNDLE, config.Runtime(device="cpu", inference_threads=1)).part(Survey.ZTF)
