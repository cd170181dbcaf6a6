"""`map` draws the embeddings of archived packets, coloured by their anomaly scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from broker_filter.cli import main
from broker_filter.pictures.embedding_map import draw_map


def test_map_without_umap_names_the_extra_to_install(
    reference: Path, night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(["map", str(night), "--reference", str(reference), "--out", str(tmp_path / "map.png")]) == 2
    assert "pip install 'broker-filter[explore]'" in capsys.readouterr().err


def test_map_labels_the_most_anomalous_alerts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    place, score = rng.standard_normal((300, 2)).astype(np.float32), rng.gamma(2, 1, 300).astype(np.float32)
    draw_map(tmp_path / "map.png", "A night", place, score, [f"ZTF26a{i}" for i in range(300)])
    image = imread(tmp_path / "map.png")
    assert image.shape[:2] == (1100, 1430)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 500  # colours of many scores


def test_map_of_a_night_is_drawn(reference: Path, night: Path, embedding_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="maps need the extra `explore`")
    out = tmp_path / "map.png"
    arguments = ["--reference", str(reference), "--model", str(embedding_bundle), "--out", str(out)]
    assert main(["map", str(night), *arguments]) == 0
    assert imread(out).shape[:2] == (1100, 1430)
