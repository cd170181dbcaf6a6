"""Runs: activations of a site, split by object, and the dictionaries of every seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import CONFIGURATION, read_dictionary
from broker_filter.simulate import simulate_night
from training.__main__ import main
from training.errors import LensError
from training.interpretability.runs.collect import SIMULATED, split_by_object
from training.interpretability.runs.quantities import COLUMNS
from training.interpretability.runs.rows import DICTIONARIES, ROWS, RUN_CARD, TEST, TRAIN, open_run

REAL, OF_A_SURVEY = 30, 10


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packets that stand for real ones, and a table of labels for two thirds of them."""
    folder = tmp_path_factory.mktemp("night")
    lines = ["candid,weak_class"]
    for number, alert in enumerate(simulate_night(REAL, seed=7)):
        (folder / f"{alert.alert_id}.avro").write_bytes(alert.packet)
        if number % 3:
            lines.append(f"{alert.alert_id},{('VS', 'SN')[number % 2]}")
    (folder.parent / "labels.csv").write_text("\n".join(lines))
    return folder


def collect(night: Path, out: Path, site: str = "light_curve.0", *options: str) -> list[str]:
    labels = ["--labels", str(night.parent / "labels.csv"), "--simulated", str(OF_A_SURVEY)]
    return ["sae", "collect", "embedder", site, str(night), *labels, "--out", str(out), *options]


@pytest.fixture(scope="module")
def run(night: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "points"
    assert main(collect(night, out)) == 0
    return out


def test_a_run_holds_one_row_for_each_existing_token(run: Path) -> None:
    opened = open_run(run)
    rows, site = opened.rows, opened.site
    assert opened.card.site == site.name == "light_curve.0"
    assert len(opened.alerts.alert_id) == len(rows.is_real) == REAL + 2 * OF_A_SURVEY
    assert set(COLUMNS) <= set(opened.alerts.card.columns)
    alerts = opened.alerts.read(np.arange(len(rows.is_real)))
    prepared = {name: torch.from_numpy(array) for name, array in prepare(alerts.raw, opened.part.card.inputs).items()}
    with torch.inference_mode():
        attention = site.attend(prepared)
    expected = 1 + prepared["light_curve_mask"].sum(1).numpy()  # the learnt token, and every point
    np.testing.assert_array_equal(np.bincount(rows.alert), expected)
    np.testing.assert_allclose(rows.z, attention.z.numpy()[rows.alert, rows.query], atol=1e-5)


def test_real_alerts_are_split_by_object_and_simulated_ones_are_for_training(run: Path) -> None:
    opened = open_run(run)
    rows, alerts = opened.rows, opened.alerts
    classes = np.array(alerts.card.classes)
    assert {"SN", "VS", "unlabelled"} <= set(classes.tolist())
    simulated = np.char.startswith(classes[alerts.label], SIMULATED)
    np.testing.assert_array_equal(rows.is_real, ~simulated)
    assert rows.is_real.sum() == REAL
    assert (rows.split[simulated] == TRAIN).all()
    held = rows.split == TEST
    assert 0.3 < held[rows.is_real].mean() < 0.7
    assert not set(alerts.object_id[held]) & set(alerts.object_id[~held])
    np.testing.assert_array_equal(rows.split, alerts.split)
    assert len(rows.training) == (~held[rows.alert]).sum()


def test_every_class_of_real_objects_is_held_out_in_part() -> None:
    draws = np.random.default_rng(1)
    object_id = np.array([f"object {n}" for n in draws.integers(0, 300, 1000)])
    label = draws.choice(3, 1000, p=[0.04, 0.76, 0.2])
    simulated = np.array([False, False, True])
    split = split_by_object(object_id, label, simulated)
    held = split == TEST
    assert not set(object_id[held]) & set(object_id[~held])
    assert 0.2 < held[label == 0].mean() < 0.8
    assert set(split.tolist()) == {TRAIN, TEST}


def test_another_site_takes_the_alerts_of_a_run(run: Path, tmp_path: Path) -> None:
    arguments = ["sae", "collect", "embedder", "light_curve.1", "--alerts", str(run / "alerts")]
    assert main([*arguments, "--out", str(tmp_path / "token")]) == 0
    other = open_run(tmp_path / "token")
    assert other.alerts.directory == (run / "alerts").resolve()
    assert other.rows.alert.tolist() == list(range(REAL + 2 * OF_A_SURVEY)), "one row, the token, of every alert"
    assert not (tmp_path / "token" / "alerts").exists()


def test_at_most_so_many_rows_of_an_alert_are_kept(run: Path, tmp_path: Path) -> None:
    arguments = ["sae", "collect", "embedder", "light_curve.0", "--alerts", str(run / "alerts"), "--most-rows", "3"]
    assert main([*arguments, "--out", str(tmp_path / "few")]) == 0
    few, all_rows = open_run(tmp_path / "few").rows, open_run(run).rows
    np.testing.assert_array_equal(np.bincount(few.alert), np.minimum(np.bincount(all_rows.alert), 3))
    everything = {(a, q): z for a, q, z in zip(all_rows.alert, all_rows.query, all_rows.z, strict=True)}
    assert all((everything[a, q] == z).all() for a, q, z in zip(few.alert, few.query, few.z, strict=True))


def test_training_a_run_writes_a_dictionary_for_each_seed_and_goes_on(
    night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(collect(night, out)) == 0
    with pytest.raises(LensError, match="has no dictionary yet"):
        _ = open_run(out).dictionaries
    arguments = ["sae", "train", str(out), "--steps", "30", "--batch", "64", "--active", "3"]
    assert main([*arguments, "--seeds", "2"]) == 0
    opened = open_run(out)
    assert opened.card.seeds == (1, 2)
    assert opened.card.recipe is not None
    assert [each.w_enc.shape for each in opened.dictionaries] == [(48, 96)] * 2
    first = opened.dictionaries[0].w_dec
    assert (first != opened.dictionaries[1].w_dec).any()
    _, card = read_dictionary(out / DICTIONARIES / "1")
    assert card.metadata.split.startswith("trained on")
    assert not list((out / DICTIONARIES).glob("*.ckpt"))

    written = [(out / DICTIONARIES / seed / CONFIGURATION).stat().st_mtime_ns for seed in "12"]
    assert main([*arguments, "--seeds", "3"]) == 0
    assert open_run(out).card.seeds == (1, 2, 3)
    assert [(out / DICTIONARIES / seed / CONFIGURATION).stat().st_mtime_ns for seed in "12"] == written
    np.testing.assert_array_equal(open_run(out).dictionaries[0].w_dec, first)
    assert main([*arguments, "--features", "50"]) == 1
    assert "has dictionaries of another recipe" in capsys.readouterr().err


def test_a_run_that_cannot_be_used_is_an_error_in_a_sentence(
    run: Path, night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "not a run: there is no run.yaml" in error("sae", "train", str(tmp_path))
    (tmp_path / "half" / "alerts").mkdir(parents=True)
    assert "incomplete: it has no run.yaml yet" in error("sae", "train", str(tmp_path / "half"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.safetensors").touch()  # with --alerts, a run has no alerts of its own
    assert "incomplete: it has no run.yaml yet" in error("sae", "study", str(tmp_path / "rows"))
    assert "holds a run already" in error(*collect(night, run))
    assert "has no site 'light_curve.9'" in error(*collect(night, tmp_path / "x", "light_curve.9"))
    no_attention = ["sae", "collect", "default", "light_curve.0", str(night), "--out", str(tmp_path / "x")]
    assert "has no attention layer" in error(*no_attention)
    nothing = ["sae", "collect", "embedder", "light_curve.0", "--out", str(tmp_path / "nothing"), "--simulated", "1"]
    assert "no INPUT: no alert of ztf or lsst could be decoded" in error(*nothing)


def test_a_damaged_run_or_another_network_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    card = yaml.safe_load((run / RUN_CARD).read_bytes()) | {"alerts": str(run / "alerts")}

    def write(**changes: object) -> None:
        (copy / RUN_CARD).write_text(yaml.safe_dump(card | changes))

    rows = load_file(run / ROWS)
    save_file(rows | {"z": rows["z"] + 1}, copy / ROWS)
    write()
    with pytest.raises(LensError, match="its sha256 is not the one in"):
        _ = open_run(copy).rows
    save_file({"z": rows["z"]}, copy / ROWS)
    with pytest.raises(LensError, match="cannot be read as rows"):
        _ = open_run(copy).rows
    write(weights_sha256="0" * 64)
    with pytest.raises(LensError, match="with other weights than those of embedder now"):
        _ = open_run(copy).network
    write(dataset_sha256="0" * 64)
    with pytest.raises(LensError, match="not the data set that"):
        _ = open_run(copy).alerts
    write(heads=0)
    with pytest.raises(LensError, match="heads: Input should be greater than 0"):
        open_run(copy)
    (copy / RUN_CARD).write_text("a: [1")
    with pytest.raises(LensError, match="not YAML"):
        open_run(copy)
