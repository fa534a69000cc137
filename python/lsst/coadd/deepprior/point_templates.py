# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Points in the latent image, and how it changes with their parameters.

A point of flux F at p is a non-negative :math:`u_p` with :math:`r * u_p = F g(\cdot - p)`, so nothing that
works on latent images has to know of it. It is the outer product of two profiles, since g and r are.
"""

from __future__ import annotations

__all__ = ("Template", "half_width", "point_latent", "point_templates")

import functools
import math
from typing import NamedTuple

import numpy as np
import scipy.optimize

from .psf import gaussian_stamp, inner_sigma

_TABLE_REACH, _TABLE_STEP = 0.7, 0.005
"""Largest offset from the central pixel, and distance, in pixels of the profiles that are interpolated."""

_STEP = 0.1
"""Step in pixels of the numerical derivatives."""


class Template(NamedTuple):
    """Change of the latent image with the parameters of a point; ``images[:, 0, 0]`` is pixel ``(y0, x0)``.

    The parameters are ln F, x, y and three second moments: Ixx + Iyy, Ixx - Iyy and Ixy.
    """

    y0: int
    x0: int
    images: np.ndarray

    def cut(self, canvas: np.ndarray) -> np.ndarray:
        """Return the part of a canvas under the template."""
        n = self.images.shape[-1]
        return canvas[self.y0 : self.y0 + n, self.x0 : self.x0 + n]


def half_width(sigma: float) -> int:
    """Return half the width in pixels of the latent image of a point."""
    return math.ceil(5.0 * sigma)


@functools.lru_cache(maxsize=8)
def _smoothing(sigma: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the matrix of ``r *`` along one axis, its pixels, and the sum of g; g and r are separable."""
    half, inner = half_width(sigma), inner_sigma(sigma)
    # Unit sums along one axis, as those of the stamps in two.
    g_sum, r_sum = (math.sqrt(1.0 / gaussian_stamp(s).max()) for s in (sigma, inner))
    nodes = np.arange(-half, half + 1.0)
    wide = half + math.ceil(5.0 * inner)
    pixels = np.arange(-wide, wide + 1.0)
    return np.exp(-0.5 * ((pixels[:, None] - nodes) / inner) ** 2) / r_sum, pixels, g_sum


def _profile(sigma: float, offset: float) -> np.ndarray:
    """Return the non-negative v with ``r * v = g(. - offset)`` along one axis."""
    smooth, pixels, g_sum = _smoothing(sigma)
    wanted = np.exp(-0.5 * ((pixels - offset) / sigma) ** 2) / g_sum
    # Wide targets take more steps than nnls allows by default.
    return scipy.optimize.nnls(smooth, wanted, maxiter=30 * smooth.shape[1])[0]


@functools.lru_cache(maxsize=8)
def _profile_table(sigma: float) -> np.ndarray:
    """Return profiles at offsets of up to `_TABLE_REACH` pixels in steps of `_TABLE_STEP`, (offset, n)."""
    n = round(_TABLE_REACH / _TABLE_STEP)
    return np.array([_profile(sigma, k * _TABLE_STEP) for k in range(-n, n + 1)])


def _profiles(sigma: float, offsets: np.ndarray) -> np.ndarray:
    """Interpolate profiles at offsets of up to `_TABLE_REACH` pixels, (offset, n)."""
    table = _profile_table(sigma)
    place = (np.asarray(offsets) + _TABLE_REACH) / _TABLE_STEP
    below = np.clip(place.astype(int), 0, len(table) - 2)
    part = (place - below)[..., None]
    return (1.0 - part) * table[below] + part * table[below + 1]


def point_latent(sigma: float, dy: float, dx: float) -> np.ndarray:
    """Return the latent image of a point of unit flux.

    Parameters
    ----------
    sigma : `float`
        Sigma of the target PSF g in pixels.
    dy, dx : `float`
        Position relative to the central pixel, at most a pixel.

    Returns
    -------
    latent : `numpy.ndarray`, (n, n)
        The non-negative u whose ``r * u`` is next to ``g(. - p)``; see `~lsst.coadd.deepprior.psf` for how
        near.

    Raises
    ------
    ValueError
        Raised if the position is more than a pixel off.
    """
    if not max(abs(dy), abs(dx)) <= 1.0:
        raise ValueError(f"A point at ({dy}, {dx}) is not in the central pixel of its stamp.")
    return np.outer(_profile(sigma, dy), _profile(sigma, dx))


def point_templates(sigma: float, points: np.ndarray) -> list[Template]:
    """Make the templates of points (point, 3: flux, x, y)."""
    half = half_width(sigma)
    pixels = np.rint(points[:, :0:-1]).astype(int)
    steps = np.array([-_STEP, 0.0, _STEP])
    # Profiles along y and x, (point, axis, step, n).
    profiles = _profiles(sigma, (points[:, :0:-1] - pixels)[..., None] + steps)
    low, middle, high = np.moveaxis(profiles, 2, 0)
    first, second = (high - low) / (2.0 * _STEP), (high - 2.0 * middle + low) / _STEP**2

    def outer(along_y: np.ndarray, along_x: np.ndarray) -> np.ndarray:
        return along_y[:, 0, :, None] * along_x[:, 1, None, :]

    xx, yy = outer(middle, second), outer(second, middle)
    images = np.stack(
        [
            outer(middle, middle),
            outer(middle, first),
            outer(first, middle),
            0.5 * (xx + yy),
            0.5 * (xx - yy),
            outer(first, first),
        ],
        axis=1,
    )
    images *= points[:, 0, None, None, None]
    return [
        Template(y - half, x - half, image) for (y, x), image in zip(pixels.tolist(), images, strict=True)
    ]
