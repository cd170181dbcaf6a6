"""Measures the decoding of LSST packets, whose histories can hold a thousand points. No Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO

import fastavro
import numpy as np
from astropy.io import fits

from broker_filter.bench.floors import Work
from broker_filter.bench.measure import NAIVE, PARSE, SERVICE, SERVICE_2_THREADS, Contest, compete, timed
from broker_filter.bench.sample import in_batches
from broker_filter.config import Batch
from broker_filter.packets.batch import CUTOUTS
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import wire
from broker_filter.packets.layout import N_SPANS
from broker_filter.packets.plan import compile_program
from broker_filter.packets.schemas.registry import SchemaRegistry, open_registry
from broker_filter.packets.walk import walk
from broker_filter.scoring.scorer import Scorer

DECODE_LSST = "decode: LSST"
"""The name of the stage."""
STREAM = 8
"""How often the batches are repeated for two threads, so that the idle time at the end of the run is negligible."""
_CARD, _BLOCK = 80, 2880
_END = b"END".ljust(_CARD)


def measure_lsst_decoding(
    packets: Sequence[bytes], schema_registry: str, scorer: Scorer, repetitions: int
) -> dict[str, Contest]:
    """Return the contest of decoding LSST packets in wire format into cutouts, light curves and the models' columns."""
    registry = open_registry(schema_registry)
    decoder = scorer.decoder(registry)
    n, batches = len(packets), in_batches(packets, Batch().max_size)
    with ThreadPoolExecutor(2) as pool:

        def decode_on_two() -> None:
            for _ in pool.map(decoder.decode, STREAM * batches):
                pass

        return {
            DECODE_LSST: compete(
                {
                    NAIVE: partial(timed, _naive_work(packets, registry), n),
                    SERVICE: partial(timed, lambda: _decode_all(decoder, packets), n),
                    SERVICE_2_THREADS: partial(timed, decode_on_two, STREAM * n),
                    PARSE: partial(timed, parse_work(packets, registry), n),
                },
                repetitions,
            )
        }


def _decode_all(decoder: Decoder, packets: Sequence[bytes]) -> None:
    for _ in decoder.decode_stream(in_batches(packets, len(packets))[0], Batch().max_size):
        pass


def _naive_work(packets: Sequence[bytes], registry: SchemaRegistry) -> Work:
    """Return a function that decodes one packet at a time with fastavro and astropy."""
    schemas = {
        message.schema_id: fastavro.parse_schema(registry.get(message.schema_id).definition)
        for message in map(wire.unframe, packets)
    }

    def decode() -> None:
        for packet in packets:
            message = wire.unframe(packet)
            alert = fastavro.schemaless_reader(BytesIO(message.body), schemas[message.schema_id], None)
            assert isinstance(alert, dict)
            for name in CUTOUTS:
                with fits.open(BytesIO(alert[f"cutout{name.capitalize()}"])) as hdus:
                    hdus[0].data.astype(np.float32)

    return decode


def parse_work(packets: Sequence[bytes], registry: SchemaRegistry) -> Work:
    """Return a function that steps over every field of LSST `packets` and converts the pixels of their cutouts.

    It is a floor of decoding: a record's fields have no fixed places, so each must be passed to find the next one.
    """
    walks, pixels = [], []
    programs = {}
    decoder = Decoder(registry, columns=())
    for packet in packets:
        message = wire.unframe(packet)
        schema = registry.get(message.schema_id)
        if schema not in programs:
            programs[schema] = compile_program(schema, {})
        walks.append((programs[schema], memoryview(message.body)))
        alerts, _ = decoder.decode(in_batches([packet], 1)[0])
        for begin, end in alerts.records[0].cutout_spans:
            stamp = bytes(alerts.records[0].body[begin:end])
            start = stamp.index(b"SIMPLE")
            header = (stamp.index(_END, start) - start) // _CARD * _CARD + _CARD
            side = int(stamp[start:].split(b"NAXIS1  =", 1)[1][: _CARD - 9].partition(b"/")[0])
            pixels.append(np.frombuffer(stamp, ">f4", side * side, start + -(-header // _BLOCK) * _BLOCK))
    scalars, ids = np.empty((1, 1)), np.empty((1, 1), np.int64)
    spans, points = np.empty((1, N_SPANS, 2), np.int64), np.empty((1, 1))

    def parse() -> None:
        for program, body in walks:
            walk(program, body, 0, 0, scalars, ids, spans, points, 0)
        for image in pixels:
            image.astype(np.float32)

    return parse
