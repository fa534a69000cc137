# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
from toy import observe

from lsst.coadd.deepprior.baselines import maximum_likelihood
from lsst.coadd.deepprior.conditions import AXES, patch_conditions
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA

LAYOUT = CellLayout(2, 3, 32, 26)
SIGMA = 0.9


def conditions(visits: list[Observation]) -> dict[str, float]:
    data = PatchData(visits, LAYOUT, SIGMA)
    return patch_conditions(data, maximum_likelihood(data, data.sets(), steps=40), 40)


def test_visits_seeing_and_target() -> None:
    """A visit without a good pixel does not count, the seeing is the median of the others."""
    visits = observe(LAYOUT, [(30.0, 20.0, 400.0)], [1.5, 2.2, 1.7, 2.9], seed=1)
    visits[3].good[...] = False
    result = conditions(visits)
    assert tuple(result) == AXES
    assert all(type(value) is float for value in result.values())
    assert result["n_visits"] == 3.0
    assert result["seeing_pixels"] == pytest.approx(1.7 * FWHM_PER_SIGMA, rel=1e-3)
    assert result["target_pixels"] == pytest.approx(SIGMA * FWHM_PER_SIGMA)


def test_lit_fraction_of_empty_and_bright_fields() -> None:
    sigmas = [1.5, 1.9, 1.7]
    assert conditions(observe(LAYOUT, [], sigmas, seed=2))["lit_fraction"] < 1e-3
    star = conditions(observe(LAYOUT, [(30.0, 20.0, 3e3)], sigmas, seed=2))["lit_fraction"]
    assert 0.01 < star < 0.1
    crowded = [(x, y, 2e3) for x in np.arange(4.0, 78.0, 8.0) for y in np.arange(4.0, 64.0, 8.0)]
    assert conditions(observe(LAYOUT, crowded, sigmas, seed=2))["lit_fraction"] > 0.8


def test_lit_fraction_is_of_the_covered_pixels() -> None:
    """The right two thirds have no visit."""
    visits = [
        dataclasses.replace(
            visit, flux=visit.flux[:, :26], variance=visit.variance[:, :26], good=visit.good[:, :26]
        )
        for visit in observe(LAYOUT, [(13.0, 20.0, 3e3)], [1.5, 1.9], seed=2)
    ]
    part = conditions(visits)["lit_fraction"]
    whole = conditions(observe(LAYOUT, [(13.0, 20.0, 3e3)], [1.5, 1.9], seed=2))["lit_fraction"]
    assert part == pytest.approx(3.0 * whole, rel=0.15)


@pytest.mark.parametrize("masked_fraction", [0.0, 0.3])
@pytest.mark.parametrize("correlation", [0.0, 0.25])
def test_noise_correlation_is_that_of_neighbours(correlation: float, masked_fraction: float) -> None:
    """White noise, and noise smoothed by (c, 1, c) in both directions; a star and a trail do not disturb."""
    c = {0.0: 0.0, 0.25: 0.13397}[correlation]  # 2 c / (1 + 2 c^2) is the correlation of neighbours.
    visits = observe(LAYOUT, [(30.0, 20.0, 4e3)], [1.5, 1.9, 1.7, 2.0], noiseless=True, seed=3)
    rng = np.random.default_rng(3)
    for index, visit in enumerate(visits):
        kernel = np.array([c, 1.0, c]) / np.sqrt(1.0 + 2.0 * c * c)
        noise = rng.standard_normal((LAYOUT.shape[0] + 4, LAYOUT.shape[1] + 4))
        for axis in (0, 1):
            noise = scipy.ndimage.convolve1d(noise, kernel, axis=axis)
        flux = visit.flux + 2.0 * noise[2:-2, 2:-2]
        if index == 0:
            flux[50:52] += 100.0
        good = rng.random(LAYOUT.shape) >= masked_fraction
        visits[index] = dataclasses.replace(
            visit,
            flux=np.where(good, flux, np.nan).astype(np.float32),
            variance=np.full(LAYOUT.shape, 4.0, dtype=np.float32),
            good=good,
        )
    # The mean of three visits of 5000 pixels, two directions: a standard error of 0.006.
    assert conditions(visits)["noise_correlation"] == pytest.approx(correlation, abs=0.03)


def test_one_visit_and_no_sky_have_conditions() -> None:
    result = conditions(observe(LAYOUT, [], [1.6], seed=4))
    assert result["n_visits"] == 1.0
    alone = observe(LAYOUT, [], [1.6, 1.7], seed=4)
    for visit in alone:
        visit.good[...] = False
        visit.good[::2, ::2] = True
    assert conditions(alone)["noise_correlation"] == 0.0
