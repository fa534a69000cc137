# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The paper's own form of the deep prior on small fields of stars."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.linear_coadds import inverse_variance_coadd
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.paper_form import paper_form
from lsst.coadd.deepprior.psf import gaussian_stamp

LAYOUT = CellLayout(1, 2, 38, 30)
SIGMA = 0.9
STARS = [(42.3, 14.6, 300.0), (17.0, 25.2, 200.0)]


def visits_of_unequal_form() -> list[Observation]:
    """Four visits with masked pixels: two sizes of stamps, a part of the patch, a PSF that varies."""
    visits = observe(LAYOUT, STARS, [1.3, 1.5], masked_fraction=0.05)
    visits += observe(LAYOUT, STARS, [1.7, 1.9], seed=4, stamp=33)
    part = (slice(6, 38), slice(11, 60))
    visits[1] = dataclasses.replace(
        visits[1],
        flux=visits[1].flux[part],
        variance=visits[1].variance[part],
        good=visits[1].good[part],
        origin=(6, 11),
    )
    psf = visits[2].psf.copy()
    psf[0, 1] = observe(LAYOUT, [], [1.75], stamp=33)[0].psf[0, 1]
    visits[2] = dataclasses.replace(visits[2], psf=psf)
    return visits


def test_network_finds_the_stars() -> None:
    visits = visits_of_unequal_form()
    peers = paper_form(visits, LAYOUT, SIGMA, steps=[150, 5], seed=3)
    assert sorted(peers) == [5, 150]
    truth = gaussian_stars(LAYOUT.shape, STARS, SIGMA)
    error = {steps: float(np.sqrt(np.mean((peer.image - truth) ** 2))) for steps, peer in peers.items()}
    coadd = inverse_variance_coadd(visits, LAYOUT, SIGMA).image
    assert error[150] < 0.7 * error[5]
    assert error[150] < 0.7 * float(np.sqrt(np.mean((coadd - truth) ** 2)))
    late = peers[150]
    assert late.image.dtype == np.float32
    assert late.image.shape == LAYOUT.shape
    assert late.image.min() >= 0.0
    np.testing.assert_allclose(late.psf, gaussian_stamp(SIGMA))
    for x, y, flux in STARS:
        box = late.image[round(y) - 7 : round(y) + 8, round(x) - 7 : round(x) + 8]
        assert box.sum() == pytest.approx(flux, rel=0.15)
        assert np.unravel_index(late.image[:, (x > 30) * 30 :][:, :30].argmax(), (38, 30)) == (
            round(y),
            round(x) - (x > 30) * 30,
        )


def test_result_depends_on_the_seed_alone() -> None:
    """Neither on the state of the global generator, which stays as it was, nor on masked values."""
    visits = visits_of_unequal_form()
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = paper_form(visits, LAYOUT, SIGMA, steps=[3], seed=3)[3].image
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    spoiled = [dataclasses.replace(v, flux=np.where(v.good, v.flux, np.float32(1e9))) for v in visits]
    np.testing.assert_array_equal(first, paper_form(spoiled, LAYOUT, SIGMA, steps=[3], seed=3)[3].image)
    assert np.abs(first - paper_form(visits, LAYOUT, SIGMA, steps=[3], seed=4)[3].image).max() > 1e-3


def test_bad_input() -> None:
    visits = visits_of_unequal_form()
    with pytest.raises(ValueError, match="positive numbers of steps"):
        paper_form(visits, LAYOUT, SIGMA, steps=[], seed=1)
    nothing = dataclasses.replace(visits[0], good=np.zeros(LAYOUT.shape, dtype=bool))
    with pytest.raises(ValueError, match="good pixel"):
        paper_form([nothing], LAYOUT, SIGMA, steps=[2], seed=1)
