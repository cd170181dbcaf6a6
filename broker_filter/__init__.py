"""Score the alert packets of sky surveys: from Kafka to Kafka exactly once, or from archived nights.

The names in `__all__` are the public interface of the library. A minor release may add to them. A name, an argument or
a result that is to change keeps working for at least two minor releases and gives a DeprecationWarning that names its
replacement; CHANGELOG.md lists the change. Everything else in the package is internal, and may change in any release.

Importing the package is cheap: each name imports its module when it is first used.

Score an archive into a table:

>>> from broker_filter import Packet, Scorer, score_archive
>>> table = score_archive("night.tar", ["default"]).read_all()
>>> table.num_rows, table.schema.field("default__real").type
(5, DataType(float))

Score packets that the caller has in memory:

>>> scorer = Scorer.open(["default"])
>>> decoder = scorer.decoder()
>>> with open("alert.avro", "rb") as file:
...     alerts, rejects = decoder.decode([Packet(file.read())])
>>> scorer.score(alerts).columns()["default.real"].shape
(1,)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker_filter.errors import BrokerFilterError
    from broker_filter.packets.batch import AlertBatch
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.packet import Packet
    from broker_filter.packets.rejects import Reject
    from broker_filter.scoring.bundle import open_bundle
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.scoring.scores import Scores
    from broker_filter.streaming.archives import read_packets
    from broker_filter.tables.archive_scores import score_archive
    from broker_filter.tables.arrow_scorer import ArrowScorer

    __version__: str

__all__ = [
    "AlertBatch",
    "ArrowScorer",
    "BrokerFilterError",
    "Decoder",
    "Packet",
    "Reject",
    "Scorer",
    "Scores",
    "open_bundle",
    "read_packets",
    "score_archive",
]

_MODULES = {
    "AlertBatch": "packets.batch",
    "ArrowScorer": "tables.arrow_scorer",
    "BrokerFilterError": "errors",
    "Decoder": "packets.decode",
    "Packet": "packets.packet",
    "Reject": "packets.rejects",
    "Scorer": "scoring.scorer",
    "Scores": "scoring.scores",
    "open_bundle": "scoring.bundle",
    "read_packets": "streaming.archives",
    "score_archive": "tables.archive_scores",
}
"""The module that defines each public name."""

# onnxruntime reads this variable while it is imported. Without it, the Linux wheel of 1.32 writes a device id below
# ~/.cache and looks up a telemetry host. Python runs this file before any other module of the package, so no module can
# import onnxruntime before it is set; child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562). Raises AttributeError for any other name."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("broker-filter")
    elif name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
