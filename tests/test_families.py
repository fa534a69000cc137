# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lsst.coadd.deepprior.families import FAMILIES, HELD_OUT, family_scene, training_scene
from lsst.coadd.deepprior.simulate import Scene

PLANES = ["BAD", "SAT", "CR", "NO_DATA"]


def test_standard_family() -> None:
    config = family_scene("standard", 7)
    assert config.seed == 7
    assert tuple(Scene(config).patch.outer_bbox.shape) == (256, 256)
    assert (config.n_visits, config.depth, config.pixel_scale) == (12, 24.5, 0.2)
    assert (config.seeing, config.pair_separation) == ((0.55, 1.1), (0.5, 0.9))
    assert (config.n_trails, config.n_bad_columns) == (2, 1)
    assert config.cosmic_ray_density > 0.0
    assert config.n_unmasked_cosmic_rays == 0
    assert config.noise_correlation == "none"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("few_visits_1", {"n_visits"}),
        ("few_visits_2", {"n_visits"}),
        ("few_visits_3", {"n_visits"}),
        ("deep", {"n_visits"}),
        ("crowded", {"star_density"}),
        ("gaps_and_edges", {"partial_fraction", "n_gaps", "missing_corner"}),
        ("varying_psf", {"psf_fwhm_change", "psf_ellipticity_change"}),
        ("correlated_noise", {"noise_correlation"}),
        ("wrong_psf", {"psf_error"}),
        ("background_errors", {"background_offset", "background_slope"}),
        ("cosmic_rays", {"n_unmasked_cosmic_rays"}),
        ("empty", {"star_density", "galaxy_density", "pair_density"}),
    ],
)
def test_other_families_differ_from_it_in_one_thing(name: str, changed: set[str]) -> None:
    standard, other = (dataclasses.asdict(family_scene(n, 3)) for n in ("standard", name))
    assert {key for key in standard if standard[key] != other[key]} == changed
    scene = Scene(family_scene(name, 3))
    observation = scene.warp(0, "i").observation(PLANES)
    assert observation.good.mean() > (0.2 if name == "gaps_and_edges" else 0.9)


def test_families_with_gaps_have_a_corner_without_data() -> None:
    scene = Scene(family_scene("gaps_and_edges", 1))
    seen = np.zeros((256, 256), dtype=int)
    for number in range(12):
        observation = scene.warp(number, "i").observation(PLANES)
        y, x = observation.origin
        height, width = observation.good.shape
        seen[y : y + height, x : x + width] += observation.good
    assert not seen[206:, 206:].any()
    assert np.mean(seen[:206, :206] > 0) > 0.99
    assert 3.0 < seen.mean() < 9.0


def test_training_scenes_span_their_ranges() -> None:
    scenes = [training_scene(seed) for seed in range(400)]
    for name, low, high in [
        ("n_visits", 2, 300),
        ("pixel_scale", 0.17, 0.27),
        ("star_density", 2.0, 200.0),
        ("galaxy_density", 40.0, 120.0),
        ("background_offset", 0.0, 0.02),
        ("partial_fraction", 0.0, 0.5),
        ("psf_fwhm_change", -0.1, 0.1),
    ]:
        values = np.array([getattr(scene, name) for scene in scenes])
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    assert np.mean([scene.n_visits < 30 for scene in scenes]) > 0.5
    medians = np.array([np.mean(scene.seeing) for scene in scenes])
    assert 0.5 <= medians.min() < 0.52
    assert 1.48 < medians.max() <= 1.5
    assert all(scene.seeing[0] >= 0.449 for scene in scenes)
    correlated = np.mean([scene.noise_correlation != "none" for scene in scenes])
    assert correlated == pytest.approx(0.5, abs=0.08)
    assert {scene.n_cells for scene in scenes} == {(1, 1), (2, 2)}
    assert all(scene.n_cells[0] * scene.cell_shape[0] == 160 for scene in scenes)
    assert len({scene.seed for scene in scenes}) == 400


def test_held_out_families_never_occur_in_training() -> None:
    assert set(HELD_OUT) < set(FAMILIES)
    scenes = [training_scene(seed) for seed in range(400)]
    assert FAMILIES["wrong_psf"].psf_error == 0.02
    assert all(scene.psf_error == 0.0 for scene in scenes)
    assert FAMILIES["crowded"].star_density > 1.4 * max(scene.star_density for scene in scenes)


def test_training_scenes_make_observations() -> None:
    for seed in range(5):
        config = training_scene(seed)
        assert training_scene(seed) == config
        observation = Scene(config).warp(config.n_visits - 1, "i").observation(PLANES)
        assert observation.psf.shape == (*config.n_cells, config.psf_size, config.psf_size)
        assert observation.good.any()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no family 'shallow'; choose from standard, few_visits_1"):
        family_scene("shallow", 1)
    for seed in (-1, 1_000_000):
        with pytest.raises(ValueError, match="must be from 0 to 999999"):
            family_scene("standard", seed)
    with pytest.raises(ValueError, match="must not be negative, but it is -2"):
        training_scene(-2)
