"""Reference sets are written and read back unchanged, and refused if they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file

from broker_filter.anomalies.reference import (
    CARD,
    Reference,
    ReferenceSetError,
    SurveyReference,
    check_made_with,
    make_reference,
    read_card,
    read_reference,
)
from broker_filter.anomalies.score import Cloud
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import WEIGHTS, Bundle, open_bundle

from .conftest import MODALITIES, bundle_with, bundle_with_modalities


@pytest.fixture
def file(reference: Reference, tmp_path: Path) -> Path:
    reference.write(tmp_path / "ordinary.safetensors")
    return tmp_path / "ordinary.safetensors"


def test_a_reference_is_read_back_unchanged(reference: Reference, file: Path) -> None:
    again = read_reference(file)
    assert again.card == reference.card == read_card(file)
    assert list(again.surveys) == [Survey.ZTF, Survey.LSST]
    for survey, written in reference.surveys.items():
        read = again.surveys[survey]
        for name in ("embedding", "alert_id", "object_id", "survey"):
            np.testing.assert_array_equal(getattr(read.alerts, name), getattr(written.alerts, name))
        for name in ("scores", "usual", "apart", "label"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_reference_of_another_bundle_is_refused(reference: Reference, file: Path, bundle: Bundle) -> None:
    check_made_with(file, reference.card, [bundle])
    card = bundle.parts[0].card
    others = {
        "not among the configured models": bundle_with(card.model_copy(update={"name": "other"})),
        r"default another\b": bundle_with(card.model_copy(update={"version": "another"})),
        "000000000000": bundle_with(card.model_copy(update={"files": card.files | {WEIGHTS: "0" * 64}})),
        "build the reference again": open_bundle("default"),  # without modalities
    }
    for message, other in others.items():
        with pytest.raises(ReferenceSetError, match=message):
            check_made_with(file, reference.card, [other])


def test_damage_is_found(file: Path) -> None:
    arrays, metadata = load_file(file), {CARD: read_card(file).model_dump_json()}
    damaged = {
        "sha256 of its arrays is not the one in its card": arrays | {"lsst.embedding": arrays["lsst.embedding"] * 2},
        "its card requires": arrays | {"ztf.alert_id": arrays["ztf.alert_id"][:-1]},
        "build the reference again": {"ztf.embedding": arrays["ztf.embedding"]},
    }
    for message, some in damaged.items():
        save_file(some, file, metadata=metadata)
        with pytest.raises(ReferenceSetError, match=message):
            read_reference(file)
    narrow = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch_save_file(narrow | {"ztf.embedding": narrow["ztf.embedding"].bfloat16()}, file, metadata=metadata)
    with pytest.raises(ReferenceSetError, match="BF16"):  # numpy has no such dtype
        read_reference(file)
    save_file(arrays, file, metadata={CARD: '{"format": 1}'})
    with pytest.raises(ReferenceSetError, match=r"another version of broker-filter in format 1.*; build the"):
        read_reference(file)
    save_file(arrays, file)
    with pytest.raises(ReferenceSetError, match="not a reference set"):
        read_reference(file)
    file.write_bytes(b"nonsense" * 10)
    with pytest.raises(ReferenceSetError, match="not a safetensors file"):
        read_reference(file)
    with pytest.raises(ReferenceSetError, match="No such file"):
        read_reference(file.with_name("absent"))


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "embedding": lambda values: np.where(np.arange(len(values))[:, None] == 5, np.float32(np.nan), values),
        "scores": lambda values: values[::-1].copy(),
        "usual": lambda values: values * np.float32(0),
        "apart": lambda values: -values,
        "label": lambda values: values + 1,
    }.items(),
)
def test_arrays_that_would_flag_nothing_are_refused(
    reference: Reference, file: Path, name: str, change: Callable[[NDArray[np.generic]], NDArray[np.generic]]
) -> None:
    """A single NaN in the reference would make every score NaN, so that no alert would ever be flagged."""
    part = reference.surveys[Survey.LSST]
    if name == "embedding":
        changed = replace(part, alerts=replace(part.alerts, embedding=change(part.alerts.embedding)))
    else:
        changed = replace(part, **{name: change(getattr(part, name))})
    rewrite(reference, changed, file)
    with pytest.raises(ReferenceSetError, match=f"ordinary.safetensors: survey lsst: .*{name}.*; build the reference"):
        read_reference(file)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_reference_of_one_alert_is_refused(reference: Reference, file: Path, kept: int) -> None:
    """One alert has no spread, and one score gives no threshold."""
    part = reference.surveys[Survey.LSST]
    one = replace(part, alerts=part.alerts[np.arange(1)], label=part.label[:1])
    rewrite(reference, one if kept else replace(part, scores=part.scores[:1]), file)
    with pytest.raises(ReferenceSetError, match="build the reference again"):
        read_reference(file)


def test_identical_alerts_are_refused(part: SurveyReference) -> None:
    same = np.repeat(part.alerts.embedding[:1], 50, axis=0)
    with pytest.raises(ReferenceSetError, match="have the same embedding"):
        Cloud(same, len(MODALITIES), "mahalanobis", part.label)


def rewrite(reference: Reference, lsst: SurveyReference, file: Path) -> None:
    """Write the reference with changed arrays of a survey, and with their sha256 in the card."""
    card = reference.card
    made = make_reference(
        bundle_with_modalities(card.modalities),
        card.where,
        {**reference.surveys, Survey.LSST: lsst},
        {Survey[name.upper()]: counts for name, counts in card.surveys.items()},
        card.measure,
        card.classes,
    )
    made.write(file)
