"""Runs the compiled code under AddressSanitizer and UndefinedBehaviorSanitizer over mutated packets, stamps and pixels.

    python tests/packets/sanitize.py [number of mutants, by default 20000]

The script builds the three extensions with gcc in a temporary folder and restarts itself with the sanitizer's
library loaded. Each body and stamp is read from an allocation of its exact size, so a read beyond its end is detected.
The script exits non-zero on the first finding.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "broker_filter"
MODULES = ("packets._walk", "packets._stamps", "scoring._normalise")
SHARED = HERE.parents[2] / "shared" / "data"
TOGETHER = 12
"""The number of stamps per batch: more than are decompressed in parallel, so that streams are reused."""
BUILD = "BROKER_FILTER_SANITIZED"


def build(folder: Path) -> None:
    """Build the sanitized extensions in `folder`."""
    flags = ["-O1", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = sysconfig.get_paths()["include"]
    for name in MODULES:
        source = SOURCES / f"{name.replace('.', '/')}.c"
        command = ["gcc", *flags, "-DPy_LIMITED_API=0x030B0000", f"-I{include}", str(source)]
        subprocess.run([*command, "-o", str(folder / f"{name}.abi3.so")], check=True)


def main(count: int) -> None:
    """Decode and normalise `count` mutants with the sanitized extensions; a finding ends the process."""
    for name in MODULES:
        path = Path(os.environ[BUILD]) / f"{name}.abi3.so"
        spec = importlib.util.spec_from_file_location(f"broker_filter.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]

    import numpy as np
    from test_fuzz import SEED, mutants
    from test_inflate import ENCODERS, IMAGES
    from test_stamps import CARDS, FUZZED, fits_bytes, shared_lsst_stamps

    from broker_filter.packets import compiled, decode, walk
    from broker_filter.packets.batch import PLANES, PSF_SIZE
    from broker_filter.packets.framing import ocf, wire
    from broker_filter.packets.packet import FilePosition, Packet
    from broker_filter.packets.schemas.registry import open_registry
    from broker_filter.scoring.preprocess import normalise, normalise_snr
    from broker_filter.simulate import SCHEMAS, simulate_night

    assert [walk.walk, compiled.decode_stamps, normalise_snr] == [
        sys.modules["broker_filter.packets._walk"].walk,
        sys.modules["broker_filter.packets._stamps"].decode_stamps,
        sys.modules["broker_filter.scoring._normalise"].snr,
    ]
    if SHARED.is_dir():
        with tarfile.open(SHARED / "ztf" / "ztf_alerts.tar") as archive:
            files = [stream.read() for member in archive if (stream := archive.extractfile(member))][::60]
        files += [path.read_bytes() for path in sorted((SHARED / "lsst").rglob("*.avro"))[::4]]
        registry = open_registry(str(SHARED / "lsst" / "schemas"))
    else:
        files = [alert.packet for survey in ("ztf", "lsst") for alert in simulate_night(20, 1, survey)]
        registry = open_registry(str(SCHEMAS))
    decoder = decode.Decoder(registry)
    seen: Counter[str] = Counter()
    for data in mutants(files, count, reseal=True):
        schemas = decoder._look_up([Packet(data, FilePosition("mutant"))])
        known = data.startswith(ocf.MAGIC) or wire.is_wire_message(data)
        container = decoder._frame(data, schemas) if known else None
        if container is None or container.schema is None:
            continue
        plan = decoder._plan(container.schema)
        for block in container.blocks if isinstance(plan, decode.Plan) else ():
            body = np.array(block.body, dtype=np.uint8, copy=True)  # an allocation of exactly its size
            outputs = decode._Outputs([plan.layout], [])
            status, _ = outputs.walk(plan, body.data, 0)
            seen[status.name] += 1
    assert seen.total() > count / 2, seen
    print(f"{seen.total()} bodies walked without a finding: {dict(seen)}")  # noqa: T201

    draw = np.random.default_rng(SEED)
    placed = 0
    slots, boxes = np.empty((TOGETHER, 3, 63, 63), np.float32), np.empty((TOGETHER, 3, 4), np.int16)
    variance, psf = np.empty_like(slots), np.empty((TOGETHER, 3, PSF_SIZE, PSF_SIZE), np.float32)
    stamps = [*FUZZED.values(), *(gzip.compress(stamp, 1) for stamp in FUZZED.values())]
    if SHARED.is_dir():
        stamps += list(shared_lsst_stamps(SHARED))[::10]
    stamps += [encode(fits_bytes(image)) for image in IMAGES.values() for encode in ENCODERS.values()]
    for start in range(0, count, TOGETHER):
        bodies = []
        for k in range(start, start + TOGETHER):
            stamp = np.frombuffer(stamps[draw.integers(len(stamps))], np.uint8).copy()
            reach = min(
                (len(stamp), 800, 12_000)[k % 3], len(stamp)
            )  # at any position, or only in headers and code tables
            stamp[draw.integers(0, reach, draw.integers(0, 4))] = draw.integers(0, 256)
            if k % 2:  # exchange a card in the headers of the image and its extensions
                card = np.frombuffer(CARDS[draw.integers(len(CARDS))], np.uint8)
                at = len(card) * draw.integers(0, max(1, min(len(stamp), 3 * 12_000) // len(card)))
                stamp[at : at + len(card)] = card[: len(stamp) - at]
            bodies.append(stamp[: draw.integers(len(stamp) + 1)].copy() if k % 8 == 1 else stamp)
        spans = np.array([[(0, len(body)), (0, len(body) + 1), (-1, -1)] for body in bodies])
        taken = np.zeros((TOGETHER, 3), bool)
        centred = draw.integers(0, 2, TOGETHER).astype(bool)
        states = np.full((TOGETHER, 3, len(PLANES)), 2, np.uint8)
        planes = (None, None) if k % 5 == 0 else (variance, psf)
        compiled.decode_stamps([body.data for body in bodies], spans, centred, slots, boxes, taken, *planes, states)
        assert not taken[:, 1:].any()
        placed += int(taken[:, 0].sum())
    assert 0 < placed < count
    print(f"{count} stamps without a finding, {placed} of them placed")  # noqa: T201

    for side in draw.integers(1, 64, count // TOGETHER).tolist():
        pixels, variance = draw.integers(0, 2**32, (2, TOGETHER, side, side), np.uint32).view(np.float32)
        corner = draw.integers(0, side, (TOGETHER, 2))
        boxes = np.concatenate([corner, draw.integers(0, side - corner + 1)], axis=1).astype(np.int16)
        outputs = np.empty((2, TOGETHER, side, side), np.float32)
        normalise_snr(pixels, variance, boxes, draw.integers(0, 2, TOGETHER).astype(bool), 0.0, outputs[0])
        normalise(pixels, outputs[1], side)
        assert np.isfinite(outputs).all()
    print(f"{count // TOGETHER} batches of pixels normalised without a finding")  # noqa: T201


if __name__ == "__main__":
    mutants_wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    if BUILD in os.environ:
        main(mutants_wanted)
    else:
        library = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            environment = os.environ | {
                BUILD: folder,
                "LD_PRELOAD": library,
                "ASAN_OPTIONS": "detect_leaks=0",
                "PYTHONMALLOC": "malloc",
            }
            raise SystemExit(
                subprocess.run([sys.executable, __file__, str(mutants_wanted)], env=environment).returncode
            )
