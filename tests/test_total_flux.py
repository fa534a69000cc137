# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
from toy import gaussian_stars

from lsst.coadd.deepprior.joint_fit import Coadd, Stamp
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.total_flux import SYSTEMATIC_FLOOR, TotalFluxes, total_fluxes

SHAPE, SEEING = (320, 290), 2.0
POINT_ERROR = np.sqrt(4.0 * np.pi) * SEEING


def fit(snr: float, width: float, shape_width: float, seed: int) -> tuple[np.ndarray, TotalFluxes]:
    """Fit a grid of Gaussian sources, whose shapes on the restored image have a width of their own."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[20:300:24, 18:270:24].reshape(2, -1).astype(float)
    y, x = grid + rng.uniform(-0.5, 0.5, grid.shape)
    flux = np.full(len(y), snr * POINT_ERROR)
    sources = list(zip(x, y, flux, strict=True))
    data = gaussian_stars(SHAPE, sources, width) + rng.standard_normal(SHAPE)
    coadd = Coadd(np.zeros(SHAPE), 0.9, data, np.ones(SHAPE), gaussian_stamp(SEEING, 31)[None, None])
    points = [coadd.point(*position) for position in zip(y, x, strict=True)]
    shapes = [
        Stamp(round(b) - 15, round(a) - 15, gaussian_stamp(shape_width, 31, dx=a - round(a), dy=b - round(b)))
        for a, b in zip(x, y, strict=True)
    ]
    return flux, total_fluxes(points, shapes, np.full(len(y), 2.3548 * SEEING), coadd)


@pytest.mark.parametrize("snr", [8.0, 15.0, 100.0])
def test_point_sources_are_not_brightened_by_shapes_that_are_too_wide(snr: float) -> None:
    """The restored image says that stars are 15 % wider than the PSF; their fluxes do not mind."""
    flux, found = fit(snr, SEEING, 1.15 * SEEING, seed=3)
    pull = (found.flux - flux) / found.error
    assert abs(np.median(found.flux / flux) - 1.0) < max(0.01, 0.25 / snr)
    assert 0.85 < np.std(pull) < 1.15
    assert found.extended.mean() < 0.05


def test_extended_sources_whose_shape_is_wrong() -> None:
    """Widths that are 5 % off change fluxes by 5 %, if they are not fitted, and the error says so."""
    flux, found = fit(80.0, 2.6, 2.73, seed=4)
    assert found.extended.all()
    assert abs(np.median(found.flux / flux) - 1.0) < 0.01
    assert np.median(found.template_error / flux) > 0.02
    assert (found.error >= found.template_error).all()


def test_faint_extended_sources() -> None:
    flux, found = fit(12.0, 2.6, 2.0, seed=5)
    assert abs(np.median(found.flux / flux) - 1.0) < 0.08
    assert abs(np.mean((found.flux - flux) / found.error)) < 0.4


def test_bad_input_and_floor() -> None:
    coadd = Coadd(
        np.zeros((40, 50)), 0.9, np.zeros((40, 50)), np.ones((40, 50)), gaussian_stamp(2.0, 31)[None, None]
    )
    with pytest.raises(ValueError, match="one each"):
        total_fluxes([coadd.point(20.0, 20.0)], [], np.array([4.7]), coadd)
    assert 0.0 < SYSTEMATIC_FLOOR <= 0.005
