"""The headers of dead letters that `redrive` reads: which message it was, why it was rejected, and what was published.

A message may hold several alerts of which some were published before it became a dead letter. They must not be
published again when the dead letter is scored again. The header SCORED names them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from broker_filter.packets.packet import Packet, Redriven
from broker_filter.streaming.scored import ScoredBatch

Header = tuple[str, bytes]

INPUT, RECORD, REASON, REJECTED = "input", "record", "reason", "rejected"
"""Headers of a dead letter: position of the message, first rejected alert, its reason, and counts by reason."""
SCORED = "scored"
"""Header of a dead letter: indices of the alerts of the message that need not be scored again, as `0-2,4`."""
TRIES = "tries"
"""Header of a dead letter: how many times `redrive` has scored the message in vain; absent for 0."""
REDRIVEN = "redriven"
"""Header of an output record of `redrive`: how many times the message was scored again, counting this time."""
MAX_INDEX = 10**6
"""More than the alerts and tries that a message can have. A larger number in a header is an error."""


class LetterError(ValueError):
    """A message has not the headers of a dead letter."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, with what its headers say."""

    packet: Packet
    """The original message, ready to be scored again."""
    reason: str
    """The reject reason of the first rejected alert."""
    reasons: frozenset[str]
    """The reject reasons of all rejected alerts."""
    tries: int
    """How many times the message was scored again in vain."""


def read_letter(packet: Packet, headers: Mapping[str, bytes | None]) -> Letter:
    """Return the dead letter that was read as `packet`, with its `headers`. Raises LetterError.

    Older versions did not write the header SCORED. Then the alerts before the first rejected one count as published.
    """
    text = {name: value.decode(errors="replace") for name, value in headers.items() if value is not None}
    if INPUT not in text or REASON not in text:
        raise LetterError(f"{packet.position}: no dead letter: the header {INPUT} or {REASON} is absent")
    tries = _number(text.get(TRIES, "0"))
    scored = _parse_ranges(text[SCORED]) if SCORED in text else (range(_number(text.get(RECORD, "0"))),)
    counts = text.get(REJECTED, "")
    reasons = {text[REASON], *(count.partition("=")[0] for count in counts.split(",") if counts)}
    redriven = Redriven(text[INPUT], tries + 1, scored)
    return Letter(replace(packet, redriven=redriven), text[REASON], frozenset(reasons), tries)


def letter_headers(packet: Packet, scored: Iterable[int] = ()) -> list[Header]:
    """Return the headers SCORED and TRIES for a dead letter of `packet`.

    `scored`: indices of the alerts of the packet that are scored now; those that were published earlier are added.
    """
    before = packet.redriven
    done = {*scored, *(index for indices in (before.published if before else ()) for index in indices)}
    tries = [(TRIES, str(before.tries).encode())] if before else []
    return [(SCORED, _format_ranges(done).encode()), *tries]


def scored_rows(scored: ScoredBatch, packets: Collection[int]) -> dict[int, list[int]]:
    """Return, for each of the packets with these indices, the indices of its alerts that are scored rows of a batch."""
    found: dict[int, list[int]] = {k: [] for k in packets}
    if found:
        packet_index, record_index = scored.alerts.packet_index.tolist(), scored.alerts.record_index.tolist()
        for i in scored.scored.tolist():
            if packet_index[i] in found:
                found[packet_index[i]].append(record_index[i])
    return found


def leave_out_published(scored: ScoredBatch) -> ScoredBatch:
    """Return a batch without the alerts, scored or rejected, that were published before their message was redriven."""
    before = {k: packet.redriven.published for k, packet in enumerate(scored.packets) if packet.redriven}
    if not any(before.values()):
        return scored

    def is_published(packet: int, record: int) -> bool:
        return any(record in indices for indices in before.get(packet, ()))

    taken = scored.scores.taken.copy()
    rows = zip(scored.alerts.packet_index.tolist(), scored.alerts.record_index.tolist(), strict=True)
    taken &= [not is_published(*row) for row in rows]
    rejects = [reject for reject in scored.rejects if not is_published(reject.packet_index, reject.record)]
    return replace(scored, scores=replace(scored.scores, taken=taken), rejects=rejects)


def _format_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text with the consecutive ones joined: `0-2,4`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _parse_ranges(text: str) -> tuple[range, ...]:
    """Parse what `_format_ranges` returns. Raises LetterError."""
    parts: Sequence[str] = text.split(",") if text else ()
    ranges = []
    for part in parts:
        first, _, last = part.partition("-")
        ranges.append(range(_number(first), _number(last or first) + 1))
    if sum(map(len, ranges)) > MAX_INDEX:
        raise LetterError(f"{text[:20]!r} names more than {MAX_INDEX} alerts in a header of a dead letter")
    return tuple(ranges)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_INDEX)) and int(text) <= MAX_INDEX):
        raise LetterError(f"{text[:20]!r} is not a number from 0 to {MAX_INDEX} in a header of a dead letter")
    return int(text)
