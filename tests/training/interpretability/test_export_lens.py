"""A lens is what the torch network computes, states what the study found, and is written as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.lens import Lens
from broker_filter.scoring.lens_files import open_files
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from broker_filter.simulate import simulate_night
from training.__main__ import main
from training.errors import LensError
from training.interpretability.export_lens import figures, read_features, worth_of, write_lens
from training.interpretability.runs.rows import FEATURES, MEASURES, open_run

N = 12
MEASURED: dict[str, Any] = {"worth": {"says": "10 of 96 features are stable.", "figures": {"l0": 3.0}}}
TABLE = "id,name,note,stable_in,seeds,family,enriched\n2,rising,a note,3,5,few,SN\n3,,,1,5,few,\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first layer, whose queries are all points (the lens that ships is of the last layer)."""
    folder = tmp_path_factory.mktemp("night")
    for alert in simulate_night(N, seed=7):
        (folder / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    out = folder.parent / "run"
    assert (
        main(["sae", "collect", "embedder", "light_curve.0", str(folder), "--simulated", "8", "--out", str(out)]) == 0
    )
    assert main(["sae", "train", str(out), "--seeds", "1", "--steps", "60", "--batch", "128"]) == 0
    (out / FEATURES).write_text(TABLE)
    (out / MEASURES).write_text(json.dumps(MEASURED))
    return out


def test_lens_of_a_run_computes_what_its_network_computes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens"
    assert main(["sae", "export", str(run), "--out", str(out), "--name", "mine", "--worth", "It is a test."]) == 0
    opened, files = open_run(run), open_files(out)
    lens, alerts = Lens(files, opened.part), opened.part.test_vector()
    inputs = prepare(alerts, opened.part.card.inputs)
    seen = lens.see(inputs)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        attention = opened.site.attend(tensors)
        changed = attention.z + 0.1
        _, _, modalities = opened.site.splice(tensors, changed)
    queries = attention.queries.numpy()
    np.testing.assert_array_equal(seen.queries, queries)
    np.testing.assert_array_equal(seen.sources, attention.sources.numpy())
    np.testing.assert_allclose(seen.z[queries], attention.z.numpy()[queries], atol=1e-5)
    one = {name: array[1:2] for name, array in inputs.items()}
    np.testing.assert_allclose(lens._moved(changed[1:2].numpy(), one), modalities[1:2, 1], atol=1e-5)
    found = lens.explain(alerts, Survey.LSST, lambda _, v: 2.0 + v[:, 0])
    errors = [explanation.pre_activation_error for explanation in found if explanation.features]
    assert errors
    assert all(error is not None and error < 1e-5 for error in errors)

    card = lens.card
    assert (card.site, card.modality, card.effect_on) == ("light_curve.0", "light_curve", "anomaly_score")
    assert (card.worth, card.measures) == ("It is a test. 10 of 96 features are stable.", {"l0": 3.0})
    assert {str(survey): ordinary.source for survey, ordinary in card.ordinary.items()} == {
        "ztf": "simulated",
        "lsst": "simulated",
    }
    assert all(0 < ordinary.alerts <= 8 for ordinary in card.ordinary.values())
    assert (files.names[2].name, files.names[2].stable) == ("rising", True)
    assert (files.names[3].name, files.names[3].stable) == (None, False)
    assert main(["sae", "export", str(run), "--out", str(out), "--name", "mine"]) == 1  # exists already


def test_bundle_without_attention_is_refused(tmp_path: Path) -> None:
    part = open_bundle("default").part("ztf")
    nothing = np.zeros((1, 1), np.float32)
    empty = SparseDictionary(nothing, nothing[0], nothing, nothing[0], nothing[0])
    with pytest.raises(LensError, match="has no attention layer"):
        write_lens(
            tmp_path / "lens", part, "light_curve.1", empty, {}, [],
            name="none", version="1", split="none", worth="Nothing.", measures={},
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_worth_without_a_study_says_so(tmp_path: Path) -> None:
    assert worth_of({}, None) == "The features of this lens were not studied."
    assert figures({}) == {}
    assert read_features(tmp_path / FEATURES) == []


def test_half_written_run_and_malformed_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "alerts").mkdir()
    with pytest.raises(LensError, match=r"incomplete: it has no run\.yaml yet"):
        open_run(tmp_path)
    (tmp_path / FEATURES).write_text("id,name\n1,x\n")
    with pytest.raises(LensError, match="not a table of features"):
        read_features(tmp_path / FEATURES)
