# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
from toy import gaussian_stars

from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.prior_carried import prior_carried
from lsst.coadd.deepprior.psf import gaussian_stamp

SHAPE = (90, 124)
SIGMA, SEEING = 0.9, 2.0
POINT_ERROR = np.sqrt(4.0 * np.pi) * SEEING
NOWHERE = np.s_[:0, :0]


def carried(
    model_snr: float,
    true_snr: float,
    variance: float,
    noise: float = 1.0,
    *,
    hole: tuple[slice, slice] = NOWHERE,
) -> np.ndarray:
    """Return the mask near one source whose model has another flux than the data, which have no noise.

    The variance is in units of the square of ``noise``, the unit of everything. The hole has no data.
    """
    sources = [(60.3, 40.6, noise)]
    model = model_snr * POINT_ERROR * gaussian_stars(SHAPE, sources, SIGMA)
    left = (true_snr - model_snr) * POINT_ERROR * gaussian_stars(SHAPE, sources, SEEING)
    psf = np.broadcast_to(gaussian_stamp(SEEING, 25), (2, 2, 25, 25))
    left[hole] = np.nan
    coadd = Coadd(model, SIGMA, left, np.full(SHAPE, noise**2), psf)
    n_good = np.full(SHAPE, 3)
    n_good[10, 12:14] = 0, 1
    result = prior_carried(model, np.full(SHAPE, variance * noise**2), left, n_good, coadd)
    assert result[10, 12]
    result[10, 12] = False
    assert not result[:20].any()
    return result


def test_light_that_the_image_lacks() -> None:
    """Of a source of 5 sigma the prior has left nothing, or less than half, and the variance denies it."""
    assert carried(0.0, 5.0, 0.02**2)[39:43, 58:63].all()
    assert carried(2.0, 5.0, 0.02**2)[39:43, 58:63].all()
    beside = carried(0.0, 5.0, 0.02**2, hole=np.s_[30:40, 50:70])
    assert beside[40:43, 58:63].all()
    assert not beside[:35].any()


def test_what_the_image_has_is_not_marked() -> None:
    assert not carried(5.0, 5.0, 0.02**2).any()
    assert not carried(0.0, 1.0, 1e-6).any(), "noise of one sigma is not lost light"
    assert not carried(8.0, 3.0, 0.02**2).any(), "the residual is negative"
    assert not carried(50.0, 10.0, 0.02**2).any(), "the data are not bright"


@pytest.mark.parametrize("noise", [1.0, 30.0])
def test_the_foot_of_a_bright_star(noise: float) -> None:
    """The variance plane takes the image for certain where the light under the PSF is that of the star."""
    mask = carried(50.0, 50.0, 0.02**2, noise)
    assert not mask[40:42, 59:62].any(), "the data show the star"
    model = 50.0 * POINT_ERROR * gaussian_stars(SHAPE, [(60.3, 40.6, 1.0)], SIGMA)
    np.testing.assert_array_equal(mask, (model > 0.06) & (model < 3.0))
    assert mask.sum() > 10
    assert not carried(50.0, 50.0, 1.0, noise).any(), "no foot of 3 sigma is fainter than 3 times the noise"


@pytest.mark.parametrize("noise", [1.0, 30.0])
def test_the_brightness_that_is_compared_with_the_variance(noise: float) -> None:
    """A point of S/N 5 has a mean brightness of 5 (4 pi)^(-1/2) / s sigma under a Gaussian PSF of sigma s."""
    brightness = 5.0 / np.sqrt(4.0 * np.pi) / SEEING
    assert carried(0.0, 5.0, (0.9 * brightness) ** 2, noise)[41, 60]
    assert not carried(0.0, 5.0, (1.1 * brightness) ** 2, noise).any()


def test_bad_input() -> None:
    psf = gaussian_stamp(SEEING, 25)[None, None]
    zero = np.zeros(SHAPE)
    coadd = Coadd(zero, SIGMA, zero, np.ones(SHAPE), psf)
    with pytest.raises(ValueError, match="one shape"):
        prior_carried(zero.T, zero, zero, zero, coadd)
