"""Measures each stage separately: packet to pixels and columns, pixels to scores, scores to output record. No Kafka.

The input of each stage is prepared before the clock starts. Stages of the service run on one thread; stages that scale
with threads run on two threads as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch

from broker_filter.bench.floors import Work, flops_run, inflate_stamps, network_alone
from broker_filter.bench.measure import (
    FLOPS,
    INFLATE,
    NAIVE,
    RUNTIME,
    SERVICE,
    SERVICE_2_THREADS,
    Contest,
    Run,
    compete,
    timed,
)
from broker_filter.bench.naive import NaiveBroker
from broker_filter.bench.options import Device
from broker_filter.bench.sample import in_batches
from broker_filter.config import Batch, Input, Output, Runtime, Service
from broker_filter.packets.batch import CUTOUTS, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.ocf import read_container
from broker_filter.packets.layout import N_POINT_COLUMNS, N_SPANS, STAMP, Layout
from broker_filter.packets.plan import field_paths
from broker_filter.packets.stamps import decode_stamps
from broker_filter.packets.surveys import DEFAULT_COLUMNS, FORMATS
from broker_filter.packets.walk import walk
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.runtimes import RuntimeUnavailableError, open_network
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_alerts
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import open_router

BATCH = Batch().max_size
POINTS = 4096
"""Maximum number of light curve points of an alert; ZTF's longest histories have some hundreds."""
ENGINES: tuple[Literal["onnxruntime", "torch"], ...] = ("onnxruntime", "torch")
Row = Mapping[str, Callable[[], Run]]
"""The competitors of a stage."""

STREAM = 8
"""How often the batches are repeated for two threads, so that the idle time at the end of the run is negligible."""

DECODE = "decode"
"""The whole decoding: framing, walk, columns and stamps."""


def score_stage(model: str) -> str:
    """Return the name of the stage of a model from cutouts to scores."""
    return f"score: {model}"


def measure_stages(
    packets: Sequence[bytes], models: Sequence[str], device: Device, repetitions: int
) -> dict[str, Contest]:
    """Measure one contest per stage, on ZTF packets.

    The naive loop runs the first model, whose only inputs must be images.
    """
    scorer = open_scorer(models, Runtime(device=device, inference_threads=1))
    naive = NaiveBroker(scorer.models[0].part(Survey.ZTF).bundle)
    with ThreadPoolExecutor(2) as pool:
        stages: dict[str, Row] = {
            **decoding_stages(packets, scorer, naive, pool),
            **scoring_stages(packets, scorer, naive, device),
            **encoding_stage(packets, scorer, naive),
        }
        return {stage: compete(row, repetitions) for stage, row in stages.items()}


def open_decoder(scorer: Scorer) -> Decoder:
    """Return a decoder of the columns that the models need, and of the default columns."""
    return scorer.decoder(columns=DEFAULT_COLUMNS)


def decoding_stages(
    packets: Sequence[bytes], scorer: Scorer, naive: NaiveBroker, pool: ThreadPoolExecutor
) -> dict[str, Row]:
    """Return the contests of framing, walk and stamps by themselves, and of the whole decoding."""
    n = len(packets)
    decoder = open_decoder(scorer)
    batches = in_batches(packets, BATCH)
    alerts = [naive.decode(packet)[1] for packet in packets]
    frame, walk_bodies, place_stamps = service_decoding(packets, scorer.cutout_size)

    def decode_naively() -> None:
        for packet in packets:
            _, alert = naive.decode(packet)
            naive.cutouts(alert)

    def decode_on_two() -> None:
        for _ in pool.map(decoder.decode, STREAM * batches):
            pass

    return {
        "frame": {SERVICE: partial(timed, frame, n)},
        "Avro": {
            NAIVE: partial(timed, lambda: [naive.decode(packet) for packet in packets], n),  # framing included
            SERVICE: partial(timed, walk_bodies, n),
        },
        "stamps": {
            NAIVE: partial(timed, lambda: [naive.cutouts(alert) for alert in alerts], n),
            SERVICE: partial(timed, place_stamps, n),
        },
        DECODE: {
            NAIVE: partial(timed, decode_naively, n),
            SERVICE: partial(timed, lambda: [decoder.decode(batch) for batch in batches], n),
            SERVICE_2_THREADS: partial(timed, decode_on_two, STREAM * n),
            INFLATE: partial(timed, inflate_stamps(packets, naive), n),
        },
    }


def service_decoding(packets: Sequence[bytes], cutout_size: int) -> tuple[Work, Work, Work]:
    """Return three parts of the decoder as functions: frame all packets, walk all bodies, decode all stamps."""
    (ztf,) = (known for known in FORMATS if known.survey.name == "ZTF")
    layout = Layout(ztf, DEFAULT_COLUMNS)
    scalars, ids = np.empty((1, layout.n_scalars)), np.empty((1, layout.n_ids), np.int64)
    spans, points = np.empty((1, N_SPANS, 2), np.int64), np.empty((POINTS, N_POINT_COLUMNS))
    programs = {}
    bodies, stamps = [], []
    for packet in packets:
        container = read_container(packet)
        assert container.schema is not None
        if container.schema not in programs:
            programs[container.schema] = layout.plan(container.schema, field_paths(container.schema)).program
        program, body = programs[container.schema], container.blocks[0].body
        walk(program, body, 0, 0, scalars, ids, spans, points, 0)
        bodies.append((program, body))
        stamps.append(spans[0, STAMP : STAMP + len(CUTOUTS)].copy())
    slots = np.empty((BATCH, len(CUTOUTS), cutout_size, cutout_size), np.float32)
    boxes = np.empty((BATCH, len(CUTOUTS), 4), np.int16)
    batches = []
    for start in range(0, len(packets), BATCH):
        rows = slice(start, start + BATCH)
        batches.append(([body for _, body in bodies[rows]], np.stack(stamps[rows])))

    def frame() -> None:
        for packet in packets:
            read_container(packet)

    def walk_bodies() -> None:
        for program, body in bodies:
            walk(program, body, 0, 0, scalars, ids, spans, points, 0)

    def place_stamps() -> None:
        for records, places in batches:
            n = len(records)
            decode_stamps(records, places, np.full(n, ztf.stamps_centred), slots[:n], boxes[:n])

    return frame, walk_bodies, place_stamps


def scoring_stages(packets: Sequence[bytes], scorer: Scorer, naive: NaiveBroker, device: Device) -> dict[str, Row]:
    """Return the contests of normalisation, of each network in each runtime, and of each model as it is served."""
    n = len(packets)
    alerts, _ = open_decoder(scorer).decode(in_batches(packets, n)[0])
    cutouts = [naive.cutouts(naive.decode(packet)[1]) for packet in packets]
    images = [naive.normalise(each) for each in cutouts]
    first = scorer.models[0]
    wanted = first.part(Survey.ZTF).inputs.images

    def normalise() -> None:
        for k in range(0, n, BATCH):
            prepare_images(alerts.cutouts[k : k + BATCH], alerts.cutout_box[k : k + BATCH], wanted)

    def infer_naively() -> None:
        torch.set_num_threads(1)
        for image in images:
            naive.infer(image)

    def score_naively() -> None:
        torch.set_num_threads(1)
        for each in cutouts:
            naive.score(each)

    stages: dict[str, Row] = {
        "normalise": {
            NAIVE: partial(timed, lambda: [naive.normalise(each) for each in cutouts], n),
            SERVICE: partial(timed, normalise, n),
        }
    }
    for model in scorer.models:
        part = model.part(Survey.ZTF)
        for engine in ENGINES:
            try:
                one, two = (
                    open_network(part.bundle, Runtime(engine=engine, device=device, inference_threads=threads))
                    for threads in (1, 2)
                )
            except RuntimeUnavailableError:
                continue  # this engine lacks the device; opening the scorer has failed before if every engine lacks it
            stages[f"inference: {model.name}, {one.provider}"] = {
                **({NAIVE: partial(timed, infer_naively, n)} if model is first else {}),
                SERVICE: partial(timed, network_alone(one, part.bundle, alerts, 1), n),
                SERVICE_2_THREADS: partial(timed, network_alone(two, part.bundle, alerts, 2), n),
                FLOPS: flops_run(part.bundle),
            }
        stages[score_stage(model.name)] = {
            **({NAIVE: partial(timed, score_naively, n)} if model is first else {}),
            SERVICE: partial(timed, partial(model.score, alerts), n),
            RUNTIME: partial(timed, network_alone(part.network, part.bundle, alerts, 1), n),
        }
    return stages


def encoding_stage(packets: Sequence[bytes], scorer: Scorer, naive: NaiveBroker) -> dict[str, Row]:
    """Return the contest of encoding output records with full payload."""
    decoder, window = open_decoder(scorer), DuplicateWindow(len(packets))
    source = Input(bootstrap_servers="none:9092", group_id="bench", topics=["bench"])
    router = open_router(resolve(Service(input=source, output=Output(prefix="bench"))))
    scored = [score_alerts(*decoder.decode(batch), scorer, window) for batch in in_batches(packets, BATCH)]
    decoded = [naive.decode(packet) for packet in packets]
    scores = [naive.score(naive.cutouts(alert)) for _, alert in decoded]

    def encode_naively() -> None:
        for (schema, alert), score in zip(decoded, scores, strict=True):
            naive.encode(schema, alert, score)

    return {
        "encode": {
            NAIVE: partial(timed, encode_naively, len(packets)),
            SERVICE: partial(timed, lambda: [router.route(batch) for batch in scored], len(packets)),
        }
    }
