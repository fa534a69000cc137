# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.signal
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf import (
    FWHM_PER_SIGMA,
    carry_kernel,
    data_kernel,
    fit_star,
    fwhm,
    gaussian_stamp,
    inner_sigma,
    shift_stamp,
    stamp_fault,
    target_sigma,
)


def moffat(size: int, width: float, *, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Sample a finely integrated Moffat profile of beta 3.5."""
    fine = 5
    axis = (np.arange(size * fine) - (size * fine - 1) / 2) / fine
    y, x = np.meshgrid(axis, axis, indexing="ij")
    profile = (1 + ((x - dx) ** 2 + (y - dy) ** 2) / width**2) ** -3.5
    return profile.reshape(size, fine, size, fine).sum(axis=(1, 3))


@pytest.mark.parametrize("sigma", [0.8, 0.85, 1.1])
def test_inner_kernel_can_hold_a_star_at_any_phase(sigma: float) -> None:
    """Some u >= 0 gives r * u = g to 0.2 % of the peak wherever the star lies."""
    n = 15
    inner = gaussian_stamp(inner_sigma(sigma), n)
    matrix = np.stack(
        [
            scipy.signal.fftconvolve(np.eye(n * n)[p].reshape(n, n), inner, mode="same").ravel()
            for p in range(n * n)
        ],
        axis=1,
    )
    for dx, dy in ((0.0, 0.0), (0.5, 0.5), (0.25, -0.4), (0.5, 0.0)):
        star = gaussian_stamp(sigma, n, dx=dx, dy=dy)
        u, misfit = scipy.optimize.nnls(matrix, star.ravel())
        assert u.min() >= 0.0
        assert np.abs(matrix @ u - star.ravel()).max() < 2e-3 * star.max()


@pytest.mark.parametrize("width", [3.0, 4.5])  # FWHM 2.8 and 4.2 pixels
def test_carry_kernel_carries_the_target_to_the_psf(width: float) -> None:
    sigma, size = 0.9, 41
    psf = moffat(size, width)
    kernel = carry_kernel(psf, sigma)
    for dx, dy in ((0.0, 0.0), (0.4, -0.3)):
        carried = scipy.signal.fftconvolve(gaussian_stamp(sigma, size, dx=dx, dy=dy), kernel, mode="same")
        expected = moffat(size, width, dx=dx, dy=dy) / psf.sum()
        assert np.abs(carried - expected).max() < 3e-3 * expected.max()


def test_data_kernel_is_the_carry_kernel_times_the_inner_kernel() -> None:
    sigma, psf = 0.9, moffat(41, 2.5)
    product = scipy.signal.fftconvolve(
        carry_kernel(psf, sigma), gaussian_stamp(inner_sigma(sigma), 41), mode="same"
    )
    np.testing.assert_allclose(data_kernel(psf, sigma), product / product.sum(), atol=2e-5)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_stamp_may_be_smaller_than_the_target(size: int) -> None:
    psf = gaussian_stamp(2.0, size)
    wide = carry_kernel(np.pad(psf, 20), 1.5)[20:-20, 20:-20]
    kernel = carry_kernel(psf, 1.5)
    np.testing.assert_allclose(kernel, wide / wide.sum(), atol=0.01 * kernel.max())


@pytest.mark.parametrize(
    "stamp", [np.ones((4, 4)), np.ones((3, 5)), np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones(9)]
)
def test_unusable_stamps_are_refused(stamp: np.ndarray) -> None:
    with pytest.raises(ValueError, match="PSF stamp"):
        data_kernel(stamp, 0.9)


def test_what_can_be_no_psf() -> None:
    sharp, wide = gaussian_stamp(0.41, 15), gaussian_stamp(0.45, 15)
    assert stamp_fault(wide) is None
    assert "82% of its light" in str(stamp_fault(sharp))
    noise = 1e-3 * np.random.default_rng(1).normal(size=(31, 31))
    assert stamp_fault(gaussian_stamp(2.0, 31) + noise) is None
    lobe = np.roll(gaussian_stamp(2.0, 31), 8, axis=1)
    assert stamp_fault(gaussian_stamp(2.0, 31) - 0.4 * lobe) is None
    assert "negative part of 69%" in str(stamp_fault(gaussian_stamp(2.0, 31) - 0.7 * lobe))


def test_target_sigma_rule() -> None:
    assert target_sigma([4.0, 6.0, 5.0]) * FWHM_PER_SIGMA == pytest.approx(2.5)
    assert target_sigma([3.0, 3.1, 3.2]) * FWHM_PER_SIGMA == pytest.approx(2.0)
    assert target_sigma([4.0], 2.2) * FWHM_PER_SIGMA == pytest.approx(2.2)
    with pytest.raises(ValueError, match="not sampled"):
        target_sigma([4.0], 1.2)
    with pytest.raises(ValueError, match="FWHM nan pixels is not sampled"):
        target_sigma([4.0], math.nan)
    with pytest.raises(ValueError, match="not sharper"):
        target_sigma([4.0, 3.0], 4.5)


def test_target_is_not_wider_than_the_best_seeing() -> None:
    assert target_sigma([3.0, 10.0, 10.0]) * FWHM_PER_SIGMA == pytest.approx(2.7)
    assert target_sigma([1.5, 10.0, 10.0]) * FWHM_PER_SIGMA == pytest.approx(2.0)
    assert target_sigma([3.0, 10.0, 10.0], 4.2) * FWHM_PER_SIGMA == pytest.approx(4.2)
    with pytest.raises(ValueError, match="best seeing, 3.00 pixels, .* FWHM 4.40 pixels; ask for a narrower"):
        target_sigma([3.0, 10.0, 10.0], 4.4)
    with pytest.raises(ValueError, match="best seeing, 1.30 pixels, .* finer pixels"):
        target_sigma([1.3, 1.5, 2.2])


def test_fit_star_recovers_a_sampled_gaussian() -> None:
    image = gaussian_stars((40, 51), [(30.3, 17.6, 250.0)], 1.4, ellipticity=0.1)
    fit = fit_star(image, x=30.0, y=18.0)
    assert fit.flux == pytest.approx(250.0, rel=1e-6)
    assert (fit.x, fit.y) == pytest.approx((30.3, 17.6), abs=1e-6)
    assert fit.sigma == pytest.approx(1.4, rel=1e-6)
    expected = (1.1**2 - 1.1**-2) / (1.1**2 + 1.1**-2)
    assert (fit.e1, fit.e2) == pytest.approx((expected, 0.0), abs=1e-6)


def test_fit_star_signs_of_diagonal_ellipticity() -> None:
    y, x = np.mgrid[-10:11, -10:11].astype(float)
    covariance = np.array([[2.0, 0.5], [0.5, 1.5]])
    inverse = np.linalg.inv(covariance)
    image = np.exp(-0.5 * (inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y))
    fit = fit_star(image)
    assert fit.e1 == pytest.approx(0.5 / 3.5, abs=1e-6)
    assert fit.e2 == pytest.approx(1.0 / 3.5, abs=1e-6)


def test_fit_star_refuses_the_edge_and_nan() -> None:
    with pytest.raises(ValueError, match="not inside"):
        fit_star(np.ones((20, 20)), x=2.0, y=10.0)
    with pytest.raises(ValueError, match="not finite"):
        fit_star(np.full((20, 20), np.nan))


@pytest.mark.parametrize(
    "image", [np.ones((9, 9)), np.exp(-(np.linspace(-3.0, 3.0, 9) ** 2)) * np.ones((9, 1))]
)
def test_fit_star_of_what_has_no_end(image: np.ndarray) -> None:
    fit = fit_star(image, radius=4)
    assert fit.sigma == np.inf
    assert np.isnan([fit.flux, fit.e1, fit.e2]).all()


def test_fit_star_where_there_is_none() -> None:
    """What was left of an injected star that a network fitted to an empty field took away, in 1e-5."""
    rows = (
        "116 138 47 99 19 6 8 37 58 / 240 213 121 41 13 4 3 13 97 / 76 34 34 22 13 -14 0 -21 21 / "
        "32 10 8 29 31 18 13 4 8 / 24 43 41 55 98 46 -10 -1 7 / 94 42 36 37 72 31 15 5 9 / "
        "215 41 42 45 31 10 14 23 14 / 127 73 57 88 12 10 28 29 86 / 309 145 267 48 36 117 174 66 30"
    )
    image = np.array([row.split() for row in rows.split("/")], dtype=float)
    assert fit_star(image, radius=4, x=4.068980388407951, y=4.18302790947282).sigma == np.inf


def test_fwhm_of_a_flat_stamp_is_refused() -> None:
    with pytest.raises(ValueError, match="flat; check the PSF"):
        fwhm(np.full((15, 15), 1.0 / 225.0))


def test_visit_with_a_flat_psf_is_named() -> None:
    (visit,) = observe(CellLayout(1, 1, 30, 40), [], [1.5])
    visit.psf[...] = 1.0 / visit.psf[0, 0].size
    with pytest.raises(ValueError, match="^visit 0: No Gaussian fits"):
        visit.seeing()


def test_fwhm_and_shift() -> None:
    stamp = gaussian_stamp(1.7, 31)
    assert fwhm(stamp) == pytest.approx(1.7 * FWHM_PER_SIGMA, rel=1e-4)
    np.testing.assert_allclose(
        shift_stamp(stamp, 0.3, -0.45), gaussian_stamp(1.7, 31, dx=0.3, dy=-0.45), atol=1e-6
    )
