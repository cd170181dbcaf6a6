"""Output records of the service, made from simulated packets without running a model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import fastavro

from broker_filter.packets.framing import wire
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.schemas.writer_schema import WriterSchema, writer_schema
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.encoding import OutputSchema, annotated_schema, scored_alert_schema

HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\u202e&amp;{{token}}"
"""Text of a packet that would be seen, or would run, if the page did not escape it."""
FIRST_ID = 3_000_000_000_000_000_000
"""Above 2^53, as the ids of both surveys are."""
SURVEYS: tuple[Literal["ztf"], Literal["lsst"]] = ("ztf", "lsst")


def annotation(k: int, text: str = "") -> dict[str, Any]:
    """Return the annotation of alert `k`: the scores are known, and every seventh alert is flagged."""
    flagged = k % 7 == 0
    reason = {
        "neighbours": [{"alert_id": FIRST_ID + k + 1, "object_id": text or "ZTF18abcdefg", "distance": 0.1}],
        "modalities": {"image": 0.5 + k % 3, "light_curve": 1.5},
        "most_unlike": text or "light_curve",
        "features": [],
        "lenses": [],
    }
    return {
        "service_version": text or "0.1.0",
        "scored_at": 1_772_000_000_000 + k,
        "duplicate": False,
        "anomaly": {
            "score": 0.5 + (k * 37 % 100) / 20,
            "flag": flagged,
            "model": "embedder",
            "threshold": 4.0,
            "reason": reason if flagged else None,
        },
        "models": [
            {"model": "default", "version": "3.1", "outputs": {"real": (k * 13 % 100) / 100}, "embedding": None},
            {
                "model": "classes",
                "version": "1.0",
                "outputs": {"SN": (k * 29 % 100) / 100, text or "AGN": 0.25},
                "embedding": [0.0] * 4,
            },
        ],
        "filters": [
            {"name": "young-supernova", "revision": "0123456789ab", "passed": k % 5 == 0},
            {"name": "fast-mover", "revision": "ba9876543210", "passed": k % 3 == 0},
        ],
        "configuration": "c0ffee",
    }


@cache
def _simulated(n: int, survey: Literal["ztf", "lsst"]) -> list[tuple[dict[str, Any], WriterSchema]]:
    found = []
    for alert in simulate_night(n, seed=5, survey=survey):
        if survey == "ztf":
            reader = fastavro.reader(io.BytesIO(alert.packet))
            found.append((next(reader), writer_schema(reader.writer_schema)))
        else:
            message = wire.unframe(alert.packet)
            schema = open_registry(SCHEMAS).get(message.schema_id)
            parsed = fastavro.parse_schema(schema.definition)
            found.append((fastavro.schemaless_reader(io.BytesIO(message.body), parsed, None), schema))
    return found


def _container(schema: OutputSchema, record: dict[str, Any]) -> bytes:
    import json

    file = io.BytesIO()
    fastavro.writer(file, json.loads(schema.text), [record])
    return file.getvalue()


@cache
def _output_schema(schema: WriterSchema, cutouts: bool) -> OutputSchema:
    return annotated_schema(schema, cutouts)


def records(
    n: int,
    *,
    payload: Literal["full", "no_cutouts", "scores"] = "full",
    distinct: int = 6,
    text: str = "",
    first: int = 0,
) -> Iterator[bytes]:
    """Yield `n` output records, alternately of ZTF and LSST, with the ids FIRST_ID + `first` and following.

    `distinct`: the number of simulated packets of each survey that are used in turn. `text`: replaces names in the
    records.
    """
    for k in range(first, first + n):
        survey = SURVEYS[k % 2]
        packet, schema = _simulated(distinct, survey)[k // 2 % distinct]
        record, alert_id = dict(packet), FIRST_ID + k
        if survey == "ztf":
            record |= {"candid": alert_id, "objectId": text or f"ZTF26aa{_letters(k)}"}
            record["candidate"] = packet["candidate"] | {"candid": alert_id, "jd": packet["candidate"]["jd"] + k * 1e-4}
        else:
            record["diaSourceId"] = alert_id
            time = packet["diaSource"]["midpointMjdTai"] + k * 1e-4
            record["diaSource"] = packet["diaSource"] | {"diaSourceId": alert_id, "midpointMjdTai": time}
        if payload == "scores":
            identity = {
                "alert_id": alert_id,
                "object_id": text or f"object {k}",
                "survey": survey,
                "schema_version": "1",
            }
            place = {"mjd": 61096.0 + k * 1e-4, "ra": 10.0, "dec": -5.0, "band": "g"}
            yield _container(scored_alert_schema(), {**identity, **place, "broker_filter": annotation(k, text)})
        else:
            yield _container(
                _output_schema(schema, payload == "full"), {**record, "broker_filter": annotation(k, text)}
            )


def _letters(k: int) -> str:
    return "".join(chr(ord("a") + k // 26**place % 26) for place in range(4, -1, -1))
