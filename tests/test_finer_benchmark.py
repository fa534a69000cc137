# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The benchmark of finer pixels: its scenes, how it judges, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table
from toy import gaussian_stars

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import finer_pixels
import finer_score


def test_scene_of_pairs_is_seeded() -> None:
    family = finer_score.FAMILIES["pairs"]
    truth, warps, glow = finer_score.make_scene(family, 3)
    again, others, _ = finer_score.make_scene(family, 3)
    assert glow is None
    assert len(warps) == family.config.n_visits
    np.testing.assert_array_equal(truth["x"], again["x"])
    np.testing.assert_array_equal(warps[2].image, others[2].image)
    pairs = truth[truth["pair_id"] >= 0]
    assert len(pairs) == 24
    for number in set(pairs["pair_id"]):
        one, other = pairs[pairs["pair_id"] == number]
        assert 0.2 * np.hypot(one["x"] - other["x"], one["y"] - other["y"]) == pytest.approx(0.35)


def pair_image(oversampling: int, separation: float, sigma: float) -> tuple[np.ndarray, Table]:
    """Draw a pair, around tract pixel (1020.2, 520.4), on pixels that many times finer."""
    k = oversampling
    half = 0.5 * separation / finer_score.PIXEL
    truth = Table({"x": [520.4 - half, 520.4 + half], "y": [1020.2, 1020.2], "mag": [22.5, 22.5]})
    truth["pair_id"] = 0
    stars = [
        (k * (x - 500) + 0.5 * (k - 1), k * (y - 1000) + 0.5 * (k - 1), 900.0)
        for x, y in zip(truth["x"], truth["y"], strict=True)
    ]
    return gaussian_stars((40 * k, 44 * k), stars, k * sigma), truth


def test_pairs_are_judged_by_what_the_image_shows() -> None:
    for k in (1, 2, 3):
        for separation, sigma, expected in ((0.9, 0.85, 1), (0.35, 0.85, 0)):
            image, truth = pair_image(k, separation, sigma)
            assert finer_score.score_pairs(image, truth, (1000, 500), k) == {"22.5": [expected, 1]}
    image, truth = pair_image(2, 0.35, 0.5)
    assert finer_score.score_pairs(image, truth, (1000, 500), 2) == {"22.5": [1, 1]}
    truth["x"] += 2.0
    assert finer_score.score_pairs(image, truth, (1000, 500), 2) == {"22.5": [0, 1]}


def test_catalogue_is_judged_in_pixels_of_the_visits() -> None:
    _, truth = pair_image(2, 0.35, 0.5)
    truth["flux_nJy"] = [900.0, 900.0]
    sources = Table({name: 2.0 * truth[name] + 0.5 for name in ("x", "y")})
    sources["flux"], sources["flux_err"] = [880.0, 938.0], [3.0, 4.0]
    score = finer_score.score_catalogue(sources, truth, 2)
    assert score["split"] == {"22.5": [1, 1]}
    assert score["fluxes"] == [("pair", pytest.approx(1.01), pytest.approx(5.0 / 1800.0))]
    assert finer_score.score_catalogue(sources[:1], truth, 2)["split"] == {"22.5": [0, 1]}


def test_pattern_and_rebinned_image() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(0.0, 1.0, (90, 120))
    image[1::3, ::3] += 2.0
    where = np.ones(image.shape, dtype=bool)
    assert finer_score.pattern(image, where, 3) == pytest.approx(2.0 * np.sqrt(8.0) / 9.0, rel=0.1)
    where[:, :60] = False
    image[:, :60] = np.nan
    assert np.isfinite(finer_score.pattern(image, where, 3))
    # A well-sampled star on both grids: sums of fine pixels are the mean of the normal image over pixels.
    normal = gaussian_stars((41, 37), [(18.3, 20.6, 1000.0)], 1.2)
    fine = gaussian_stars((82, 74), [(2 * 18.3 + 0.5, 2 * 20.6 + 0.5, 1000.0)], 2.4)
    binned = fine.reshape(41, 2, 37, 2).sum(axis=(1, 3))
    np.testing.assert_allclose(finer_score.over_pixels(normal, 2), binned, atol=2e-3 * normal.max())
    np.testing.assert_allclose(finer_score.interpolated(normal, 2), fine, atol=1e-2 * fine.max())


def test_report_says_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finer_pixels, "CACHE", tmp_path)
    empty = finer_pixels.report()
    assert empty.count("not run") == 2 * len(finer_score.FAMILIES)
    row: dict[str, Any] = {"method": "pretrained network", "target": 0.4, "seconds": 12.0}
    row |= {"image_split": {"22.5": [1, 3]}, "split": {"22.5": [2, 3]}}
    row["fluxes"] = [("single", 1.002, 0.01), ("pair", 0.9, 0.01), ("pair", 2.0, 0.5)]
    scene = {
        "1": row,
        "2": row | {"pattern_draw": 0.004},
        "interpolated 2": {"image_split": {"22.5": [0, 3]}},
    }
    finer_pixels.row_path("pairs", finer_pixels.FIRST_SEED, "pretrained").write_text(json.dumps(scene))
    text = finer_pixels.report()
    assert text.count("not run") == empty.count("not run") - 1
    assert "| pixels of 1/2 | image | - | - | 1/3 | - |" in text
    assert "| normal pixels, interpolated to 1/2 | image | - | - | 0/3 | - |" in text
    assert "+0.20" in text
    assert "-10.00" in text
    assert "0.40%" in text
