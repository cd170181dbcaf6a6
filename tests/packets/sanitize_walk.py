"""Runs the compiled walker under AddressSanitizer and UndefinedBehaviorSanitizer over mutated packets.

    python tests/packets/sanitize_walk.py [mutants, 20000 unless told otherwise]

Builds `_walk.c` with gcc into a temporary folder, starts itself again with the sanitizer's library loaded, and walks
each body from an allocation of its exact size: a read one byte too far is seen. Exits non-zero on the first finding.
"""

from __future__ import annotations

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
SOURCE = HERE.parents[1] / "broker_filter" / "packets" / "_walk.c"
SHARED = HERE.parents[2] / "shared" / "data"
BUILD = "BROKER_FILTER_SANITIZED_WALK"


def build(folder: Path) -> Path:
    """The sanitized extension."""
    target = folder / "_walk.abi3.so"
    flags = ["-O1", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = sysconfig.get_paths()["include"]
    command = ["gcc", *flags, "-DPy_LIMITED_API=0x030B0000", f"-I{include}", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def main(count: int) -> None:
    """Walks `count` mutants with the sanitized extension; the sanitizers end the process on a finding."""
    spec = importlib.util.spec_from_file_location("broker_filter.packets._walk", os.environ[BUILD])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(HERE))

    import numpy as np
    from test_fuzz import mutants

    from broker_filter.packets import decode, ocf, walk, wire
    from broker_filter.packets.registry import open_registry
    from broker_filter.simulate import SCHEMAS, simulate_night

    assert walk.walk is sys.modules[spec.name].walk
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
        container = decoder._frame(data) if data.startswith(ocf.MAGIC) or wire.is_wire_message(data) else None
        if container is None or container.schema is None:
            continue
        plan = decoder._plan(container.schema)
        for block in container.blocks if isinstance(plan, decode.Plan) else ():
            body = np.array(block.body, dtype=np.uint8, copy=True)  # malloc of exactly its size
            outputs = decode._Outputs([plan.layout], 1)
            status, _ = outputs.walk(plan, body.data, 0)
            seen[status.name] += 1
    assert seen.total() > count / 2, seen
    print(f"{seen.total()} bodies walked without a finding: {dict(seen)}")  # noqa: T201


if __name__ == "__main__":
    mutants_wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    if BUILD in os.environ:
        main(mutants_wanted)
    else:
        library = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                BUILD: str(build(Path(folder))),
                "LD_PRELOAD": library,
                "ASAN_OPTIONS": "detect_leaks=0",
                "PYTHONMALLOC": "malloc",
            }
            raise SystemExit(
                subprocess.run([sys.executable, __file__, str(mutants_wanted)], env=environment).returncode
            )
