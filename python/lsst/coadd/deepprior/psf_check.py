# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Stars that are injected into the visits of a patch, to see which PSF its restoration really has."""

from __future__ import annotations

__all__ = ("InjectedStars", "injected_latent", "measure_leakage", "place_stars")

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import torch

from .observation import Observation
from .patch_data import PatchData
from .point_templates import point_latent
from .psf import FWHM_PER_SIGMA, fit_star, gaussian_stamp

SNRS = (10.0, 30.0, 100.0, 300.0)
"""S/N of the injected stars in the data."""

_PER_SNR = 12
"""Number of stars of each S/N, if the patch has so many free places."""

_SPACING = 2.5
"""Smallest distance from other light and from other stars, in FWHM of the median visit."""

_LIT = 1.0
"""Surface brightness at the seeing, in units of the noise of the coadd, above which a place is taken."""

_RADIUS = 4.0
"""Radius in which the PSF is compared, in sigma of the target."""

_FIT_RADIUS = 4
"""Half the side in pixels of the box in which sizes are fitted."""


@dataclasses.dataclass(frozen=True, eq=False)
class InjectedStars:
    """Stars to inject.

    Parameters
    ----------
    y, x : `numpy.ndarray`, (star,)
        Positions in the array of the patch in pixels.
    flux : `numpy.ndarray`, (star,)
        Fluxes in nJy.
    snr : `numpy.ndarray`, (star,)
        Their S/N in the data.
    """

    y: np.ndarray
    x: np.ndarray
    flux: np.ndarray
    snr: np.ndarray


def _half_width(sigma: float) -> int:
    """Return half the width in pixels of what is compared around a star."""
    return max(math.ceil(_RADIUS * sigma), _FIT_RADIUS) + 1


def place_stars(
    data: PatchData,
    observations: Sequence[Observation],
    image: np.ndarray,
    seed: int,
    cells: np.ndarray | None = None,
) -> InjectedStars:
    """Choose stars at random sub-pixel positions where a restored image is dark.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The same visits, for their PSFs.
    image : `numpy.ndarray`, (y, x)
        Restored image of the patch in nJy.
    seed : `int`
        Seed of the positions.
    cells : `numpy.ndarray`, (i, j), bool, optional
        Cells that may have stars, by default those with data.

    Returns
    -------
    stars : `InjectedStars`
        Up to 12 stars of each S/N in `SNRS`, in turns, as far as there is room.
    """
    rng = np.random.default_rng([seed, 7])
    depth = data.weight.sum(axis=0)
    noise = float(np.median(depth[depth > 0.0])) ** -0.5
    # Far enough from the border for what is compared, also where the seeing is very good.
    distance = max(_SPACING * float(np.nanmedian(data.seeing)), _half_width(data.sigma) + 1.0)
    # At the seeing, so that the noise of an image that was not regularised takes no place.
    light = scipy.ndimage.gaussian_filter(image, float(np.nanmedian(data.seeing)) / FWHM_PER_SIGMA)
    dark = np.pad(light < _LIT * noise, ((1, 1), (1, 1)))
    dark &= np.pad(data.pixel_weight(depth > 0.0 if cells is None else cells), ((1, 1), (1, 1)))
    free = scipy.ndimage.distance_transform_edt(dark)[1:-1, 1:-1] > distance
    information = np.zeros(depth.shape)
    for weight, observation in zip(data.weight, observations, strict=True):
        information += weight * np.nansum(observation.psf**2, axis=(2, 3))
    point_error = np.maximum(data.pixel_weight(information), np.finfo(float).tiny) ** -0.5
    y: list[float] = []
    x: list[float] = []
    flux: list[float] = []
    snr: list[float] = []
    candidates = rng.permutation(np.argwhere(free))
    for row, column in candidates.tolist():
        if len(y) == _PER_SNR * len(SNRS):
            break
        if y and np.min(np.hypot(np.array(y) - row, np.array(x) - column)) < 2.0 * distance:
            continue
        offset = rng.uniform(-0.5, 0.5, 2)
        snr.append(SNRS[len(y) % len(SNRS)])
        flux.append(snr[-1] * float(point_error[row, column]))
        y.append(row + offset[0])
        x.append(column + offset[1])
    return InjectedStars(np.array(y), np.array(x), np.array(flux), np.array(snr))


def injected_latent(data: PatchData, stars: InjectedStars) -> torch.Tensor:
    """Return the latent image of injected stars.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    stars : `InjectedStars`
        The stars.

    Returns
    -------
    latent : `torch.Tensor`, (y, x)
        Latent image on the canvas in nJy, which makes each star the target PSF.
    """
    canvas = np.zeros(data.shape)
    for y, x, flux in zip(stars.y, stars.x, stars.flux, strict=True):
        iy, ix = round(y), round(x)
        stamp = point_latent(data.sigma, y - iy, x - ix)
        y0, x0 = (i + data.margin - stamp.shape[0] // 2 for i in (iy, ix))
        canvas[y0 : y0 + stamp.shape[0], x0 : x0 + stamp.shape[0]] += flux * stamp
    return torch.as_tensor(canvas, dtype=data.dtype, device=data.device)


def measure_leakage(difference: np.ndarray, stars: InjectedStars, sigma: float) -> list[dict[str, Any]]:
    """Compare what stars add to a restored image with the advertised PSF.

    Parameters
    ----------
    difference : `numpy.ndarray`, (y, x)
        Restored image with the stars minus that without, in nJy, with the same noise in the
        visits.
    stars : `InjectedStars`
        The stars.
    sigma : `float`
        Sigma of the target PSF in pixels.

    Returns
    -------
    leakage : `list` [`dict`]
        For each S/N: number of stars ``n``; medians of ``size``, the width of the achieved PSF over that of
        the advertised one, by the same Gaussian fit; of ``flux``, the share of the light within 4 sigma over
        the same share of the advertised PSF; and of ``leakage``, the sum of the absolute differences of
        achieved and advertised PSF within that radius. A star that is not seen has no size.
    """
    advertised = fit_star(gaussian_stamp(sigma, 25), radius=_FIT_RADIUS).sigma
    half = _half_width(sigma)
    result = []
    for snr in sorted(set(stars.snr.tolist())):
        sizes, fluxes, leaks = [], [], []
        for k in np.flatnonzero(stars.snr == snr):
            y, x, flux = stars.y[k], stars.x[k], stars.flux[k]
            iy, ix = round(y), round(x)
            cut = difference[iy - half : iy + half + 1, ix - half : ix + half + 1] / flux
            wanted = gaussian_stamp(sigma, 2 * half + 1, dx=x - ix, dy=y - iy)
            rows, columns = np.indices(cut.shape) - half
            inside = np.hypot(rows - (y - iy), columns - (x - ix)) <= _RADIUS * sigma
            fluxes.append(float(cut[inside].sum() / wanted[inside].sum()))
            leaks.append(float(np.abs(cut - wanted)[inside].sum()))
            size = fit_star(cut, x=half + x - ix, y=half + y - iy, radius=_FIT_RADIUS).sigma / advertised
            if np.isfinite(size) and fluxes[-1] > 0.5:
                sizes.append(float(size))
        result.append(
            {
                "snr": snr,
                "n": len(fluxes),
                "size": float(np.median(sizes)) if sizes else None,
                "flux": float(np.median(fluxes)),
                "leakage": float(np.median(leaks)),
            }
        )
    return result
