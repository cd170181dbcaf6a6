"""AMPEL (https://ampelproject.github.io): scores for its alerts, and filters over these scores.

AMPEL drops the cutouts when it shapes an alert, so an alert supplier must score the packets before that. AMPEL's
filters then read the scores in `extra` of the alert. This module is the part of both units that needs no AMPEL. The
units themselves are a distribution of their own (`deploy/ampel`), because AMPEL looks for units only in distributions
whose names begin with `ampel-`.

A packet that cannot be scored must never stop the stream, and must never get a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import Device
from broker_filter.errors import BrokerFilterError
from broker_filter.packets.packet import Packet
from broker_filter.scoring.scorer import Scorer
from broker_filter.scoring.scores import output_name
from broker_filter.streaming.expressions import FIELDS, IDENTITY_FIELDS, TEXTS, compile_filter, field

EXTRA = "broker_filter"
"""Key of the scores in `extra` of an AMPEL alert."""
Entry = dict[str, Any]
"""What `extra` gets for one alert; BSON can hold all of it.

`scores`: the probabilities by model and label, None for alerts of another survey. `versions`: the version of each
model. `fields`: the requested fields, None where a value is missing. `reject`: `reason` and `detail` for a packet that
cannot be scored, which has no scores and no fields; else the key is absent.
"""


class NoScoresError(BrokerFilterError):
    """An alert lacks the scores or fields that a filter reads."""


class PacketScorer:
    """Scores packets for AMPEL's alert supplier."""

    def __init__(
        self, models: Sequence[str] = ("default",), fields: Sequence[str] = (), device: Device = "auto"
    ) -> None:
        """Load the models.

        `models`, `device`: as for `Scorer.open`. `fields`: identity fields and metadata columns that filters read.

        Raises as `Scorer.open` does, and ValueError for an unknown field.
        """
        self._scorer = Scorer.open(models, device=device)
        self._fields = tuple(fields)
        self._decoder = self._scorer.decoder(columns=[name for name in fields if name not in IDENTITY_FIELDS])
        self._versions = {model.name: model.version for model in self._scorer.models}

    def score(self, packets: Sequence[bytes]) -> list[Entry]:
        """Return one entry for each packet, in order. Only the first alert of a packet counts, as in AMPEL."""
        if not packets:
            return []
        alerts, rejects = self._decoder.decode([Packet(data) for data in packets])
        entries: list[Entry] = [{} for _ in packets]
        for reject in reversed(rejects):  # the first reject of a packet remains
            entries[reject.packet_index] = {
                "scores": {},
                "versions": self._versions,
                "reject": {"reason": str(reject.reason), "detail": reject.detail},
            }
        first = np.flatnonzero(alerts.record_index == 0)
        outputs = {name: _plain(values[first]) for name, values in self._scorer.score(alerts).columns().items()}
        fields = {name: _plain(field(alerts, name)[first]) for name in self._fields}
        for i, packet in enumerate(alerts.packet_index[first].tolist()):
            entries[packet] = {
                "scores": {
                    model.name: {label: outputs[output_name(model.name, label)][i] for label in model.labels}
                    for model in self._scorer.models
                },
                "versions": self._versions,
                "fields": {name: values[i] for name, values in fields.items()},
            }
        return entries


class ScoreFilter:
    """A filter over the entries of a PacketScorer, in the language of `broker_filter.streaming.expressions`."""

    def __init__(self, text: str) -> None:
        """Compile the filter. Raises ExpressionError if the text is not a valid filter."""
        self._expression = compile_filter(text, FIELDS, outputs=None)

    @property
    def fields(self) -> list[str]:
        """The identity fields and metadata columns that the filter reads, sorted."""
        return sorted(name for name in self._expression.names if "." not in name)

    def passes(self, extra: Mapping[str, Any] | None) -> bool:
        """Return whether the filter is true for the alert with this `extra`; False for a packet that was rejected.

        Raises NoScoresError if the alert did not come from the supplier that scores, or if the supplier does not
        provide a model, a label or a field that the filter reads.
        """
        entry = (extra or {}).get(EXTRA)
        if not isinstance(entry, Mapping) or "scores" not in entry:
            raise NoScoresError(
                f"the alert has no scores in extra[{EXTRA!r}]: take the alerts from ScoringAlertSupplier of "
                "ampel-broker-filter"
            )
        if "reject" in entry:
            return False
        values = {name: _column(entry, name) for name in self._expression.names}
        return bool(self._expression.holds_for(values, 1)[0])


def _plain(values: NDArray[Any]) -> list[Any]:
    """Return values [N] as Python values, with None for NaN."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values.tolist()]


def _column(entry: Mapping[str, Any], name: str) -> NDArray[Any]:
    """Return a score or field of an entry as an array [1], NaN for a missing number. Raises NoScoresError."""
    model, _, label = name.partition(".")
    try:
        value = entry["scores"][model][label] if label else entry["fields"][name]
    except KeyError as error:
        what, where = ("model or label", "models") if label else ("field", "fields")
        raise NoScoresError(
            f"the filter reads {name}, and the alert has no such {what}: add it to `{where}` of ScoringAlertSupplier"
        ) from error
    if name in TEXTS:
        return np.array([value], dtype=object)
    return np.array([np.nan if value is None else value])
