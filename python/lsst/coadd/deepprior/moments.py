# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Where sources are and how wide, from pixels alone."""

from __future__ import annotations

__all__ = ("adaptive_moments", "centroid", "peak_offset")

import math

import numpy as np
import scipy.ndimage

from .stamps import Stamp


def peak_offset(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure how far peaks are from the centres of their pixels, with a parabola along each axis.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Image.
    y, x : `numpy.ndarray`, (peak,), int
        Pixels that are not below their neighbours.

    Returns
    -------
    dy, dx : `numpy.ndarray`, (peak,)
        Offsets in pixels, at most half a pixel; 0 across a border of the image.
    """
    padded = np.pad(np.asarray(image, dtype=float), 1, mode="reflect")
    at = padded[y + 1, x + 1]
    offsets = []
    for before, after in (
        (padded[y, x + 1], padded[y + 2, x + 1]),
        (padded[y + 1, x], padded[y + 1, x + 2]),
    ):
        curvature = np.minimum(before + after - 2.0 * at, -1e-30)
        offsets.append(np.clip(0.5 * (before - after) / curvature, -0.5, 0.5))
    return offsets[0], offsets[1]


def centroid(stamp: Stamp) -> tuple[float, float]:
    """Return the first moments of a stamp.

    Parameters
    ----------
    stamp : `~lsst.coadd.deepprior.stamps.Stamp`
        A piece of the patch.

    Returns
    -------
    y, x : `float`
        Its centroid in the array of the patch, in pixels.
    """
    y, x = scipy.ndimage.center_of_mass(stamp.array)
    return stamp.y0 + y, stamp.x0 + x


def adaptive_moments(piece: Stamp, sigma: float) -> np.ndarray:
    """Return moments under the elliptical Gaussian weight that fits a piece of the restored image.

    Parameters
    ----------
    piece : `~lsst.coadd.deepprior.stamps.Stamp`
        The piece.
    sigma : `float`
        Sigma in pixels of its Gaussian PSF.

    Returns
    -------
    moments : `numpy.ndarray`, (5,)
        Position ``y, x`` in pixels, and second moments ``iyy, ixx, ixy`` in pixel^2.

    Notes
    -----
    A Gaussian gives its own covariance (Bernstein & Jarvis 2002). The iteration runs on the piece smoothed
    once more with its PSF, which the result is corrected for: pixels do not sample narrower weights. Where
    it does not settle, the moments are NaN and the position is the centroid.
    """
    border = math.ceil(4.0 * sigma)
    image = scipy.ndimage.gaussian_filter(np.pad(piece.array, border), sigma, mode="constant")
    light = image.ravel()
    grid = np.indices(image.shape).reshape(2, -1).astype(float)
    centre = np.array(np.unravel_index(light.argmax(), image.shape), dtype=float)
    smoothing = np.eye(2) * sigma**2
    covariance = 2.0 * smoothing
    for _ in range(200):
        offset = grid - centre[:, None]
        weighted = light * np.exp(-0.5 * np.einsum("ip,ij,jp->p", offset, np.linalg.inv(covariance), offset))
        weighted /= weighted.sum()
        last_centre, centre = centre, grid @ weighted
        offset = grid - centre[:, None]
        last, covariance = covariance, 2.0 * (offset * weighted) @ offset.T
        if np.linalg.det(covariance) < 1e-3 or np.trace(covariance) > light.size:
            break
        settled = np.allclose(centre, last_centre, rtol=0.0, atol=1e-5)
        if settled and np.allclose(covariance, last, rtol=0.0, atol=1e-4 * sigma**2):
            y, x = centre + (piece.y0 - border, piece.x0 - border)
            moments = covariance - smoothing
            return np.array([y, x, moments[0, 0], moments[1, 1], moments[0, 1]])
    return np.array([*centroid(piece), np.nan, np.nan, np.nan])
