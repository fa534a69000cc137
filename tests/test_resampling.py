# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest

from lsst.coadd.deepprior.resampling import Resampling

SHAPE = (150, 190)


def warped_noise(resampling: Resampling, seed: int) -> np.ndarray:
    return resampling.image(np.random.default_rng(seed).standard_normal(resampling.detector_shape))


def covariance(noise: np.ndarray, down: int, right: int) -> float:
    """Return the mean product of pixels that far apart."""
    shifted = np.roll(noise, (-down, -right), (0, 1))
    return float(np.mean((noise * shifted)[: noise.shape[0] - down, : noise.shape[1] - right]))


def lanczos_weights(shift: float) -> np.ndarray:
    """Return the weights of the detector pixels -2 to 3 for a position between pixels 0 and 1."""
    weights = np.array([np.sinc(shift - n) * np.sinc((shift - n) / 3.0) for n in range(-2, 4)])
    return weights / weights.sum()


def autocorrelation(weights: np.ndarray, lag: int) -> float:
    return float(weights[lag:] @ weights[: len(weights) - lag])


def test_bilinear_interpolation_is_the_mean_of_neighbours() -> None:
    resampling = Resampling((2, 3), "bilinear", shift=(0.25, 0.4))
    detector = np.arange(12.0).reshape(3, 4) ** 2
    assert resampling.detector_shape == (3, 4)
    rows = 0.75 * detector[:-1] + 0.25 * detector[1:]
    np.testing.assert_allclose(resampling.image(detector), 0.6 * rows[:, :-1] + 0.4 * rows[:, 1:])
    # Of equal variances, the pixel keeps (0.75^2 + 0.25^2) (0.6^2 + 0.4^2).
    np.testing.assert_allclose(resampling.variance(np.full((3, 4), 2.0)), 2.0 * 0.625 * 0.52)


@pytest.mark.parametrize("kernel", ["bilinear", "lanczos3"])
def test_correlation_is_the_autocorrelation_of_the_weights(kernel: str) -> None:
    # Shifts that differ in y and x tell both from each other.
    shift = (0.5, 0.2)
    if kernel == "bilinear":
        down, right = (np.array([1.0 - s, s]) for s in shift)
    else:
        down, right = (lanczos_weights(s) for s in shift)
    resampling = Resampling(SHAPE, kernel, shift=shift)
    noise = [warped_noise(resampling, seed) for seed in range(10)]
    for lag_y, lag_x in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        expected = autocorrelation(down, lag_y) * autocorrelation(right, lag_x)
        measured = np.mean([covariance(image, lag_y, lag_x) for image in noise])
        assert measured == pytest.approx(expected, abs=0.008)
    variance = resampling.variance(np.ones(resampling.detector_shape))
    np.testing.assert_allclose(variance, autocorrelation(down, 0) * autocorrelation(right, 0))


def test_correlation_on_a_rotated_detector() -> None:
    # All sub-pixel positions occur, so that the mean covariance is the autocorrelation of the kernel itself.
    angle = 0.5
    t = np.arange(-3000, 3001) / 1000.0
    kernel = np.sinc(t) * np.sinc(t / 3.0)
    continuous = np.correlate(kernel, kernel, "full") / 1000.0

    def expected(down: int, right: int) -> float:
        v = down * np.cos(angle) - right * np.sin(angle)
        u = down * np.sin(angle) + right * np.cos(angle)
        middle = len(t) - 1
        return float(np.prod([continuous[middle + round(1000 * abs(x))] for x in (u, v)]))

    resampling = Resampling(SHAPE, "lanczos3", angle, (0.1, 0.7))
    noise = [warped_noise(resampling, seed) for seed in range(10)]
    for lag in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]:
        measured = np.mean([covariance(image, *lag) for image in noise])
        assert measured == pytest.approx(expected(*lag), abs=0.012)
    assert expected(1, 1) < 0.5 * expected(0, 1)
    # The plane is that of each pixel, which changes with its sub-pixel position.
    plane = resampling.variance(np.ones(resampling.detector_shape))
    assert plane.min() < 0.65
    assert plane.max() > 0.95
    many = np.var([warped_noise(resampling, seed) for seed in range(100)], axis=0)
    for low, high in [(0.0, 0.7), (0.7, 0.85), (0.85, 1.01)]:
        chosen = (plane >= low) & (plane < high)
        assert np.mean(many[chosen]) == pytest.approx(np.mean(plane[chosen]), rel=0.02)


def test_positions_on_a_rotated_detector() -> None:
    resampling = Resampling((61, 83), "lanczos3", 0.7, (0.3, 0.6))
    y0, x0 = 22.3, 51.8
    v0, u0 = resampling.to_detector(y0, x0)
    v, u = np.indices(resampling.detector_shape)
    star = np.exp(-0.5 * ((v - v0) ** 2 + (u - u0) ** 2) / 4.0)
    y, x = np.indices((61, 83))
    expected = np.exp(-0.5 * ((y - y0) ** 2 + (x - x0) ** 2) / 4.0)
    np.testing.assert_allclose(resampling.image(star), expected, atol=0.005)
    # Back on the detector, linear interpolation lowers the peak by some per cent.
    np.testing.assert_allclose(resampling.at_detector(expected), star, atol=0.08)


def test_a_constant_stays_what_it_is() -> None:
    for kernel in ("bilinear", "lanczos3"):
        resampling = Resampling((20, 31), kernel, 2.0, (0.4, 0.9))
        np.testing.assert_allclose(resampling.image(np.full(resampling.detector_shape, 3.0)), 3.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no interpolation kernel 'cubic'; choose from bilinear, lanczos3"):
        Resampling((5, 6), "cubic")
    resampling = Resampling((5, 6), "bilinear")
    with pytest.raises(ValueError, match=r"must have the shape \(6, 7\), not \(5, 6\)"):
        resampling.image(np.zeros((5, 6)))
