# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest

from lsst.coadd.deepprior.moments import adaptive_moments, centroid
from lsst.coadd.deepprior.stamps import Stamp

X, Y = 63.3, 41.8
"""Position in the patch; the stamp begins at pixel (20, 45)."""


def gaussian(ixx: float, iyy: float, ixy: float, shape: tuple[int, int] = (45, 38)) -> Stamp:
    """Return an elliptical Gaussian of known second moments, of flux 300."""
    y, x = np.indices(shape).astype(float)
    x, y = x + 45.0 - X, y + 20.0 - Y
    determinant = ixx * iyy - ixy**2
    distance = (iyy * x**2 - 2.0 * ixy * x * y + ixx * y**2) / determinant
    return Stamp(20, 45, 300.0 / (2.0 * np.pi * np.sqrt(determinant)) * np.exp(-0.5 * distance))


def test_centroid_is_in_pixels_of_the_patch() -> None:
    np.testing.assert_allclose(centroid(gaussian(2.0, 3.0, 0.7)), (Y, X), atol=1e-6)


@pytest.mark.parametrize(("ixx", "iyy", "ixy"), [(0.8, 0.8, 0.0), (4.0, 2.0, -1.1), (1.5, 6.0, 0.9)])
def test_moments_of_a_gaussian_are_its_own(ixx: float, iyy: float, ixy: float) -> None:
    """At any brightness, with a PSF that is narrower."""
    for scale in (1.0, 1e-3):
        piece = gaussian(ixx, iyy, ixy)
        moments = adaptive_moments(piece._replace(array=scale * piece.array), 0.85)
        np.testing.assert_allclose(moments[:2], (Y, X), atol=1e-3)
        np.testing.assert_allclose(moments[2:], (iyy, ixx, ixy), atol=5e-3)


def test_what_is_cut_off_at_the_border_has_the_position_of_what_is_there() -> None:
    piece = gaussian(1.5, 1.5, 0.0).cropped((43, 200))
    moments = adaptive_moments(piece, 0.85)
    assert np.isfinite(moments).all()
    assert moments[1] == pytest.approx(X, abs=0.01)
    assert moments[0] < Y


def test_where_no_weight_fits_there_is_a_centroid_alone() -> None:
    """The light beside a peak is negative, which no width explains."""
    array = np.zeros((21, 30))
    array[10, 9:16], array[10, 12] = -0.1, 1.0
    moments = adaptive_moments(Stamp(3, 7, array), 0.85)
    assert np.isnan(moments[2:]).all()
    np.testing.assert_allclose(moments[:2], centroid(Stamp(3, 7, array)))
