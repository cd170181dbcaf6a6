"""Scores archives, for the commands that work on the embeddings of many alerts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.options import STDIN
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.anomalies.reference import Reference
    from broker_filter.config import Device
    from broker_filter.packets.packet import Packet
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.judge import AnomalyJudge
    from broker_filter.streaming.scored import ScoredBatch


class OverwriteError(UsageError):
    """The output file is also an input."""


def keep_inputs(out: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse a file `out` that cannot be written, before the work begins.

    Raises OverwriteError if `out` is one of the inputs, whose alerts would be lost, and UsageError if its folder does
    not exist.
    """
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}")
    for given in inputs:
        if str(given) != STDIN and Path(given).resolve() == out.resolve():
            raise OverwriteError(f"{given} is an input and would be overwritten: choose another --out")


def share_read(packets: Iterator[Packet]) -> float | None:
    """Return the fraction of the inputs' bytes that was read, from 0 to 1; None if the total size is unknown."""
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
    """Score the alerts of files, folders and archives, and show a progress bar.

    `columns`: metadata columns to decode in addition to those that the models need. `registry`: the URL or directory of
    a schema registry, for alerts in wire format. `judge`: flags anomalies, if it is given.
    """
    from broker_filter.console import progress
    from broker_filter.streaming.archives import read_packets
    from broker_filter.streaming.filtering import score_stream

    decoder = scorer.decoder(registry, columns=columns)
    packets = read_packets(inputs, wanted=decoder.fields)
    with progress("Scoring", share=packets.share_read) as advance:
        for scored in score_stream(packets, decoder, scorer, judge=judge):
            yield scored
            advance(len(scored.packets))


def open_reference(file: Path, bundle: str | None, device: Device) -> tuple[Reference, Scorer]:
    """Return a reference set, and a scorer for the model that made it.

    The model is `bundle`, or else the bundle that ships under the name that the reference set records. Raises
    ReferenceSetError if another model made the reference set, and the errors of opening a bundle.
    """
    from broker_filter.anomalies.reference import check_made_with, read_reference
    from broker_filter.scoring.scorer import Scorer

    require_files(file)
    reference = read_reference(file)
    scorer = Scorer.open(bundle or reference.card.bundle, device=device)
    check_made_with(file, reference.card, [model.bundle for model in scorer.models])
    return reference, scorer
