"""Floors: the work that every alert filter must do, done by the fastest available library, and nothing else.

These are decompressing the stamps, the network's floating-point operations, and the network on prepared tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import deflate
import onnxruntime
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from broker_filter.bench.measure import Run, timed
from broker_filter.bench.naive import NaiveBroker
from broker_filter.packets.batch import CUTOUTS, AlertBatch
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import WEIGHTS, Part
from broker_filter.scoring.networks import ServedNetwork, load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.runtimes import LoadedNetwork, Tensors

MATRIX = 1024
"""Rows and columns of the matrices whose product measures the machine's rate: enough for a library's full speed."""

Work = Callable[[], object]


def inflate_stamps(packets: Sequence[bytes], broker: NaiveBroker) -> Work:
    """Return a function that decompresses the stamps of ZTF `packets` with libdeflate, and ignores the result."""
    alerts = [broker.decode(packet)[1] for packet in packets]
    stamps = [alert[f"cutout{name.capitalize()}"]["stampData"] for alert in alerts for name in CUTOUTS]
    sized = [(stamp, int.from_bytes(stamp[-4:], "little")) for stamp in stamps]

    def inflate() -> None:
        for stamp, size in sized:
            deflate.gzip_decompress(stamp, size)

    return inflate


def flops_run(bundle: Part) -> Callable[[], Run]:
    """Return a function that measures the time of as many floating-point operations as the network needs.

    The operations are float32 matrix products on one thread, by torch or onnxruntime, whichever is faster.
    """
    left, right, product = (torch.rand(MATRIX, MATRIX) for _ in range(3))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(product_graph(), options, providers=["CPUExecutionProvider"])
    matrices = {"left": left.numpy(), "right": right.numpy()}
    alerts = 2 * MATRIX**3 / flops(bundle)

    def run() -> Run:
        torch.set_num_threads(1)
        with torch.inference_mode():
            by_torch = timed(partial(torch.mm, left, right, out=product), 1)
        by_onnxruntime = timed(partial(session.run, None, matrices), 1)
        once = min(by_torch, by_onnxruntime, key=lambda run: run.cpu_microseconds)
        return Run(once.alerts_per_second * alerts, once.cpu_microseconds / alerts)

    return run


def product_graph() -> bytes:
    """Return a serialised ONNX model of one matrix product, because onnxruntime has no function for it.

    The model's inputs are `left` and `right`, its output is `product`. It is encoded by hand, so that the benchmark
    does not need the package `onnx`; the field numbers are those of onnx.proto.
    """

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content  # a length-delimited protobuf field

    free = field(1, b"")
    matrix = field(2, field(1, b"\x08\x01" + field(2, free + free)))  # elements of type 1, float
    names = [field(1, b"left"), field(1, b"right"), field(1, b"product")]
    node = names[0] + names[1] + field(2, b"product") + field(4, b"MatMul")
    ends = zip((11, 11, 12), names, strict=True)
    graph = field(1, node) + field(2, b"product") + b"".join(field(n, name + matrix) for n, name in ends)
    return b"\x08\x08" + field(7, graph) + field(8, b"\x10\x11")  # of format 8, operators of set 17


def flops(bundle: Part) -> int:
    """Return the number of floating-point operations of the network for one alert, counted by torch.

    A multiplication with its addition counts as two; only convolutions and matrix products are counted.
    """
    tensors = [torch.zeros(1, *shape) for shape in bundle.card.inputs.shapes().values()]
    network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ServedNetwork(network, bundle.card.outputs).eval()(*tensors)
    return int(counter.get_total_flops())


def network_alone(network: LoadedNetwork, bundle: Part, alerts: AlertBatch, threads: int) -> Work:
    """Return a function that runs the network on prepared tensors, in chunks of the service's size.

    `threads`: the number with which the network was opened; torch sets it for the whole process.
    """
    raw, step = raw_alerts(alerts), network.chunk
    ready: list[Tensors] = [
        prepare(raw[start : start + step], bundle.card.inputs) for start in range(0, len(alerts), step)
    ]

    def infer() -> None:
        torch.set_num_threads(threads)
        for _ in network.run_all(ready):
            pass

    return infer
