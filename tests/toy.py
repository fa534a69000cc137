# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Point-source fields in plain arrays, with PSFs known in closed form, for the tests of the numerics."""

from __future__ import annotations

import numpy as np

from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout


def gaussian_stars(
    shape: tuple[int, int], stars: list[tuple[float, float, float]], sigma: float, ellipticity: float = 0.0
) -> np.ndarray:
    """Draw stars (x, y, flux) of Gaussian PSF, sampled at pixel centres."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    sx, sy = sigma * (1 + ellipticity), sigma / (1 + ellipticity)
    image = np.zeros(shape)
    for x0, y0, flux in stars:
        image += flux * np.exp(-0.5 * (((x - x0) / sx) ** 2 + ((y - y0) / sy) ** 2)) / (2 * np.pi * sx * sy)
    return image


def observe(
    layout: CellLayout,
    stars: list[tuple[float, float, float]],
    sigmas: list[float],
    *,
    noise: float = 1.0,
    seed: int = 0,
    stamp: int = 27,
    masked_fraction: float = 0.0,
    noiseless: bool = False,
) -> list[Observation]:
    """Make visits of a field of stars with Gaussian PSFs of the given sigmas, in pixels, and white noise."""
    rng = np.random.default_rng(seed)
    visits = []
    for index, sigma in enumerate(sigmas):
        clean = gaussian_stars(layout.shape, stars, sigma)
        flux = clean if noiseless else clean + noise * rng.standard_normal(layout.shape)
        good = rng.random(layout.shape) >= masked_fraction
        psf = gaussian_stars((stamp, stamp), [(stamp // 2, stamp // 2, 1.0)], sigma)
        visits.append(
            Observation(
                flux=np.where(good, flux, np.nan).astype(np.float32),
                variance=np.full(layout.shape, noise**2, dtype=np.float32),
                good=good,
                psf=np.broadcast_to(psf / psf.sum(), (layout.n_i, layout.n_j, stamp, stamp)).copy(),
                origin=(0, 0),
                name=f"visit {index}",
            )
        )
    return visits
