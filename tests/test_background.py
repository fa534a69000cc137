# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Visits with small errors of the background."""

from __future__ import annotations

import dataclasses

import numpy as np
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.weights import packaged_network

LAYOUT = CellLayout(2, 2, 70, 80)
STARS = [(50.2, 35.7, 2000.0), (110.4, 100.1, 6000.0)]
OFFSETS = (0.05, -0.01, 0.03, 0.02, 0.06, -0.02)
"""Offsets in units of the sky noise, of rms 0.03 and mean 0.022: one of 0.02 that all visits share."""


def test_offsets_change_the_sky_by_no_more_than_that_of_the_coadd() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8, 1.6, 1.9, 1.7], seed=4)
    shifted = [
        dataclasses.replace(visit, flux=(visit.flux + offset).astype(np.float32))
        for visit, offset in zip(visits, OFFSETS, strict=True)
    ]
    settings = RestoreSettings(n_variance_draws=1)
    network = packaged_network()
    right, wrong = (restore(each, LAYOUT, settings, network=network) for each in (visits, shifted))
    assert right.metrics["method"] == wrong.metrics["method"] == "pretrained network"
    blank = gaussian_stars(LAYOUT.shape, STARS, 4.0) < 0.01
    coadd_error = np.mean((wrong.coadd - right.coadd)[blank])
    assert abs(coadd_error - np.mean(OFFSETS)) < 1e-3
    assert abs(np.mean(wrong.image[blank])) < coadd_error
    assert abs(np.mean((wrong.image - right.image)[blank])) < coadd_error
    # Each star has the flux that the offset of the coadd adds in its surroundings, and no more.
    for x, y, _ in STARS:
        near = np.hypot(*(np.indices(LAYOUT.shape) - np.array([y, x])[:, None, None])) < 4.0
        assert abs(np.sum((wrong.image - right.image)[near])) < 3.0 * coadd_error * near.sum()
