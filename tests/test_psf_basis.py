# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lsst.coadd.deepprior.psf import fwhm, gaussian_stamp
from lsst.coadd.deepprior.psf_basis import (
    FLUX,
    SHIFT_X,
    SHIFT_Y,
    PsfBasis,
    blind_stamps,
    corrected_stamps,
    moffat_stamp,
    stamp_changes,
)

SIGMA = 1.9


def _moments(stamp: np.ndarray) -> np.ndarray:
    """Return sum, first moments, and second moments xx, yy, xy about the middle."""
    y, x = np.mgrid[: stamp.shape[0], : stamp.shape[1]] - stamp.shape[0] // 2
    return np.array([(stamp * w).sum() for w in (np.ones_like(x), x, y, x * x, y * y, x * y)])


def test_modes_change_neither_sum_nor_centroid_and_second_moments_as_they_say() -> None:
    stamp = gaussian_stamp(SIGMA, 61)
    basis = PsfBasis(SIGMA)
    changes = np.array([_moments(change) for change in stamp_changes(stamp, basis)])
    np.testing.assert_allclose(changes[:, :3], 0.0, atol=2e-4)
    unit = SIGMA**2
    # Size, (ixx - iyy) / (ixx + iyy) and 2 ixy / (ixx + iyy), at each of the three widths; no higher mode.
    np.testing.assert_allclose(changes[:9:3, 3:], np.tile([unit, unit, 0.0], (3, 1)), rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(changes[1:9:3, 3:], np.tile([unit, -unit, 0.0], (3, 1)), rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(changes[2:9:3, 3:], np.tile([0.0, 0.0, unit], (3, 1)), rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(changes[9:, 3:], 0.0, atol=5e-3)


def test_flux_and_shifts_on_a_grid_of_unequal_sides() -> None:
    """What a star gains by a little more flux, and by being a little further along x and y."""
    shape, x0, y0 = (48, 61), 33.3, 20.6
    y, x = np.indices(shape)
    star = np.exp(-0.5 * ((x - x0) ** 2 + (y - y0) ** 2) / SIGMA**2)
    transfer = PsfBasis(SIGMA).transfer(shape)[: SHIFT_Y + 1]
    changes = np.fft.irfft2(np.fft.rfft2(star) * transfer, s=shape)
    for place, expected in (
        (FLUX, star),
        (SHIFT_X, star * (x - x0) / SIGMA**2),
        (SHIFT_Y, star * (y - y0) / SIGMA**2),
    ):
        np.testing.assert_allclose(changes[place], expected, atol=1e-5)


def test_transforms_are_in_memory_once() -> None:
    basis = PsfBasis(SIGMA)
    tracemalloc.start()
    double = basis.transfer((256, 300))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * double.nbytes
    single = basis.transfer((256, 300), np.complex64)
    assert single.dtype == np.complex64
    np.testing.assert_array_equal(single, double.astype(np.complex64))


def test_corrected_stamps_are_psfs_whatever_the_coefficients() -> None:
    rng = np.random.default_rng(1)
    basis = PsfBasis(SIGMA)
    stamps = np.broadcast_to(gaussian_stamp(SIGMA, 31, dx=0.2), (2, 3, 31, 31)).copy()
    stamps[1, 2] = np.nan
    stamps /= stamps.sum(axis=(2, 3), keepdims=True)
    corrected = corrected_stamps(stamps, basis, rng.normal(0.0, 0.4, basis.n_modes))
    assert np.isnan(corrected[1, 2]).all()
    good = corrected[np.isfinite(corrected).all(axis=(2, 3))]
    assert len(good) == 5
    assert good.min() >= 0.0
    np.testing.assert_allclose(good.sum(axis=(1, 2)), 1.0)
    for stamp in good:
        np.testing.assert_allclose(_moments(stamp)[1:3], (0.2, 0.0), atol=0.02)
    np.testing.assert_array_equal(corrected_stamps(stamps[:1], basis, np.zeros(basis.n_modes)), stamps[:1])


def test_a_blind_guess_keeps_the_fwhm_alone() -> None:
    stamps = np.full((1, 2, 41, 41), np.nan)
    stamps[0, 1] = gaussian_stamp(SIGMA, 41, dx=0.3)
    guess = blind_stamps(stamps)
    assert np.isnan(guess[0, 0]).all()
    assert fwhm(guess[0, 1]) == pytest.approx(fwhm(stamps[0, 1]), rel=2e-3)
    np.testing.assert_allclose(guess[0, 1], guess[0, 1].T)
    np.testing.assert_allclose(guess[0, 1], guess[0, 1][::-1, ::-1])
    np.testing.assert_array_equal(blind_stamps(stamps[:, :1]), stamps[:, :1])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        PsfBasis(0.0)
    with pytest.raises(ValueError, match="odd size"):
        moffat_stamp(3.0, 20)
