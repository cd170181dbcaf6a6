"""Describes packets on a console in words, numbers and pictures, for `broker-filter inspect`.

Packets are untrusted input: their text is printed only after non-printable characters are replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker_filter.console import printable
from broker_filter.packets.batch import BANDS, CUTOUTS, UNKNOWN_BAND, AlertBatch, AlertIdentity, Measurement, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import ocf, wire
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject
from broker_filter.packets.surveys import COLUMNS

CUTOUT_SIZE = 128
"""Cutout size in pixels of the Decoder, so that stamps are shown whole: LSST's stamps have up to 102 px."""
PACKETS_AT_A_TIME = 64
PICTURE_SIZE = 22
"""Rows and columns of a cutout's picture, so that three pictures fit side by side into 80 characters."""
MJD_EPOCH = datetime(1858, 11, 17)
MAIN_FIELDS = frozenset(
    ("magpsf", "sigmapsf", "psfFlux", "psfFluxErr", "snr", "isdiffpos", "sso", "ndethist", "drb", "rb", "reliability",
     "classtar", "extendedness", "fwhm", "diffmaglim", "exptime", "distnr", "magnr", "sgscore1", "distpsnr1",
     "ssdistnr", "programid", "visit", "detector")
)  # fmt: skip
"""The metadata columns that best tell an astronomer which kind of alert this is."""
KINDS = {
    Measurement.DETECTION: "detections",
    Measurement.UPPER_LIMIT: "upper limits",
    Measurement.FORCED: "forced measurements",
}
READABLE = "readable"
"""The outcome of an alert that is not rejected."""


@dataclass
class Contents:
    """Counts of what packets contain.

    `kinds` counts alerts by (survey, schema version, framing, outcome). It counts rejected inputs too: their outcome is
    the reject reason. `examples` holds one reject for each reason, `mjd` the earliest and latest exposure, `bands` the
    number of alerts in each band, and `first` the batch whose first row is the first readable alert.
    """

    n_packets: int = 0
    n_bytes: int = 0
    kinds: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    examples: dict[str, Reject] = field(default_factory=dict)
    mjd: tuple[float, float] | None = None
    bands: Counter[str] = field(default_factory=Counter)
    first: AlertBatch | None = None


def take_stock(packets: Iterable[Packet], decoder: Decoder, advance: Callable[[int], None]) -> Contents:
    """Decode `packets` and count what they contain. Calls `advance` with the number of packets of each batch."""
    contents = Contents()
    for alerts, rejects in decoder.decode_stream(packets, PACKETS_AT_A_TIME):
        batch = alerts.packets
        contents.n_packets += len(batch)
        advance(len(batch))
        contents.n_bytes += sum(len(packet.data) for packet in batch)
        framings = [framing(packet.data) for packet in batch]
        for row in range(len(alerts)):
            identity = alerts.identity(row)
            contents.kinds[*_kind(identity), framings[alerts.packet_index[row]], READABLE] += 1
            contents.bands[identity.band or "?"] += 1
        for reject in rejects:
            contents.kinds[*_kind(reject.alert), framings[reject.packet_index], reject.reason] += 1
            contents.examples.setdefault(reject.reason, reject)
        if len(alerts):
            earliest, latest = contents.mjd or (np.inf, -np.inf)
            contents.mjd = min(earliest, float(alerts.mjd.min())), max(latest, float(alerts.mjd.max()))
            contents.first = contents.first or alerts
    return contents


def _kind(alert: AlertIdentity | None) -> tuple[str, str]:
    if alert is None or alert.survey is None:
        return "?", "?"
    return str(alert.survey), printable(alert.schema_version or "?")


def framing(data: bytes) -> str:
    """Describe the framing of a packet: container file and codec, wire format and schema id, or unknown."""
    if data.startswith(ocf.MAGIC):
        return f"container file, codec {ocf.read_container(data).codec}"
    if wire.is_wire_message(data):
        return f"wire format, schema id {wire.unframe(data).schema_id}"
    return "unknown"


def print_counts(console: Console, contents: Contents, title: str) -> None:
    """Print the counts as a table, and one example for each reject reason."""
    n_alerts = sum(n for kind, n in contents.kinds.items() if kind[-1] == READABLE)
    size = f"{contents.n_packets} packets, {contents.n_bytes / 1e6:.1f} MB"
    console.print(f"{title}: {n_alerts} readable alerts in {size}", style="bold")
    if contents.mjd:
        first, last = map(_date, contents.mjd)
        bands = ", ".join(f"{band} {n}" for band, n in sorted(contents.bands.items()))
        console.print(f"exposed {first} to {last} (MJD {contents.mjd[0]:.5f} to {contents.mjd[1]:.5f}); bands {bands}")
    rows = [(*kind, str(n)) for kind, n in sorted(contents.kinds.items(), key=lambda item: (-item[1], item[0]))]
    _print_table(console, ("survey", "schema", "framing", "outcome", "count"), rows)
    for reason, reject in contents.examples.items():
        console.print(f"{reason}, for example {printable(f'{reject.packet.position}: {reject.detail}')}")


def print_alert(console: Console, alerts: AlertBatch, *, every_field: bool) -> None:
    """Print the batch's first alert: its identity, its metadata and its cutouts."""
    alert = alerts.identity(0)
    packet = alerts.packets[alerts.packet_index[0]]
    survey = Survey(int(alerts.survey[0]))
    console.print(
        f"\nfirst alert: {survey} {alert.alert_id} of object {printable(alert.object_id or '?')}", style="bold"
    )
    schema = alerts.records[0].schema
    scale = "start of exposure, UTC" if survey is Survey.ZTF else "middle of exposure, TAI"
    facts = [
        ("from", str(packet.position)),
        ("packet", f"{len(packet.data)} bytes, {framing(packet.data)}"),
        ("schema", f"{schema.canonical['name']} {alert.schema_version}, fingerprint {schema.fingerprint}"),
        ("time", f"{_date(float(alerts.mjd[0]))}, MJD {alert.mjd:.6f} ({scale})"),
        ("position", f"ra {alert.ra:.6f} deg, dec {alert.dec:+.6f} deg"),
        ("band", alert.band or "?"),
        ("light curve", _light_curve(alerts)),
    ]
    if alerts.designation and (designation := alerts.designation[0]):
        facts.append(("known object", f"{designation}, {alerts.column('ssdistnr')[0]:.3g} arcsec away"))
    _print_table(console, (), [(key, printable(value)) for key, value in facts])
    fields = [
        (column.name, f"{value:.0f}" if value.is_integer() else f"{value:.6g}", column.unit, column.meaning)
        for column in COLUMNS
        if np.isfinite(value := float(alerts.column(column.name)[0])) and (every_field or column.name in MAIN_FIELDS)
    ]
    _print_table(console, ("field", "value", "unit", "meaning"), fields)
    _print_cutouts(console, alerts, "DN" if survey is Survey.ZTF else "nJy")


def _light_curve(alerts: AlertBatch) -> str:
    """Describe the light curve of the first alert in one line."""
    curves = alerts.light_curves
    mine = slice(int(curves.offsets[0]), int(curves.offsets[1]))
    if mine.start == mine.stop:
        return "none"
    kinds = Counter(KINDS[kind] for kind in curves.kind[mine].tolist())
    bands = Counter("?" if band == UNKNOWN_BAND else BANDS[band] for band in curves.band[mine].tolist())
    points = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    in_bands = ", ".join(f"{n} {band}" for band, n in bands.items())
    return f"{points} ({in_bands}) over {np.ptp(curves.mjd[mine]):.1f} days"


def _print_cutouts(console: Console, alerts: AlertBatch, unit: str) -> None:
    rows, images = [], []
    for name, pixels in zip(CUTOUTS, alerts.stamps(0), strict=True):
        image = pixels.astype(np.float64)  # in float32, differences of large pixels would overflow
        finite = image[np.isfinite(image)]
        range_ = "  ".join(f"{value:.5g}" for value in (finite.min(), np.median(finite), finite.max()))
        rows.append((name, f"{image.shape[0]} x {image.shape[1]} px", range_, unit, f"{image.size - finite.size}"))
        images.append(image)
    _print_table(console, ("cutout", "size", "minimum, median, maximum", "unit", "not finite"), rows)
    if console.is_terminal and console.color_system:
        console.print(picture(images))


def picture(images: Sequence[NDArray[np.float64]]) -> Text:
    """Draw images side by side in grey levels, oriented as the stamps; a line of text holds two rows of pixels."""
    shades = np.concatenate([np.pad(_shades(image), ((0, 0), (0, 2))) for image in images], axis=1)
    text = Text()
    for upper, lower in zip(shades[0::2], shades[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", f"rgb({above},{above},{above}) on rgb({below},{below},{below})")
        text.append("\n")
    return text


def _shades(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return an image as grey levels, uint8[PICTURE_SIZE, PICTURE_SIZE], top row first (FITS: bottom row first)."""
    rows, columns = (np.linspace(0, n - 1, PICTURE_SIZE).round().astype(int) for n in image.shape)
    low, high = np.nanpercentile(np.where(np.isfinite(image), image, np.nan), (1, 99.5))
    scaled = (image[np.ix_(rows, columns)] - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.asarray(255 * np.clip(np.nan_to_num(scaled), 0, 1), np.uint8)[::-1]


def _print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header, box=None, pad_edge=False, show_header=bool(header), header_style="dim")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _date(mjd: float) -> str:
    """Return a date to the second; "?" for a year beyond the calendar, which a damaged packet may hold."""
    try:
        return f"{MJD_EPOCH + timedelta(days=mjd):%Y-%m-%d %H:%M:%S}"
    except OverflowError:
        return "?"
