"""Scores archives, for the commands that work on the embeddings of many alerts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.options import STDIN
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.packets.packet import Packet
    from broker_filter.scoring.reference import Reference
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.anomalies import AnomalyJudge
    from broker_filter.streaming.scored import ScoredBatch


BATCH_SIZE = 128
"""Packets in a batch: enough that the fixed cost of a batch is small, few enough that a small archive keeps all threads
busy."""
DUPLICATE_WINDOW = 2_000_000
"""Alert ids that are remembered to find duplicates: more than one night has."""


class OverwriteError(UsageError):
    """The output file is also an input."""


def keep_inputs(out: Path, inputs: Sequence[str | Path]) -> None:
    """Raises OverwriteError if the file `out` is one of the inputs: writing it would destroy the input's alerts."""
    for given in inputs:
        if str(given) != STDIN and Path(given).resolve() == out.resolve():
            raise OverwriteError(f"{given} is an input and would be overwritten: choose another --out")


def share_read(packets: Iterator[Packet]) -> float | None:
    """The fraction of the inputs' bytes that was read so far, from 0 to 1; None if their total size is unknown."""
    from broker_filter.streaming.archives import Packets

    return packets.share_read() if isinstance(packets, Packets) else None


def score_archives(
    inputs: Sequence[str | Path],
    scorer: Scorer,
    *,
    columns: Sequence[str] = (),
    registry: str | None = None,
    judge: AnomalyJudge | None = None,
) -> Iterator[ScoredBatch]:
    """Scores the alerts of files, folders and archives, and shows a progress bar.

    `columns`: metadata columns to decode in addition to those that the models need. `registry`: the URL or directory of
    a schema registry, for alerts in wire format. `judge`: flags anomalies, if it is given.
    """
    from broker_filter.console import progress
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.registry import open_registry
    from broker_filter.scoring.runtimes import available_cores
    from broker_filter.streaming.archives import read_packets
    from broker_filter.streaming.duplicates import DuplicateWindow
    from broker_filter.streaming.filtering import score_stream

    wanted = tuple(dict.fromkeys((*scorer.columns, *columns)))
    decoder = Decoder(open_registry(registry), cutout_size=scorer.cutout_size, columns=wanted)
    packets = read_packets(inputs, wanted=decoder.fields)
    batches = score_stream(
        packets,
        decoder,
        scorer,
        DuplicateWindow(DUPLICATE_WINDOW),
        batch_size=BATCH_SIZE,
        threads=available_cores(),
        judge=judge,
    )
    with progress("Scoring", share=packets.share_read) as advance:
        for scored in batches:
            yield scored
            advance(len(scored.packets))


def open_reference(file: Path, bundle: str | None, device: str) -> tuple[Reference, Scorer]:
    """Returns a reference set, and a scorer for the model that made it.

    The model is `bundle`, or else the bundle that ships under the name that the reference set records. Raises
    ReferenceSetError if another model made the reference set, and the errors of opening a bundle.
    """
    from broker_filter.config import Runtime
    from broker_filter.scoring.reference import check_made_with, read_reference
    from broker_filter.scoring.scorer import open_scorer

    require_files(file)
    reference = read_reference(file)
    scorer = open_scorer([bundle or reference.card.bundle], Runtime.model_validate({"device": device}))
    check_made_with(file, reference.card, [model.bundle.card for model in scorer.models])
    return reference, scorer
