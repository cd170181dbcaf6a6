"""The files that the examples in the library's docstrings read. The test suite and the build of the site run them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from broker_filter.simulate import simulate_night

ALERTS = 5
"""The size of the night: enough for every example, and simulated in a fraction of a second."""


def write_example_night(folder: Path) -> None:
    """Write `night.tar` with five simulated ZTF alerts, and `alert.avro` with the first of them, into `folder`."""
    with tarfile.open(folder / "night.tar", "w") as archive:
        for i, alert in enumerate(simulate_night(ALERTS, seed=1)):
            member = tarfile.TarInfo(f"{i}.avro")
            member.size = len(alert.packet)
            archive.addfile(member, io.BytesIO(alert.packet))
            if i == 0:
                (folder / "alert.avro").write_bytes(alert.packet)
