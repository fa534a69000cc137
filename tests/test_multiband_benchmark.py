# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The benchmark of bands that are restored together: its scenes, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsst.coadd.deepprior.band_scenes import BandScene, BandSceneConfig
from lsst.coadd.deepprior.truth import SceneConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import multiband
import multiband_score

CONFIG = BandSceneConfig(
    SceneConfig(seed=3, n_cells=(2, 3), cell_shape=(80, 70), psf_size=21), {"g": 2, "r": 4}, n_single=2
)


def test_bands_show_one_sky() -> None:
    scenes = {band: BandScene(CONFIG, band) for band in CONFIG.n_visits}
    g, r = (scene.catalogue(band) for band, scene in scenes.items())
    both = ~g["only"], ~r["only"]
    np.testing.assert_array_equal(g["x"][both[0]], r["x"][both[1]])
    colour = np.asarray(g["mag"][both[0]]) - np.asarray(r["mag"][both[1]])
    assert 0.4 < np.median(colour) < 0.8
    assert 0.2 < colour.std() < 0.5
    galaxies = g["type"][both[0]] == "galaxy"
    growth = g["hlr"][both[0]][galaxies] / r["hlr"][both[1]][galaxies]
    assert 1.0 < np.median(growth) < 1.1
    np.testing.assert_allclose(g["flux_nJy"], 10.0 ** ((31.4 - np.asarray(g["mag"])) / 2.5))
    assert scenes["g"].config.n_visits == 2


def test_single_band_sources() -> None:
    scene = BandScene(CONFIG, "g")
    own = scene.catalogue("g")
    own = own[own["only"]]
    assert len(own) == 2
    assert ((own["mag"] > 20.5) & (own["mag"] < 23.0)).all()
    singles = scene.singles()
    positions = np.stack([singles["x"], singles["y"]], axis=1)
    distance = np.hypot(*(positions[:, None] - positions).transpose(2, 0, 1))
    assert distance[~np.eye(len(singles), dtype=bool)].min() > 20.0
    box = scene.patch.outer_bbox
    assert (singles["y"] > box.y.min + 20).all()
    assert (singles["x"] < box.x.max - 20).all()
    # Without them the noise is the same, but for that of their own photons.
    without = BandScene(CONFIG, "g", with_singles=False)
    assert not without.catalogue("g")["only"].any()
    change = scene.warp(0, "g").image - without.warp(0, "g").image
    far = np.ones(change.shape, dtype=bool)
    rows, columns = np.indices(change.shape)
    for row in own:
        x, y = row["x"] - box.x.start, row["y"] - box.y.start
        far &= np.hypot(columns - x, rows - y) > 60.0
    assert far.any()
    np.testing.assert_allclose(np.nan_to_num(change[far]), 0.0, atol=0.2)


def test_wrong_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="n_visits must give a visit or more"):
        BandSceneConfig(SceneConfig(), {"g": 0})
    with pytest.raises(ValueError, match="n_visits must give a visit or more"):
        BandSceneConfig(SceneConfig(), {"w": 3})
    with pytest.raises(ValueError, match="has no band 'i'; choose from g, r"):
        BandScene(CONFIG, "i")
    crowded = BandSceneConfig(CONFIG.scene, {"g": 2}, n_single=100)
    with pytest.raises(ValueError, match="room for 6 single-band sources, not for 100"):
        BandScene(crowded, "g").singles()


def row(completeness: float) -> dict[str, Any]:
    score = {"completeness": 0.5, "ssim": 0.9, "psnr": 37.0}
    leaks = [
        {"from": "r", "to": "g", "mag": 22.0, "leak": 0.01, "significance": 1.5, "blend": False},
        {"from": "g", "to": "r", "mag": 22.0, "leak": -0.002, "significance": -3.0, "blend": True},
    ]
    return {
        "seconds": [4.0, 6.0],
        "methods": ["pretrained network"],
        "single": {"g": score, "r": score},
        "joint": {"g": score | {"completeness": completeness}, "r": score},
        "colours": {"g - r": [[1.02, 1.01], [1.0, 0.99], [0.98, 1.0]]},
        "leaks": leaks,
    }


def test_report_says_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiband, "CACHE", tmp_path)
    empty = multiband.report()
    assert empty.count("not run") == 2 * len(multiband_score.FAMILIES)
    for n, completeness in enumerate((0.7, 0.6)):
        path = multiband.row_path("two", multiband.FIRST_SEED + n, "pretrained")
        path.write_text(json.dumps(row(completeness)))
    text = multiband.report()
    assert text.count("not run") == empty.count("not run") - 1
    assert "| g | completeness at 95 % purity | 0.500 | 0.650 | +0.150 (+0.100) |" in text
    assert (
        "| g: completeness at 95 % purity above that alone | +0.150, lower in 0 of 2 scenes | yes |" in text
    )
    assert "| g: SSIM above that alone | +0.0000, lower in 0 of 2 scenes | **no** |" in text
    assert "| g - r: bias within 1 % | +0.00 % | yes |" in text
    assert "| every leak of a single-band source within 0.5 % | 2 of 4 above | **no** |" in text
    assert "| their mean within 0.5 % | +0.400 ± 0.300 % | yes |" in text
    assert "| g - r | 6 | alone | +0.00 ±" in text
    assert "| alone within 1.5 arcsec | 2 | +1.000 ± 0.000 % | +1.000 % | +1.00 % | 2 | 0 |" in text
    assert "| all | 4 | +0.400 ± 0.300 % |" in text


def test_plan() -> None:
    jobs = multiband.plan(["three"], 2)
    assert jobs == [("three", seed, start) for start in ("pretrained", "scratch") for seed in (400, 401)]
