"""Floors: what no alert filter can do without, done by the best library there is and with nothing around it.

Inflating the stamps, the network's floating-point operations, the network alone on tensors that are ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import deflate
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from broker_filter.bench.measure import Run, timed
from broker_filter.bench.naive import NaiveBroker
from broker_filter.packets.batch import CUTOUTS, AlertBatch
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import WEIGHTS, Bundle
from broker_filter.scoring.networks import ServedNetwork, load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.runtimes import LoadedNetwork, Tensors

MATRIX = 1024
"""Rows and columns of the matrices whose product tells the machine's rate: they fit into a cache of its second level,
and are large enough for a library's best."""

Work = Callable[[], object]


def inflate_stamps(packets: Sequence[bytes], broker: NaiveBroker) -> Work:
    """libdeflate on the stamps of ZTF `packets`: their sizes are known beforehand, nobody looks at what comes out."""
    alerts = [broker.decode(packet)[1] for packet in packets]
    stamps = [alert[f"cutout{name.capitalize()}"]["stampData"] for alert in alerts for name in CUTOUTS]
    sized = [(stamp, int.from_bytes(stamp[-4:], "little")) for stamp in stamps]

    def inflate() -> None:
        for stamp, size in sized:
            deflate.gzip_decompress(stamp, size)

    return inflate


def flops_run(bundle: Bundle) -> Callable[[], Run]:
    """A run of the floating-point operations that the network takes, but as float32 matrix products on one thread."""
    left, right, product = (torch.rand(MATRIX, MATRIX) for _ in range(3))
    alerts = 2 * MATRIX**3 / flops(bundle)

    def run() -> Run:
        torch.set_num_threads(1)
        with torch.inference_mode():
            once = timed(partial(torch.mm, left, right, out=product), 1)
        return Run(once.alerts_per_second * alerts, once.cpu_microseconds / alerts)

    return run


def flops(bundle: Bundle) -> int:
    """Floating-point operations of the network for one alert, as torch counts them: two for a multiplication and its
    addition, in convolutions and matrix products alone."""
    tensors = [torch.zeros(1, *shape) for shape in bundle.card.inputs.shapes().values()]
    network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ServedNetwork(network, bundle.card.outputs).eval()(*tensors)
    return int(counter.get_total_flops())


def network_alone(network: LoadedNetwork, bundle: Bundle, alerts: AlertBatch, threads: int) -> Work:
    """The network on tensors that are ready, in runs as the service makes them.

    `threads`: as it was opened with; torch sets them for a whole process.
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
