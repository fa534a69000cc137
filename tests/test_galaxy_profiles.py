# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import math

import galsim
import numpy as np
import pytest

from lsst.coadd.deepprior.galaxy_profiles import GalaxyShape, galaxy_stamp
from lsst.coadd.deepprior.psf import gaussian_stamp

SEEING = 1.7


@pytest.mark.parametrize(
    ("index", "radius", "ratio", "angle"),
    [(1.0, 2.5, 0.5, 30.0), (4.0, 3.0, 0.7, 110.0), (2.3, 1.2, 0.9, 80.0), (0.7, 4.0, 0.35, 10.0)],
)
def test_galaxies_are_those_of_galsim(index: float, radius: float, ratio: float, angle: float) -> None:
    profile = galsim.Sersic(n=index, half_light_radius=radius).shear(q=ratio, beta=angle * galsim.degrees)
    seen = galsim.Convolve(profile, galsim.Gaussian(sigma=SEEING))
    expected = seen.drawImage(
        nx=61, ny=61, scale=1.0, method="no_pixel", offset=(0.3, -0.2), dtype=float
    ).array
    stretch, twice = -0.5 * math.log(ratio), 2.0 * math.radians(angle)
    shape = GalaxyShape(
        math.log(radius), stretch * math.cos(twice), stretch * math.sin(twice), math.log(index)
    )
    drawn = galaxy_stamp(gaussian_stamp(SEEING, 33), shape, dy=-0.2, dx=0.3, size=61)
    np.testing.assert_allclose(drawn, expected, rtol=0.0, atol=2e-3 * expected.max())
    # Folded light of wide profiles is spread over galsim's stamp, and lost from ours.
    assert abs(drawn.sum() - expected.sum()) < 0.01


@pytest.mark.parametrize(("index", "radius"), [(1.0, 25.0), (4.0, 10.0)])
def test_light_beyond_the_stamp_does_not_come_back(index: float, radius: float) -> None:
    accurate = galsim.GSParams(folding_threshold=1e-4, maximum_fft_size=16384)
    profile = galsim.Sersic(n=index, half_light_radius=radius, gsparams=accurate)
    seen = galsim.Convolve(profile, galsim.Gaussian(sigma=SEEING))
    expected = seen.drawImage(nx=61, ny=61, scale=1.0, method="no_pixel", dtype=float).array
    shape = GalaxyShape(math.log(radius), 0.0, 0.0, math.log(index))
    drawn = galaxy_stamp(gaussian_stamp(SEEING, 33), shape, dy=0.0, dx=0.0, size=61)
    assert expected.sum() < 0.9
    assert drawn.sum() == pytest.approx(expected.sum(), abs=5e-3)
    np.testing.assert_allclose(drawn, expected, rtol=0.0, atol=2e-3 * expected.max())


def test_a_tiny_galaxy_is_a_point() -> None:
    psf = gaussian_stamp(SEEING, 33)
    drawn = galaxy_stamp(psf, GalaxyShape(math.log(1e-3), 0.0, 0.0, 0.0), dy=0.0, dx=0.0, size=35)
    np.testing.assert_allclose(drawn[1:-1, 1:-1], psf, atol=1e-5 * psf.max())


@pytest.mark.parametrize(
    ("psf_shape", "size"), [((33, 31), 61), ((32, 32), 61), ((33, 33), 60), ((33, 33), 31)]
)
def test_bad_sizes(psf_shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match="square and odd"):
        galaxy_stamp(np.ones(psf_shape), GalaxyShape(0.0, 0.0, 0.0, 0.0), 0.0, 0.0, size)
