# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.border_stars import coadd_stamps, place_border_stars
from lsst.coadd.deepprior.finer import finer_layout, finer_observation
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData

LAYOUT = CellLayout(2, 1, 40, 70)
SIGMA = 0.9
MARGIN = 16
SEEING = [1.6, 1.8, 2.2, 1.7]


def _placed(visits: list[Observation]) -> tuple[torch.Tensor, torch.Tensor]:
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    sets = data.sets()
    latent = maximum_likelihood(data, sets, steps=240).latent[0]
    return latent, place_border_stars(data, sets, latent, coadd_stamps(data))


def _image(latent: torch.Tensor) -> np.ndarray:
    return inner_smooth(latent, SIGMA).numpy()[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _light(latent: torch.Tensor, y: float, x: float) -> tuple[float, float, float]:
    """Return the light on the canvas within 4 pixels of a place of the patch, and its centre (y, x)."""
    image = inner_smooth(latent, SIGMA).numpy()
    rows, columns = np.indices(image.shape) - MARGIN
    near = np.where(np.hypot(rows - y, columns - x) < 4.0, image, 0.0)
    return near.sum(), (near * rows).sum() / near.sum(), (near * columns).sum() / near.sum()


@pytest.mark.parametrize(
    ("x", "y"), [(-2.3, 25.7), (71.9, 44.6), (33.2, -1.4), (40.6, 82.1), (-1.2, -1.6), (70.4, 80.3)]
)
def test_a_star_beyond_the_border_takes_its_light_along(x: float, y: float) -> None:
    star = [(x, y, 3e4)]
    latent, placed = _placed(observe(LAYOUT, star, SEEING, seed=1, masked_fraction=0.01))
    truth = gaussian_stars(LAYOUT.shape, star, SIGMA)
    rows, columns = np.indices(truth.shape)
    near = np.hypot(rows - y, columns - x) < 7.0
    before, after = (np.abs(_image(one) - truth)[near].sum() for one in (latent, placed))
    assert after < 0.25 * before
    flux, found_y, found_x = _light(placed, y, x)
    assert (found_x, found_y) == pytest.approx((x, y), abs=0.1)
    assert flux == pytest.approx(3e4, rel=0.06)


@pytest.mark.parametrize("oversampling", [2, 3])
@pytest.mark.parametrize(("x", "y"), [(-2.3, 25.7), (71.4, 44.6), (33.2, -1.4)])
def test_a_star_beyond_the_border_of_a_finer_grid(x: float, y: float, oversampling: int) -> None:
    k = oversampling
    visits = [finer_observation(visit, k) for visit in observe(LAYOUT, [(x, y, 3e4)], SEEING, seed=1)]
    data = PatchData(visits, finer_layout(LAYOUT, k), SIGMA, margin=k * MARGIN)
    sets = data.sets()
    latent = maximum_likelihood(data, sets, steps=60).latent[0]
    placed = place_border_stars(data, sets, latent, coadd_stamps(data))
    image = inner_smooth(placed, SIGMA).numpy()
    fine_x, fine_y = (k * centre + 0.5 * (k - 1) + k * MARGIN for centre in (x, y))
    rows, columns = np.indices(image.shape)
    near = np.where(np.hypot(rows - fine_y, columns - fine_x) < 4.0, image, 0.0)
    assert near.sum() == pytest.approx(3e4, rel=0.06)
    assert (near * columns).sum() / near.sum() == pytest.approx(fine_x, abs=0.15)
    assert (near * rows).sum() / near.sum() == pytest.approx(fine_y, abs=0.15)


def test_light_inside_is_left_alone() -> None:
    """Nothing bright; stars away from the border; a star within the border; a galaxy across it."""
    star = [(30.2, 41.7, 2e4)]
    for stars in ([], star):
        latent, placed = _placed(observe(LAYOUT, stars, SEEING, seed=2))
        assert placed is latent
    inside = observe(LAYOUT, [(1.3, 30.4, 2e4)], SEEING, seed=3)
    latent, placed = _placed(inside)
    torch.testing.assert_close(placed, latent, rtol=0, atol=0)
    galaxy = observe(LAYOUT, [], SEEING, seed=4)
    for visit, sigma in zip(galaxy, SEEING, strict=True):
        visit.flux[...] += gaussian_stars(LAYOUT.shape, [(-0.8, 30.4, 4e4)], np.hypot(sigma, 2.0))
    latent, placed = _placed(galaxy)
    torch.testing.assert_close(placed, latent, rtol=0, atol=0)


def test_a_galaxy_beyond_the_border_is_no_star() -> None:
    """A star two pixels beyond the border would leave more of its light in the data than the pile does."""
    galaxy = observe(LAYOUT, [], SEEING, seed=4)
    for visit, sigma in zip(galaxy, SEEING, strict=True):
        visit.flux[...] += gaussian_stars(LAYOUT.shape, [(-2.0, 30.4, 4e4)], np.hypot(sigma, 2.0))
    latent, placed = _placed(galaxy)
    torch.testing.assert_close(placed, latent, rtol=0, atol=0)


def test_neighbours_inside_keep_their_light() -> None:
    neighbour = (4.6, 30.2, 1500.0)
    visits = observe(LAYOUT, [(-2.1, 27.3, 3e4), neighbour], SEEING, seed=5)
    _, placed = _placed(visits)
    near = np.s_[27:34, 3:8]
    truth = gaussian_stars(LAYOUT.shape, [neighbour], SIGMA)
    assert _image(placed)[near].sum() == pytest.approx(truth[near].sum(), rel=0.15)


def test_a_star_in_front_of_masked_pixels_is_fitted_beside_them() -> None:
    visits = observe(LAYOUT, [(-1.8, 27.3, 3e4)], SEEING, seed=6)
    for visit in visits[:2]:
        visit.good[26:29, :2] = False
    _, placed = _placed(visits)
    assert _light(placed, 27.3, -1.8)[0] == pytest.approx(3e4, rel=0.06)


def test_the_stamp_of_the_coadd_is_the_weighted_mean() -> None:
    """Stamps of two sizes, weights of two depths, and a cell that one visit does not reach."""
    deep = observe(LAYOUT, [], [1.6], noise=1.0, seed=7, stamp=27)[0]
    shallow = observe(LAYOUT, [], [2.2], noise=2.0, seed=8, stamp=31)[0]
    shallow = dataclasses.replace(shallow, good=shallow.good & (np.arange(80) < 40)[:, None])
    stamps = coadd_stamps(PatchData([deep, shallow], LAYOUT, SIGMA, margin=MARGIN))
    wide = np.pad(deep.psf[0, 0], 2)
    np.testing.assert_allclose(stamps[0, 0], 0.8 * wide + 0.2 * shallow.psf[0, 0], atol=1e-6)
    np.testing.assert_allclose(stamps[1, 0], wide, atol=1e-7)
    blind = dataclasses.replace(deep, good=deep.good & (np.arange(80) < 40)[:, None])
    stamps = coadd_stamps(PatchData([blind], LAYOUT, SIGMA, margin=MARGIN))
    assert stamps[0, 0].sum() == pytest.approx(1.0)
    assert not stamps[1, 0].any()
