"""Everything that a page shows of one alert, decoded from its packet when a person looks at it."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, CUTOUTS, UNKNOWN_BAND, AlertBatch, Measurement, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.writer_schema import BySchema
from broker_filter.packets.surveys import COLUMNS
from broker_filter.pictures.png import MASKED, masked_png, masked_shades, shades_png
from broker_filter.streaming.annotations import read_annotation
from broker_filter.streaming.encoding import ContainerFraming, OutputSchema
from broker_filter.watch.links import links
from broker_filter.watch.store import Alert, AlertStore, Content

CUTOUT_SIZE = 128
"""Cutout size in pixels, so that stamps are shown whole: LSST's stamps have up to 102 px."""
REMEMBERED = 128
"""Decoded alerts that are kept, because a page asks for the pictures of an alert one by one: at most 25 MB."""
GAP, GAP_SHADE = 2, 110
"""Width in pixels, and shade, of the lines between the cutouts of a strip."""
STRIP_SIZE = 63
"""Height of a strip in pixels: the size of ZTF's cutouts."""
KINDS = {Measurement.DETECTION: "detection", Measurement.UPPER_LIMIT: "limit", Measurement.FORCED: "forced"}


class Details:
    """Decodes single alerts of a store, and remembers the last ones. Thread-safe."""

    def __init__(self, store: AlertStore) -> None:
        self._store = store
        self._decoder = Decoder(cutout_size=CUTOUT_SIZE, require_cutouts=False)
        self._framing = ContainerFraming()
        self._schema = BySchema(lambda schema: OutputSchema.of(schema.definition))
        self._decoded: OrderedDict[int, AlertBatch | None] = OrderedDict()  # by the number of the alert
        self._lock = Lock()

    def describe(self, alert_id: int) -> dict[str, Any] | None:
        """Return what the page shows of an alert, as JSON can hold it; None if the store does not have the alert."""
        found = self._store.get(alert_id)
        if found is None:
            return None
        alert, content = found
        batch = self._decode(alert, content)
        facts = alert.facts
        pages = links(facts.survey, facts.object_id, facts.ra, facts.dec)
        annotation = read_annotation(content.body, content.schema) if content.schema else json.loads(content.body)
        return {
            "id": str(facts.alert_id),
            "number": alert.number,
            "object": facts.object_id,
            "survey": facts.survey,
            "schema": facts.schema_version,
            "mjd": facts.mjd,
            "time_scale": "start of exposure, UTC" if facts.survey == str(Survey.ZTF) else "middle of exposure, TAI",
            "ra": facts.ra,
            "dec": facts.dec,
            "band": facts.band,
            "magnitude": facts.magnitude,
            "cutouts": [name for k, name in enumerate(CUTOUTS) if batch is not None and batch.cutout_box[0, k, 2] > 0],
            "light_curve": [] if batch is None else _points(batch),
            "columns": [] if batch is None else _columns(batch),
            "links": [{"name": name, "url": url} for name, url in pages],
            "annotation": _with_text_ids(annotation),
        }

    def picture(self, alert_id: int, cutout: str) -> bytes | None:
        """Return the PNG of a cutout of an alert; None if it has none."""
        if cutout not in CUTOUTS or (batch := self._of(alert_id)) is None:
            return None
        pixels = batch.stamps(0)[CUTOUTS.index(cutout)]
        return masked_png(pixels) if pixels.size else None

    def strip(self, alert_id: int) -> bytes | None:
        """Return one PNG with the three cutouts side by side, each with its own stretch; None if there is none."""
        batch = self._of(alert_id)
        if batch is None or not batch.cutout_box[0, :, 2].any():
            return None
        return shades_png(strip(batch.stamps(0)))

    def _of(self, alert_id: int) -> AlertBatch | None:
        found = self._store.get(alert_id)
        return None if found is None else self._decode(*found)

    def _decode(self, alert: Alert, content: Content) -> AlertBatch | None:
        """Return the alert as a batch of one; None for a record of `payload: scores`, which has no packet."""
        if content.schema is None:
            return None
        with self._lock:
            if alert.number in self._decoded:
                self._decoded.move_to_end(alert.number)
                return self._decoded[alert.number]
        packet = self._framing.frame(self._schema(content.schema), [content.body], "")
        alerts, _ = self._decoder.decode([Packet(packet)])
        batch = alerts if len(alerts) else None
        with self._lock:
            self._decoded[alert.number] = batch
            if len(self._decoded) > REMEMBERED:
                self._decoded.popitem(last=False)
        return batch


def strip(cutouts: Sequence[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """Return cutouts float32[H, W] as shades, side by side in squares of STRIP_SIZE, each with its own stretch.

    A cutout of another size is drawn with larger or fewer pixels, so that its longer side fills the square.
    """
    width = len(cutouts) * (STRIP_SIZE + GAP) - GAP
    shades = np.full((STRIP_SIZE, width), MASKED, np.uint8)
    for k in range(1, len(cutouts)):
        shades[:, k * (STRIP_SIZE + GAP) - GAP : k * (STRIP_SIZE + GAP)] = GAP_SHADE
    for k, pixels in enumerate(cutouts):
        if not pixels.size:
            continue
        longest = max(pixels.shape)
        sides = [max(1, round(STRIP_SIZE * side / longest)) for side in pixels.shape]
        rows, columns = (
            np.linspace(0, n - 1, side).round().astype(int) for n, side in zip(pixels.shape, sides, strict=True)
        )
        top, left = (STRIP_SIZE - sides[0]) // 2, (STRIP_SIZE - sides[1]) // 2 + k * (STRIP_SIZE + GAP)
        shades[top : top + sides[0], left : left + sides[1]] = masked_shades(pixels)[np.ix_(rows, columns)]
    return shades


def _points(batch: AlertBatch) -> list[dict[str, Any]]:
    """Return the points of the light curve: time (MJD), band, difference flux and 1-sigma uncertainty (nJy), kind."""
    curves = batch.light_curves
    columns = (curves.mjd, curves.band, curves.flux, curves.flux_err, curves.kind)
    return [
        {
            "mjd": mjd,
            "band": "?" if band == UNKNOWN_BAND else BANDS[band],
            "flux": flux if math.isfinite(flux) else None,
            "error": error if math.isfinite(error) else None,
            "kind": KINDS[Measurement(kind)],
        }
        for mjd, band, flux, error, kind in zip(*(column.tolist() for column in columns), strict=True)
        if math.isfinite(mjd)
    ]


def _columns(batch: AlertBatch) -> list[dict[str, Any]]:
    return [
        {"name": column.name, "value": value, "unit": column.unit, "meaning": column.meaning}
        for column in COLUMNS
        if math.isfinite(value := float(batch.column(column.name)[0]))
    ]


def _with_text_ids(value: Any) -> Any:
    """Return a value with alert ids as texts: numbers of JavaScript round ids above 2^53."""
    if isinstance(value, Mapping):
        return {key: str(item) if key == "alert_id" else _with_text_ids(item) for key, item in value.items()}
    return [_with_text_ids(item) for item in value] if isinstance(value, list) else value
