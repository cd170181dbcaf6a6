"""Measures what `near` and `in_moc` in filters cost: reading their files, and the alerts of a batch. No Kafka."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from astropy.io import fits
from pyarrow import csv

from broker_filter.bench.measure import Spread, timed
from broker_filter.config import Batch
from broker_filter.packets.photometry import Values
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.expressions import IDENTITY_FIELDS, Expression, compile_filter

TARGETS = 1_000_000
ORDER, FINE_ORDER = 5, 9
"""Orders of the HEALPix cells of the map: far from the event, and in one cell of order 2 around it."""
BATCHES = 100
ARCSEC = 1 / 3600
RADIUS = 2.0
"""Radius of `near` in arcsec."""


def measure_sky(directory: Path, repetitions: int) -> dict[str, Spread]:
    """Return the time to read a list of TARGETS targets and a map, and the CPU time of an alert in each function.

    `directory`: the files are written there. Half of the alerts are within RADIUS of a target; batches have the
    service's default size.
    """
    rng = np.random.default_rng(1)
    ra, dec = _positions(rng, TARGETS)
    csv.write_csv(pa.table({"name": np.arange(TARGETS).astype(str), "ra": ra, "dec": dec}), directory / "targets.csv")
    _write_map(directory / "event.fits", rng)
    size = BATCHES * Batch().max_size
    alert_ra, alert_dec = _positions(rng, size)
    chosen = rng.integers(0, TARGETS, size // 2)
    alert_ra[::2], alert_dec[::2] = ra[chosen], np.clip(dec[chosen] + RADIUS / 2 * ARCSEC, -90, 90)
    batches = list(zip(np.split(alert_ra, BATCHES), np.split(alert_dec, BATCHES), strict=True))
    quantities = {}
    for call, file in (
        (f'near("targets.csv", {RADIUS:g})', f"a list of {TARGETS:,} targets"),
        ('in_moc("event.fits", 0.9)', "a map of probabilities"),
    ):
        quantities[f"CPU ms to read {file}"] = Spread.of([_cpu_ms_to_read(call, directory) for _ in range(repetitions)])
        expression = compile_filter(call, IDENTITY_FIELDS, (), SkyFiles(directory))
        runs = [timed(partial(_evaluate, expression, batches), size) for _ in range(repetitions)]
        quantities[f"{call}, CPU us for an alert"] = Spread.of([run.cpu_microseconds for run in runs])
    return quantities


def _cpu_ms_to_read(call: str, directory: Path) -> float:
    started = time.process_time()
    compile_filter(call, IDENTITY_FIELDS, (), SkyFiles(directory))
    return (time.process_time() - started) * 1000


def _evaluate(expression: Expression, batches: Sequence[tuple[Values, Values]]) -> None:
    """Evaluate a filter on batches. A batch has the right ascensions and the declinations of its alerts."""
    for ra, dec in batches:
        found = {near.call: near.find(ra, dec) for near in expression.nears}
        expression.holds_for({"ra": ra, "dec": dec, **found}, len(ra))


def _positions(rng: np.random.Generator, n: int) -> tuple[Values, Values]:
    """Return positions spread evenly over the sky, in degrees, float64[n] each."""
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


def _write_map(file: Path, rng: np.random.Generator) -> None:
    """Write a multi-order map with half of the probability in fine cells."""
    fine = 4 ** (FINE_ORDER - 2)
    coarse = np.arange(4 ** (ORDER - 2), 12 * 4**ORDER)
    cells = np.concatenate([4 * 4**FINE_ORDER + np.arange(fine), 4 * 4**ORDER + coarse])
    order = np.concatenate([np.full(fine, FINE_ORDER), np.full(len(coarse), ORDER)])
    probability = rng.exponential(size=len(cells)) ** 2
    probability[:fine] /= 2 * probability[:fine].sum()
    probability[fine:] /= 2 * probability[fine:].sum()
    density = probability / (np.pi / 3 / 4.0**order)
    columns = [fits.Column("UNIQ", "K", array=cells), fits.Column("PROBDENSITY", "D", array=density, unit="sr-1")]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)]).writeto(file)
