"""Lenses: the shipped one explains alerts of its bundle, and a lens that cannot be trusted is refused in a sentence."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import Part, open_bundle
from broker_filter.scoring.explanation import Verdict
from broker_filter.scoring.lens import MAX_FEATURES, Lens, find_network
from broker_filter.scoring.lens_files import (
    FEATURES,
    FROM_Z,
    LENS_CARD,
    LensError,
    NoLensError,
    open_files,
    shipped_lenses,
)
from broker_filter.scoring.preprocess import prepare


@pytest.fixture(scope="module")
def part() -> Part:
    return find_network(open_files("embedder"), [open_bundle("embedder")])[1]


@pytest.fixture(scope="module")
def lens(part: Part) -> Lens:
    return Lens(open_files("embedder"), part)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shipped lens that a test may spoil."""
    return Path(shutil.copytree(open_files("embedder").directory, tmp_path / "lens"))


def length(_: int, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return a number above 0 that depends on the moved vector alone."""
    return 2.0 + vectors[:, 0].astype(np.float64)


def test_lens_ships_with_its_measured_worth(lens: Lens) -> None:
    assert "embedder" in shipped_lenses()
    assert lens.surveys == (Survey.ZTF, Survey.LSST)
    assert lens.card.worth
    size = sum(path.stat().st_size for path in open_files("embedder").directory.iterdir())
    assert size < 2**20


def test_attention_pattern_times_values_is_z(lens: Lens, part: Part) -> None:
    seen = lens.see(prepare(part.test_vector(), part.card.inputs))
    found = np.einsum("nhqp,nhpc->nqhc", seen.pattern, seen.values).reshape(seen.z.shape)
    np.testing.assert_allclose(found[seen.queries], seen.z[seen.queries], atol=1e-5)
    np.testing.assert_allclose(seen.pattern.sum(axis=3).transpose(0, 2, 1)[seen.queries], 1, atol=1e-5)


def test_alerts_are_explained_by_few_features_of_their_own_points(lens: Lens, part: Part) -> None:
    """Of the test alerts, the third has no light curve."""
    alerts = part.test_vector()
    assert alerts.light_curves is not None
    explanations = lens.explain(alerts, Survey.LSST, None)
    assert explanations[2].verdict is Verdict.NO_SOURCES
    assert explanations[2].features == ()
    others = [explanations[i] for i in (0, 1, 3)]
    assert all(one.features and len(one.features) <= MAX_FEATURES for one in others)
    for i, explanation in ((0, explanations[0]), (1, explanations[1]), (3, explanations[3])):
        own = slice(int(alerts.light_curves.offsets[i]), int(alerts.light_curves.offsets[i + 1]))
        times = {None, *alerts.light_curves.mjd[own].tolist()}
        assert explanation.pre_activation_error is not None
        assert explanation.pre_activation_error < 1e-5
        for feature in explanation.features:
            assert {source.mjd for source in feature.sources} <= times
            assert sum(abs(source.share) for source in feature.sources) == pytest.approx(1, abs=1e-5)
            assert len(feature.heads) == lens.card.heads
            assert feature.effect is None


def test_effect_is_what_an_ablation_with_the_error_term_changes(lens: Lens, part: Part) -> None:
    """The same ablation, made by hand for the strongest feature."""
    alerts = part.test_vector()
    [explanation] = lens.explain(alerts[1:2], Survey.ZTF, length)
    assert [one.effect for one in explanation.features] == sorted(
        (one.effect or 0 for one in explanation.features), reverse=True
    )
    dictionary = open_files("embedder").dictionary
    inputs = prepare(alerts[1:2], part.card.inputs)
    seen = lens.see(inputs)
    for feature in explanation.features:
        if feature.activation:
            pre = dictionary.pre_activations(seen.z[0])[:, feature.id]
            active = np.where(pre > dictionary.threshold[feature.id], pre, 0)
            ablated = seen.z - active[None, :, None] * dictionary.w_dec[feature.id]
            before, after = length(0, lens._moved(np.concatenate([seen.z, ablated]), inputs))
            assert feature.effect == pytest.approx(1 - after / before, abs=1e-6)


def test_explanations_do_not_depend_on_the_batch(lens: Lens, part: Part) -> None:
    alerts = part.test_vector()
    together = lens.explain(alerts, Survey.ZTF, length)
    alone = [lens.explain(alerts[i : i + 1], Survey.ZTF, length)[0] for i in range(4)]
    for one, other in zip(together, alone, strict=True):
        assert [feature.id for feature in one.features] == [feature.id for feature in other.features]
        assert one.unexplained == pytest.approx(other.unexplained, abs=1e-5)


def test_no_lens_and_half_a_lens_are_told_apart(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(NoLensError, match=r"not a lens: there is no lens.yaml in it.*\(embedder"):
        open_files(tmp_path / "none")
    (copied / LENS_CARD).unlink()
    with pytest.raises(LensError, match=r"half-written: it has cfg\.json, but no lens\.yaml"):
        open_files(copied)


@pytest.mark.parametrize("name", [FROM_Z, FEATURES])
def test_altered_or_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    with pytest.raises(LensError, match=f"{name}: corrupted"):
        open_files(copied)
    (copied / name).unlink()
    with pytest.raises(LensError, match=f"{name}: missing"):
        open_files(copied)


def spoil(directory: Path, **values: object) -> None:
    card = yaml.safe_load((directory / LENS_CARD).read_text())
    (directory / LENS_CARD).write_text(yaml.safe_dump(card | values))


def test_lens_of_other_weights_or_another_bundle_is_refused(copied: Path) -> None:
    with pytest.raises(LensError, match=r"a lens on the bundle embedder, which is not among the models \(default\)"):
        find_network(open_files(copied), [open_bundle("default")])
    card = yaml.safe_load((copied / LENS_CARD).read_text())
    spoil(copied, bundle=card["bundle"] | {"weights_sha256": "0" * 64})
    with pytest.raises(LensError, match=r"cfg\.json: of another network or layer than lens\.yaml"):
        open_files(copied)
    configuration = (copied / "cfg.json").read_text().replace(card["bundle"]["weights_sha256"], "0" * 64)
    (copied / "cfg.json").write_text(configuration)
    sha256 = hashlib.sha256(configuration.encode()).hexdigest()
    spoil(copied, files=card["files"] | {"cfg.json": sha256})
    with pytest.raises(LensError, match=r"a lens on other weights of embedder \(1\.\d, weights 000000000000\)"):
        find_network(open_files(copied), [open_bundle("embedder")])


def test_card_with_unknown_key_is_refused(copied: Path) -> None:
    spoil(copied, colour="red")
    with pytest.raises(LensError, match=r"lens\.yaml: colour: Extra inputs"):
        open_files(copied)
