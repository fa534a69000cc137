# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf_check import SNRS, injected_latent, measure_leakage, place_stars
from lsst.coadd.deepprior.restore import restore

LAYOUT = CellLayout(2, 2, 90, 100)
SIGMA = 0.9
STARS = [(60.2, 45.7, 4000.0)]


@pytest.fixture(scope="module")
def visits() -> list[Observation]:
    return observe(LAYOUT, STARS, [1.5, 1.8, 2.0], seed=1)


@pytest.fixture(scope="module")
def data(visits: list[Observation]) -> PatchData:
    return PatchData(visits, LAYOUT, SIGMA, margin=8)


def test_stars_are_where_nothing_is(data: PatchData, visits: list[Observation]) -> None:
    image = gaussian_stars(LAYOUT.shape, STARS, SIGMA)
    stars = place_stars(data, visits, image, seed=3)
    assert set(stars.snr) == set(SNRS)
    assert np.hypot(stars.x - STARS[0][0], stars.y - STARS[0][1]).min() > 8.0
    distance = np.hypot(stars.x[:, None] - stars.x, stars.y[:, None] - stars.y)
    assert distance[~np.eye(len(stars.x), dtype=bool)].min() > 8.0
    assert ((stars.x > 5) & (stars.x < 195) & (stars.y > 5) & (stars.y < 175)).all()
    phases = np.concatenate([stars.x, stars.y]) % 1.0
    assert np.ptp(phases) > 0.8
    # Three visits of Gaussian PSFs and noise 1.
    error = np.sum([1.0 / (4.0 * np.pi * s**2) for s in (1.5, 1.8, 2.0)]) ** -0.5
    np.testing.assert_allclose(stars.flux / stars.snr, error, rtol=0.02)
    nowhere = place_stars(data, visits, np.full(LAYOUT.shape, 1e3), seed=3)
    assert len(nowhere.x) == 0
    assert measure_leakage(image, nowhere, SIGMA) == []


def test_what_is_injected_is_the_target_and_what_is_wider_leaks(
    data: PatchData, visits: list[Observation]
) -> None:
    stars = place_stars(data, visits, np.zeros(LAYOUT.shape), seed=4)
    image = inner_smooth(injected_latent(data, stars), SIGMA)[8:-8, 8:-8].numpy()
    perfect = measure_leakage(image, stars, SIGMA)
    assert [one["snr"] for one in perfect] == list(SNRS)
    for one in perfect:
        assert one["size"] == pytest.approx(1.0, abs=2e-3)
        assert one["flux"] == pytest.approx(1.0, abs=2e-3)
        assert one["leakage"] < 0.01
    wide = gaussian_stars(LAYOUT.shape, list(zip(stars.x, stars.y, stars.flux, strict=True)), 1.1 * SIGMA)
    for one in measure_leakage(0.9 * wide, stars, SIGMA):
        assert one["size"] == pytest.approx(1.1, abs=5e-3)
        assert one["flux"] == pytest.approx(0.9, abs=5e-3)
        assert one["leakage"] > 0.1


def test_restoration_reports_its_psf() -> None:
    few = observe(LAYOUT, STARS, [1.5, 1.8, 2.0], seed=2)
    settings = RestoreSettings(steps=0, n_variance_draws=1, base_steps=120)
    found = restore(few, LAYOUT, settings).metrics["psf"]["injected_stars"]
    assert [one["snr"] for one in found] == list(SNRS)
    brightest = found[-1]
    assert brightest["n"] >= 3
    assert brightest["size"] == pytest.approx(1.0, abs=0.05)
    assert brightest["flux"] == pytest.approx(1.0, abs=0.05)
    assert (
        restore(few, LAYOUT, RestoreSettings(steps=0, base_steps=5, check_psf=False)).metrics["psf"][
            "injected_stars"
        ]
        == []
    )
