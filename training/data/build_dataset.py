"""`build-dataset`: builds a data set for training from archives and packets, and a table of labels.

It decodes as the service does and keeps pixels as published; preprocessing happens in training. It also reads the
published training set of BTSbot (`training.data.btsbot`), whose labels and splits it keeps. A build may be killed at
any time: the same command with the same inputs resumes after the last complete shard. Apart from ids, and the metadata
of BTSbot's set, no more than one shard is in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pyarrow import parquet

from broker_filter.cli.options import add_registry_option
from broker_filter.cli.parser import UsageError
from broker_filter.console import progress
from broker_filter.packets.batch import PLANES, AlertBatch, LightCurves, Plane, Survey
from broker_filter.packets.decode import DEFAULT_CUTOUT_SIZE, Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.surveys import DEFAULT_COLUMNS, DESIGNATION
from broker_filter.scoring.bundle import MAX_CUTOUT_SIZE, POINT_COLUMNS
from broker_filter.scoring.labels import UNLABELLED, Labels, parse_rule, read_labels
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import FIELDS, Expression, compile_filter
from training.arguments import add_labelled_alerts, seed
from training.atomic_write import write_whole
from training.data import btsbot
from training.data.datasets import (
    CARD,
    INDEX,
    LIGHT_CURVES,
    PUBLISHED_SPLIT,
    SHARDS,
    SPLITS,
    Dataset,
    DatasetCard,
    SplitRule,
    open_shard,
    sha256_of,
    sources_by_class,
)
from training.errors import DatasetError

PACKETS_AT_ONCE = 256
PACKETS = b"packets"
"""Key in a shard's schema metadata. Its value is the number of packets, or rows of a published set, read up to the end
of the shard, where an interrupted build resumes."""
ALERTS_PER_SHARD = 1024
"""Alerts per shard (49 MB of ZTF cutouts), so that a night gives few files and a killed build repeats little work."""
REQUEST = "build.yaml"
"""File with the arguments with which a directory was started; a build resumes only with the same arguments."""
SHOWN = 5
"""Number of ids named in an error message."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `build-dataset`."""
    add_labelled_alerts(
        parser,
        "a class: the values NAME=VALUE,... or the numbers NAME=LOW..HIGH (above LOW, up to HIGH) of the column; "
        "repeat for each class. Rows of no class are skipped. With two classes, the second is the scored one (default: "
        "each value is a class)",
        labels_required=False,
    )
    parser.add_argument(
        "--btsbot",
        metavar="VERSION",
        help="INPUT is a folder with the published training set of BTSbot, in the files "
        "{train,val,test}_triplets_VERSION.npy and {train,val,test}_cand_VERSION.csv, for example v11_N100. Its labels "
        "and splits are kept, so of the other options only --out applies",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the data set")
    parser.add_argument(
        "--cutout-size",
        type=_pixels,
        default=DEFAULT_CUTOUT_SIZE,
        metavar="PX",
        help="cutout size in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        choices=PLANES,
        default=[],
        help="images to keep besides the cutouts, for networks with the normalisation snr (variance) or a PSF input",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the split by source (default: %(default)s)")
    parser.add_argument(
        "--shares",
        type=_share,
        nargs=2,
        default=(PUBLISHED_SPLIT.validation, PUBLISHED_SPLIT.test),
        metavar=("VALIDATION", "TEST"),
        help="fractions of the sources for validation and test; the rest is for training (default: 0.09 0.1)",
    )
    add_registry_option(parser)
    parser.add_argument(
        "--allow-unmatched", action="store_true", help="allow labels of alerts or objects that are not in the inputs"
    )
    parser.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="keep only alerts for which this filter (as in the service) is true; implies "
        '--allow-unmatched. BTSbot\'s published cuts: \'isdiffpos and band in ("g", "r") and (sgscore1 >= 0 or '
        "sgscore2 >= 0)'",
    )


def _pixels(text: str) -> int:
    """Parse a cutout size in pixels."""
    if not 0 < (size := int(text)) <= MAX_CUTOUT_SIZE:
        raise argparse.ArgumentTypeError(f"{size} is not from 1 to {MAX_CUTOUT_SIZE}")
    return size


def _share(text: str) -> float:
    """Parse a fraction of the sources, between 0 and 0.5."""
    if not 0 < (share := float(text)) < 0.5:
        raise argparse.ArgumentTypeError(f"{share} is not between 0 and 0.5")
    return share


def run(arguments: argparse.Namespace) -> None:
    """Build the data set, or resume building it, and print its counts.

    Raises UsageError if options contradict each other, and as `build_dataset` and `build_published` do.
    """
    dataset = _of_packets(arguments) if arguments.btsbot is None else _published(arguments)
    for name, counts in dataset.card.counts.items():
        print(name, *(f"{split} {n:,}" for split, n in counts.items()), sep="  ")
    print(f"{dataset.directory}: data set {dataset.card.sha256[:12]}, {len(dataset.alert_id):,} alerts")


def _published(arguments: argparse.Namespace) -> Dataset:
    unused = {
        "--labels": arguments.labels,
        "--class": arguments.classes,
        "--planes": arguments.planes,
        "--where": arguments.where,
        "--schema-registry": arguments.schema_registry,
    }
    if given := [option for option, value in unused.items() if value]:
        raise UsageError(f"{', '.join(given)} cannot be combined with --btsbot: the published set is used as it is")
    if len(arguments.inputs) != 1:
        raise UsageError(f"--btsbot takes one folder, not {len(arguments.inputs)} inputs")
    return build_published(arguments.inputs[0], arguments.btsbot, arguments.out)


def _of_packets(arguments: argparse.Namespace) -> Dataset:
    if arguments.labels is None:
        raise UsageError("--labels is needed for packets: name a table of labels")
    labels = read_labels(arguments.labels, arguments.label, [parse_rule(text) for text in arguments.classes])
    return build_dataset(
        arguments.inputs,
        labels,
        arguments.out,
        cutout_size=arguments.cutout_size,
        planes=[plane for plane in PLANES if plane in arguments.planes],
        split=SplitRule(validation=arguments.shares[0], test=arguments.shares[1], seed=arguments.seed),
        schema_registry=arguments.schema_registry,
        allow_unmatched=arguments.allow_unmatched,
        where=arguments.where,
    )


def build_dataset(
    inputs: Sequence[Path],
    labels: Labels,
    out: Path,
    *,
    cutout_size: int = DEFAULT_CUTOUT_SIZE,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    planes: Sequence[Plane] = (),
    split: SplitRule = PUBLISHED_SPLIT,
    schema_registry: str | None = None,
    allow_unmatched: bool = False,
    where: str | None = None,
) -> Dataset:
    """Build the data set `out` from every labelled alert of `inputs`, each alert id once; resume if it was started.

    `where`: a filter over the fields of alerts (`streaming.expressions`). Only alerts for which it is true are kept,
    and labels of other alerts are ignored, as with `allow_unmatched`.

    Raises DatasetError if no alert was read or none passes the filter; if labels match no alert (some may, with
    `allow_unmatched`); if a class has too few sources to split; if a shard is damaged; or if `out` was started with
    other arguments. Raises ExpressionError if the filter is invalid.
    """
    chosen = None if where is None else compile_filter(where, FIELDS, ())
    wanted = tuple(dict.fromkeys((*columns, *(chosen.columns if chosen else ()))))
    columns = tuple(name for name in wanted if name != DESIGNATION.name)  # a data set holds numbers
    request = {
        "inputs": [str(path.resolve()) for path in inputs],
        "labels": {"sha256": labels.sha256, "column": labels.column, "classes": [str(rule) for rule in labels.rules]},
        "cutout_size": cutout_size,
        "columns": list(columns),
        "split": split.model_dump(),
        **({"planes": list(planes)} if planes else {}),
        **({"where": where} if where is not None else {}),
    }
    _begin(out, request)
    if not (out / CARD).exists():
        decoder = Decoder(open_registry(schema_registry), cutout_size=cutout_size, columns=wanted, planes=planes)
        _write_shards(out / SHARDS, inputs, decoder, labels, chosen)
        files, ids = _read_ids(out)
        label, side = _label_and_split(ids, labels, split, allow_unmatched=allow_unmatched or where is not None)
        described = {
            "cutout_size": cutout_size,
            "columns": columns,
            **({"planes": list(planes)} if planes else {}),
            "classes": labels.classes,
            "labels": f"{labels.column} of {labels.table.name}, by {labels.key}: {'; '.join(map(str, labels.rules))}",
            **({"where": where} if where is not None else {}),
            "split": split.model_dump(),
        }
        _finish(out, files, ids, label, side, described)
    return Dataset.open(out)


def build_published(folder: Path, version: str, out: Path) -> Dataset:
    """Build the data set `out` from a version of BTSbot's published set in `folder`; resume if it was started.

    Raises DatasetError as `btsbot.open_published` and `PublishedSplit.cutouts` do, if a split has no alert of a class,
    or if `out` was started with other arguments.
    """
    _begin(out, {"btsbot": version, "inputs": [str(folder.resolve())]})
    if not (out / CARD).exists():
        splits = btsbot.open_published(folder, version)
        _check_splits(splits)
        _write_published(out / SHARDS, splits)
        label = np.concatenate([part.label for part in splits])
        split = np.repeat([SPLITS.index(part.split) for part in splits], [len(part) for part in splits])
        described = {
            "cutout_size": btsbot.SIZE,
            "columns": btsbot.COLUMNS,
            "classes": btsbot.CLASSES,
            "labels": f"{btsbot.TARGET} of the training set {version} of BTSbot",
            "normalised": "l2_image",
            "split": None,
        }
        _finish(out, *_read_ids(out), label, split, described)
    return Dataset.open(out)


def write_dataset(
    out: Path,
    batches: Iterable[tuple[AlertBatch, NDArray[np.int64]]],
    split: Callable[[NDArray[np.str_], NDArray[np.int64]], NDArray[np.int64]],
    classes: Sequence[str],
    labels: str,
) -> Dataset:
    """Write the data set `out` of decoded, labelled alerts, each alert id once; an interrupted call leaves no `out`.

    `batches`: alerts with equal columns, planes and sizes of cutouts, and their labels int64[N]: indices into
    `classes`, or UNLABELLED for alerts that are left out. `split`: from the objects [N]
    and the labels int64[N] of all alerts to their splits int64[N], indices into SPLITS. `labels`: the source of the
    labels, for the card.

    Raises DatasetError if there is no alert.
    """
    partial_out = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(partial_out, ignore_errors=True)
    (partial_out / SHARDS).mkdir(parents=True)
    files: list[Path] = []
    parts: list[dict[str, Any]] = []
    label: list[NDArray[np.int64]] = []
    seen: set[int] = set()
    described: dict[str, Any] = {"classes": tuple(classes), "labels": labels, "split": None}

    def write_parts() -> None:
        files.append(_write_shard(partial_out / SHARDS / f"{len(files):05}.arrow", parts, 0))
        parts.clear()

    for alerts, of_alerts in batches:
        ids = alerts.alert_id.tolist()
        rows = []
        for row in np.flatnonzero(of_alerts != UNLABELLED).tolist():
            if ids[row] not in seen:
                seen.add(ids[row])
                rows.append(row)
        if rows:
            parts.append(_columns(alerts, source_names(alerts), rows))
            label.append(of_alerts[rows])
            planes = [plane for plane in PLANES if plane in parts[-1]]
            described |= {"cutout_size": alerts.cutouts.shape[-1], "columns": alerts.columns, "planes": planes}
        if sum(len(part["alert_id"]) for part in parts) >= ALERTS_PER_SHARD:
            write_parts()
    if parts:
        write_parts()
    if not files:
        raise DatasetError(f"{out}: no alert was read from the inputs: give files or archives of alerts")
    files, columns = _read_ids(partial_out)
    object_id = np.concatenate([part["object_id"] for part in columns]).astype(np.str_)
    labelled = np.concatenate(label)
    _finish(partial_out, files, columns, labelled, split(object_id, labelled), described)
    partial_out.rename(out)
    return Dataset.open(out)


def assign_splits(
    object_id: NDArray[np.str_], label: NDArray[np.int64], classes: Sequence[str], rule: SplitRule
) -> NDArray[np.int64]:
    """Return the split of each of N alerts, int64[N], an index into SPLITS.

    All alerts of an object are in one split, and every class is in each split. The result does not depend on the order
    of the alerts. Raises DatasetError if a class has fewer sources than there are splits.
    """
    side_of: dict[str, int] = {}
    for name, sources in zip(classes, sources_by_class(object_id, label, len(classes), rule.seed), strict=True):
        n = len(sources)
        if n < len(SPLITS):
            raise DatasetError(
                f"class {name} has {n} source{'s' * (n != 1)}, but each of {', '.join(SPLITS)} needs one: "
                "add alerts of this class, or omit it by naming the other classes with --class"
            )
        n_test = max(1, round(rule.test * n))
        n_validation = min(max(1, round(rule.validation * n)), n - n_test - 1)  # keep at least one source for training
        sides = np.repeat(range(len(SPLITS)), (n - n_validation - n_test, n_validation, n_test))
        side_of.update(zip(sources.tolist(), sides.tolist(), strict=True))
    return np.array([side_of[name] for name in object_id.tolist()])


def _begin(out: Path, request: dict[str, Any]) -> None:
    """Create the directory, or check that it was started with the same request."""
    path = out / REQUEST
    if path.exists() and any((out / SHARDS).iterdir()):  # before the first shard there is nothing to resume
        if yaml.safe_load(path.read_bytes()) != request:
            raise DatasetError(
                f"{out}: was started with other arguments, see {path}: choose another directory, or remove it"
            )
        return
    if out.exists() and not path.exists() and any(out.iterdir()):
        raise DatasetError(f"{out}: is not empty, and was not written by build-dataset: choose another directory")
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(request, sort_keys=False).encode())


def _without_first(n: int, batches: Iterator[Sequence[Packet]]) -> Iterator[Sequence[Packet]]:
    """Yield the batches without the first `n` packets."""
    for batch in batches:
        if n < len(batch):
            yield batch[n:]
        n = max(0, n - len(batch))


def _write_shards(
    directory: Path, inputs: Sequence[Path], decoder: Decoder, labels: Labels, chosen: Expression | None
) -> None:
    """Write the labelled alerts of `inputs` for which `chosen` is true as shards, without alerts of earlier shards.

    Raises DatasetError if there is no such alert.
    """
    written = sorted(directory.glob("*.arrow"))
    seen = {alert for file in written for alert in open_shard(file)["alert_id"].tolist()}
    n_packets = _packets_up_to(written[-1]) if written else 0
    batches = _without_first(n_packets, read_packets(inputs, wanted=decoder.fields).batches(PACKETS_AT_ONCE))
    parts: list[dict[str, Any]] = []
    n_alerts = n_decoded = n_chosen = 0
    left_out: Counter[str] = Counter()
    with progress("Decoding", unit="packets") as advance:
        for alerts, rejects in decoder.decode_batches(batches):
            n_packets += len(alerts.packets)
            left_out.update(str(reject.reason) for reject in rejects)
            rows = chosen.holds(alerts, {}) if chosen else np.ones(len(alerts), np.bool_)
            n_decoded, n_chosen = n_decoded + len(alerts), n_chosen + int(rows.sum())
            parts.append(_labelled(alerts, rows, labels, seen))
            n_alerts += len(parts[-1]["alert_id"])
            if n_alerts >= ALERTS_PER_SHARD:
                written.append(_write_shard(directory / f"{len(written):05}.arrow", parts, n_packets))
                parts, n_alerts = [], 0
            advance(len(alerts.packets))
    if n_alerts:
        written.append(_write_shard(directory / f"{len(written):05}.arrow", parts, n_packets))
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in left_out.most_common())
    if left_out:
        log.warning("%s inputs that could not be decoded are skipped: %s", f"{left_out.total():,}", reasons)
    if chosen:
        log.info("%s of %s decoded alerts do not pass --where", f"{n_decoded - n_chosen:,}", f"{n_decoded:,}")
    if written:
        return
    names = ", ".join(map(str, inputs))
    if not n_packets:
        raise DatasetError(f"{names}: no alert was read: the inputs hold no packets")
    if not n_decoded:
        raise DatasetError(f"{names}: no alert was read: none of {n_packets:,} inputs could be decoded ({reasons})")
    if chosen and not n_chosen:
        raise DatasetError(f"{names}: none of the {n_decoded:,} alerts passes --where {chosen.text!r}")
    raise DatasetError(
        f"{labels.table}: none of its {len(labels.label_of)} labels matches an alert of the inputs by {labels.key}"
    )


def _check_splits(splits: Sequence[btsbot.PublishedSplit]) -> None:
    """Warn about sources in several splits. Raises DatasetError if a split has no alert of a class."""
    for part in splits:
        for i, name in enumerate(btsbot.CLASSES):
            if i not in part.label:
                raise DatasetError(f"{part.file}: the split {part.split} has no alert with the label {i} ({name})")
    split_of = Counter(name for part in splits for name in set(part.object_id.tolist()))
    if several := [name for name, n in split_of.items() if n > 1]:
        log.warning(
            "%d objects are in more than one split as published, for example %s: the figures on the test split are "
            "then too good",
            len(several),
            ", ".join(several[:SHOWN]),
        )


def _write_published(directory: Path, splits: Sequence[btsbot.PublishedSplit]) -> None:
    """Write the alerts of all splits as shards, without those of earlier shards."""
    written = sorted(directory.glob("*.arrow"))
    done = _packets_up_to(written[-1]) if written else 0
    n_rows = 0
    exact = all(part.alert_id is not None for part in splits)
    if not exact:
        log.warning("the tables have no exact %s: alerts are numbered by their row instead", btsbot.ALERT)
    with progress("Reading", sum(map(len, splits)), "alerts") as advance:
        for part, rows in btsbot.rows_of(splits, ALERTS_PER_SHARD):
            first, n_rows = n_rows, n_rows + rows.stop - rows.start
            advance(n_rows - first)
            if n_rows <= done:
                continue
            cutouts, box = part.cutouts(rows)
            alert_id = part.alert_id[rows] if exact and part.alert_id is not None else np.arange(first, n_rows)
            columns = {
                "alert_id": alert_id,
                "object_id": part.object_id[rows],
                "survey": np.full(len(alert_id), Survey.ZTF, np.uint8),
                "cutouts": cutouts,
                "cutout_box": box,
                "metadata": part.metadata[rows],
            }
            written.append(_write_shard(directory / f"{len(written):05}.arrow", [columns], n_rows))


def _labelled(alerts: AlertBatch, chosen: NDArray[np.bool_], labels: Labels, seen: set[int]) -> dict[str, Any]:
    """Return the columns of a shard, by name, for the alerts that belong in it.

    An alert belongs in it if it is `chosen` bool[N], has a label, and was not `seen` before.
    """
    names = source_names(alerts)
    rows = []
    for row, (alert, name) in enumerate(zip(alerts.alert_id.tolist(), names.tolist(), strict=True)):
        if chosen[row] and alert not in seen and labels.key_of(alert, name) in labels.label_of:
            seen.add(alert)
            rows.append(row)
    return _columns(alerts, names, rows)


def source_names(alerts: AlertBatch) -> NDArray[np.str_]:
    """Return the object id of each of N alerts, [N]; an alert without an object is a source of its own."""
    ids = zip(alerts.alert_id.tolist(), alerts.object_id, strict=True)
    return np.array([name or f"alert {alert}" for alert, name in ids], np.str_)


def _columns(alerts: AlertBatch, names: NDArray[np.str_], rows: list[int]) -> dict[str, Any]:
    """Return the columns of a shard, by name, for the alerts in `rows`. `names` [N]: the sources of all alerts."""
    return {
        "alert_id": alerts.alert_id[rows],
        "object_id": names[rows],
        "survey": alerts.survey[rows],
        "cutouts": alerts.cutouts[rows],
        "cutout_box": alerts.cutout_box[rows],
        "metadata": alerts.metadata[rows],
        "mjd": alerts.mjd[rows],
        LIGHT_CURVES: alerts.light_curves[np.array(rows, np.int64)],
        **{plane: slots[rows] for plane in PLANES if (slots := getattr(alerts, plane)) is not None},
    }


def _write_shard(file: Path, parts: Sequence[dict[str, Any]], n_packets: int) -> Path:
    """Write an Arrow file with one record batch and the number of packets read up to its end."""
    columns: dict[str, pa.Array] = {}
    for name in parts[0]:
        if name == LIGHT_CURVES:
            columns[name] = _points(LightCurves.join([part[name] for part in parts]))
            continue
        array = np.concatenate([part[name] for part in parts])
        columns[name] = pa.array(array) if array.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    batch = pa.record_batch(columns).replace_schema_metadata({PACKETS: str(n_packets)})

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write(batch)

    write_whole(file, write)
    return file


def _points(light_curves: LightCurves) -> pa.ListArray:
    """Return the light curves of N alerts as an Arrow list of points, one list per alert."""
    columns = [pa.array(getattr(light_curves, name)) for name in POINT_COLUMNS]
    points = pa.StructArray.from_arrays(columns, names=list(POINT_COLUMNS))
    return pa.ListArray.from_arrays(pa.array(light_curves.offsets, pa.int32()), points)


def _packets_up_to(shard: Path) -> int:
    return int(pa.ipc.open_file(pa.memory_map(str(shard))).schema.metadata[PACKETS])


def _read_ids(out: Path) -> tuple[list[Path], list[dict[str, NDArray[Any]]]]:
    """Return the shards of a data set in order, and the ids and surveys of their alerts."""
    files = sorted((out / SHARDS).glob("*.arrow"))
    return files, [
        {name: arrays[name] for name in ("alert_id", "object_id", "survey")} for arrays in map(open_shard, files)
    ]


def _label_and_split(
    ids: Sequence[dict[str, NDArray[Any]]], labels: Labels, rule: SplitRule, *, allow_unmatched: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels and the splits of the alerts in the shards, int64[N] each.

    Raises DatasetError if labels match no alert (some may, with `allow_unmatched`), or as `assign_splits` does.
    """
    alert_id, object_id = (np.concatenate([part[name] for part in ids]) for name in ("alert_id", "object_id"))
    object_id = object_id.astype(np.str_)
    keys = [labels.key_of(alert, name) for alert, name in zip(alert_id.tolist(), object_id.tolist(), strict=True)]
    if not allow_unmatched and (unmatched := sorted(labels.label_of.keys() - set(keys))):
        raise DatasetError(
            f"{labels.table}: {len(unmatched)} labels have no alert among the inputs, for example "
            f"{labels.key} {', '.join(unmatched[:SHOWN])}: add their alerts, or pass --allow-unmatched"
        )
    label = np.array([labels.label_of[key] for key in keys])
    return label, assign_splits(object_id, label, labels.classes, rule)


def _finish(
    out: Path,
    files: Sequence[Path],
    ids: Sequence[dict[str, NDArray[Any]]],
    label: NDArray[np.int64],
    split: NDArray[np.int64],
    described: dict[str, Any],
) -> None:
    """Write the index (labels, splits) and the card. `described`: those keys of the card that the shards do not say."""
    alert_id, object_id, survey = (np.concatenate([part[name] for part in ids]) for name in ids[0])
    object_id = object_id.astype(np.str_)
    index = pa.table({"alert_id": alert_id, "object_id": object_id, "label": label, "split": split})
    write_whole(out / INDEX, partial(parquet.write_table, index))
    content: dict[str, Any] = {
        "surveys": [str(Survey(code)) for code in np.unique(survey).tolist()],
        **described,
        "counts": {
            name: {side: int(((label == i) & (split == j)).sum()) for j, side in enumerate(SPLITS)}
            for i, name in enumerate(described["classes"])
        },
        "shards": [
            {
                "file": file.name,
                "alerts": len(part["alert_id"]),
                "bytes": file.stat().st_size,
                "sha256": sha256_of(*open_shard(file).values()),
            }
            for file, part in zip(files, ids, strict=True)
        ],
        "index_sha256": sha256_of(alert_id, object_id, label, split),
    }
    version = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    card = DatasetCard(**content, sha256=version)
    write_whole(out / CARD, yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False).encode())
