# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What of the truth of a scene its coadd shows."""

from __future__ import annotations

__all__ = ("Sky", "cropped", "sky_of")

import dataclasses
import functools
import math

import galsim
import numpy as np
import scipy.signal
from scenes import MARGIN, TARGET_SIGMA, BenchScene

from lsst.coadd.deepprior.linear_coadds import inverse_variance_coadd
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf import carry_kernel, fwhm
from lsst.coadd.deepprior.truth import GALSIM, galaxy_profile

_BLANK = 0.05
"""Light in units of the noise of the coadd below which a pixel counts as blank sky."""

_WING_BETA, _WING_SIZE = 2.5, 401
"""Moffat index and stamp size of the PSF that decides what is blank: wider wings than any PSF has."""

_APERTURE = 1.5
"""Radius in arcsec of the apertures in which fluxes are compared."""

_DISTURBS = ((1.0, 0.1), (2.0, 1.0), (4.0, 10.0))
"""Distances in apertures within which no neighbour may be brighter than an object by some ratio; what light
of neighbours is in the aperture is subtracted as it truly is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sky:
    """What of the truth of a scene a coadd of its visits shows, pixel by pixel and object by object.

    Parameters
    ----------
    noise : `float`
        Median noise of a pixel of the inverse-variance coadd, in nJy.
    relative_noise : `numpy.ndarray`, (y, x)
        Noise of every pixel over ``noise``; infinite without data.
    covered : `numpy.ndarray`, (y, x), bool
        Pixels that are good in a visit.
    blank : `numpy.ndarray`, (y, x), bool
        Covered pixels where all objects together, at a PSF of wide wings and the FWHM of the coadd, put less
        than `_BLANK` times ``noise``.
    coadd_psf : `numpy.ndarray`, (k, k)
        PSF of the coadd at the centre.
    coadd_truth : `numpy.ndarray`, (y, x)
        The coadd of the visits without their noise: what it shows at its own resolution, in nJy.
    snr : `numpy.ndarray`, (object,)
        Signal-to-noise ratio of the objects in the coadd, with their true profiles; 0 outside of the data.
    isolated : `numpy.ndarray`, (object,), bool
        Objects inside the patch without a neighbour that disturbs their aperture.
    """

    noise: float
    relative_noise: np.ndarray
    covered: np.ndarray
    blank: np.ndarray
    coadd_psf: np.ndarray
    coadd_truth: np.ndarray
    snr: np.ndarray
    isolated: np.ndarray


def sky_of(scene: BenchScene) -> Sky:
    """Work out what the coadd of a scene shows."""
    depth = np.zeros(scene.layout.shape)
    for visit in scene.observations:
        if visit.good.any():
            (y, x), (ny, nx) = visit.origin, visit.flux.shape
            depth[y : y + ny, x : x + nx] += visit.good / np.median(visit.variance[visit.good])
    covered = depth > 0.0
    noise = float(np.median(depth[covered] ** -0.5))
    with np.errstate(divide="ignore"):
        relative = depth**-0.5 / noise
    noiseless = [_without_noise(scene, visit) for visit in scene.observations]
    coadd = inverse_variance_coadd(noiseless, scene.layout, TARGET_SIGMA)
    return Sky(
        noise=noise,
        relative_noise=relative,
        covered=covered,
        blank=covered & (_wings(scene, fwhm(coadd.psf)) < _BLANK * noise),
        coadd_psf=coadd.psf,
        coadd_truth=np.where(covered, np.nan_to_num(coadd.image), 0.0).astype(float),
        snr=_snr(scene, coadd.psf, noise * relative),
        isolated=_isolated(scene),
    )


def cropped(scene: BenchScene, sky: Sky, window: tuple[slice, slice]) -> tuple[BenchScene, Sky]:
    """Return a part of a scene as a scene of one cell, without its visits.

    Parameters
    ----------
    scene : `BenchScene`
        The scene.
    sky : `Sky`
        What its coadd shows.
    window : `tuple` [`slice`, `slice`]
        Rows and columns.

    Returns
    -------
    scene : `BenchScene`
        The part.
    sky : `Sky`
        What the coadd shows of it.
    """
    rows, columns = window
    wide = tuple(slice(part.start, part.stop + 2 * MARGIN) for part in window)
    part = dataclasses.replace(
        scene,
        observations=[],
        layout=CellLayout(1, 1, rows.stop - rows.start, columns.stop - columns.start),
        start=(scene.start[0] + rows.start, scene.start[1] + columns.start),
        wide_truth=scene.wide_truth[wide],
        artifacts=scene.artifacts[:, rows, columns],
    )
    x = np.asarray(scene.catalogue["x"]) - part.start[1]
    y = np.asarray(scene.catalogue["y"]) - part.start[0]
    height, width = part.layout.shape
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    images = {
        name: getattr(sky, name)[window] for name in ("relative_noise", "covered", "blank", "coadd_truth")
    }
    return part, dataclasses.replace(
        sky, snr=np.where(inside, sky.snr, 0.0), isolated=_isolated(part), **images
    )


def _without_noise(scene: BenchScene, visit: Observation) -> Observation:
    """Return what a visit would see without noise, background error, trails and cosmic rays."""
    layout = scene.layout
    seen = np.zeros(layout.shape)

    @functools.cache
    def carried(psf: bytes) -> np.ndarray:
        stamp = np.frombuffer(psf).reshape(visit.psf.shape[2:])
        full = scipy.signal.fftconvolve(scene.wide_truth, carry_kernel(stamp, TARGET_SIGMA), mode="same")
        return full[MARGIN:-MARGIN, MARGIN:-MARGIN]

    for i, j in np.argwhere(visit.has_psf):
        cell = np.s_[
            i * layout.height : (i + 1) * layout.height,
            j * layout.width : (j + 1) * layout.width,
        ]
        seen[cell] = carried(visit.psf[i, j].astype(float).tobytes())[cell]
    (y, x), (ny, nx) = visit.origin, visit.flux.shape
    return dataclasses.replace(visit, flux=seen[y : y + ny, x : x + nx].astype(np.float32))


def _wings(scene: BenchScene, width: float) -> np.ndarray:
    """Return the light of all objects at a PSF of wide wings and some FWHM in pixels, (y, x)."""
    wide = galsim.Moffat(beta=_WING_BETA, fwhm=width, gsparams=GALSIM)
    stamp = wide.drawImage(nx=_WING_SIZE, ny=_WING_SIZE, scale=1.0, method="no_pixel", dtype=float).array
    # With "full", the centre of the stamp is at half its size.
    light = scipy.signal.fftconvolve(scene.wide_truth, stamp)
    first = MARGIN + _WING_SIZE // 2
    return light[first : first + scene.layout.shape[0], first : first + scene.layout.shape[1]]


def _snr(scene: BenchScene, psf: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the signal-to-noise ratio of every object for its true profile at some PSF."""
    kernel = carry_kernel(psf, TARGET_SIGMA)
    scale, size = scene.pixel_scale, 2 * psf.shape[0] + 1
    target = galsim.Gaussian(sigma=TARGET_SIGMA * scale, gsparams=GALSIM)
    point = math.sqrt(float(np.sum(psf**2)))
    result = np.zeros(len(scene.catalogue))
    for index, row in enumerate(scene.catalogue):
        y, x = round(row["y"] - scene.start[0]), round(row["x"] - scene.start[1])
        if not (0 <= y < noise.shape[0] and 0 <= x < noise.shape[1]) or not np.isfinite(noise[y, x]):
            continue
        root = point
        if row["type"] != "star":
            profile = galsim.Convolve(galaxy_profile(row), target, gsparams=GALSIM)
            image = profile.drawImage(nx=size, ny=size, scale=scale, method="no_pixel", dtype=float).array
            root = math.sqrt(float(np.sum(scipy.signal.fftconvolve(image, kernel, mode="same") ** 2)))
        result[index] = row["flux_nJy"] * root / noise[y, x]
    return result


def _isolated(scene: BenchScene) -> np.ndarray:
    """Tell which objects are well inside the patch and have no neighbour with light in their aperture."""
    scale, (ny, nx) = scene.pixel_scale, scene.layout.shape
    margin = 2.0 * _APERTURE / scale + 2.0
    x = np.asarray(scene.catalogue["x"]) - scene.start[1]
    y = np.asarray(scene.catalogue["y"]) - scene.start[0]
    flux = np.asarray(scene.catalogue["flux_nJy"])
    inside = (x > margin) & (x < nx - 1 - margin) & (y > margin) & (y < ny - 1 - margin)
    distance = np.hypot(x[:, None] - x, y[:, None] - y) * scale
    np.fill_diagonal(distance, np.inf)
    ratio = flux / flux[:, None]
    disturbs = np.zeros(distance.shape, dtype=bool)
    for radius, brightest in _DISTURBS:
        disturbs |= (distance < radius * _APERTURE) & (ratio > brightest)
    return inside & ~disturbs.any(axis=1)
