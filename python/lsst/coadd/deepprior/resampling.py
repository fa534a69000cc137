# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What interpolation from detector pixels to the pixels of a warp does to noise.

A warped pixel is a weighted sum of detector pixels,

    w_p = sum_n W_pn d_n,   sum_n W_pn = 1,

with an interpolation kernel W that is the product of two one-dimensional ones along the detector's rows and
columns, taken at the sub-pixel position of p.  `lsst.afw.math.warpExposure` does so with a Lanczos kernel,
divided by its sum (WarpAtOnePoint.h).  White noise of variance v_n becomes correlated:

    cov(w_p, w_q) = sum_n W_pn W_qn v_n.

The variance plane of a warp is the diagonal of that, sum_n W_pn^2 v_n; the rest is not carried along.
"""

from __future__ import annotations

__all__ = ("KERNELS", "Resampling")

import functools
from collections.abc import Callable

import numpy as np
import scipy.ndimage


def _bilinear(x: np.ndarray) -> np.ndarray:
    """Return the triangle of linear interpolation."""
    return np.maximum(1.0 - np.abs(x), 0.0)


def _lanczos3(x: np.ndarray) -> np.ndarray:
    """Return the Lanczos kernel of order 3 (Duchon 1979, J. Appl. Meteor. 18, 1016)."""
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


KERNELS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, _bilinear),
    "lanczos3": (3, _lanczos3),
}
"""Half width in pixels, and function, of the interpolation kernels (`dict`)."""


class Resampling:
    """Interpolation of detector pixels, of the same size as those of the warp, at the pixels of a warp.

    Parameters
    ----------
    shape : `tuple` [`int`, `int`]
        Height and width of the warp.
    kernel : `str`
        One of `KERNELS`.
    angle : `float`
        Angle in radians from the warp's x axis to the detector's.
    shift : `tuple` [`float`, `float`]
        Position y, x of the warp's middle pixel with respect to a detector pixel.

    Raises
    ------
    ValueError
        Raised if there is no such kernel.
    """

    def __init__(
        self, shape: tuple[int, int], kernel: str, angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(
                f"There is no interpolation kernel {kernel!r}; choose from {', '.join(KERNELS)}."
            )
        half, function = KERNELS[kernel]
        self._turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self._middle = np.array(shape) // 2
        y, x = np.indices(shape).reshape(2, -1) - self._middle[:, np.newaxis]
        position = self._turn @ np.stack([y, x]) + np.array(shift)[:, np.newaxis]
        first = np.floor(position.min(axis=1)).astype(int) - half + 1
        self._origin = np.array(shift) - first
        """Position y, x of the middle of the warp in the array of detector pixels (`numpy.ndarray`)."""
        position -= first[:, np.newaxis]
        corner = np.floor(position).astype(int)
        size = corner.max(axis=1) + half + 1
        self.detector_shape: tuple[int, int] = (int(size[0]), int(size[1]))
        """Height and width of the detector pixels that are needed (`tuple` [`int`, `int`])."""
        self._shape = shape
        self._first = (corner[0] + 1 - half) * size[1] + corner[1] + 1 - half
        """Flat index of the first detector pixel under the kernel (`numpy.ndarray`, (pixel,))."""
        taps = np.arange(1 - half, half + 1)[:, np.newaxis]
        weights = function((position - corner)[:, np.newaxis] - taps)
        self._weights = weights / weights.sum(axis=1, keepdims=True)

    def to_detector(self, y: float, x: float) -> tuple[float, float]:
        """Return where a position of the warp lies in the array of detector pixels.

        Parameters
        ----------
        y, x : `float`
            Position in the array of the warp.

        Returns
        -------
        y, x : `float`
            Position in the array of detector pixels.
        """
        result = self._turn @ (np.array([y, x]) - self._middle) + self._origin
        return float(result[0]), float(result[1])

    @functools.cached_property
    def _detector_pixels(self) -> np.ndarray:
        """Positions in the warp of all detector pixels, (2, y, x)."""
        grid = np.indices(self.detector_shape).reshape(2, -1) - self._origin[:, np.newaxis]
        return (self._turn.T @ grid + self._middle[:, np.newaxis]).reshape(2, *self.detector_shape)

    def at_detector(self, image: np.ndarray) -> np.ndarray:
        """Return a smooth image of the warp's pixels at the detector pixels.

        Parameters
        ----------
        image : `numpy.ndarray`, (y, x)
            Image on the pixels of the warp.

        Returns
        -------
        detector : `numpy.ndarray`, (v, u)
            The image, linearly interpolated at the detector pixels; beyond the warp, that of its border.
        """
        return scipy.ndimage.map_coordinates(image, self._detector_pixels, order=1, mode="nearest")

    def image(self, detector: np.ndarray) -> np.ndarray:
        """Interpolate an image.

        Parameters
        ----------
        detector : `numpy.ndarray`, (v, u)
            Image of the shape `detector_shape`.

        Returns
        -------
        image : `numpy.ndarray`, (y, x)
            Image on the pixels of the warp.
        """
        return self._apply(detector, self._weights)

    def variance(self, detector: np.ndarray) -> np.ndarray:
        """Propagate the variance of independent detector pixels.

        Parameters
        ----------
        detector : `numpy.ndarray`, (v, u)
            Variance of the detector pixels, of the shape `detector_shape`.

        Returns
        -------
        variance : `numpy.ndarray`, (y, x)
            Variance of each pixel of the warp by itself.
        """
        return self._apply(detector, self._weights**2)

    def _apply(self, detector: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sum detector pixels with weights, (2, tap, pixel)."""
        if detector.shape != self.detector_shape:
            raise ValueError(
                f"The detector image must have the shape {self.detector_shape}, not {detector.shape}."
            )
        pixels, width = detector.ravel(), detector.shape[1]
        result = np.zeros(self._first.shape)
        for down, weight in enumerate(weights[0]):
            row = np.zeros(self._first.shape)
            for right, along in enumerate(weights[1]):
                row += along * pixels[down * width + right :].take(self._first)
            result += weight * row
        return result.reshape(self._shape)
