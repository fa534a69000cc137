# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What a restoration gains against the plain coadd, measured against the truth of a simulated scene."""

from __future__ import annotations

__all__ = (
    "Detections",
    "Gain",
    "aperture_ratios",
    "coadd_detections",
    "evaluate",
    "match",
    "pool",
    "split_pairs",
)

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import galsim
import numpy as np
import scipy.ndimage
import scipy.spatial
import scipy.stats
import sep
from astropy.table import Table

from lsst.images import Box

from .moments import peak_offset
from .plain_coadd import Coadd
from .psf import FWHM_PER_SIGMA, fit_star, gaussian_stamp
from .truth import GALSIM, add_object, galaxy_profile

_APERTURE = 1.5
"""Radius in arcsec in which the fluxes of isolated objects are compared with the truth."""

_MATCH_RADIUS = 0.3
"""Largest distance in arcsec between a true object and its entry in a list."""

_WING_BETA = 2.5
"""Moffat index of the PSF that decides where no object shines: wider than any atmospheric one (3 to 5)."""

_BLANK = 0.05
"""Light in units of the noise of the plain coadd below which the sky counts as blank."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """Positions of a source list in tract pixels, and their fluxes in nJy."""

    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray


@dataclasses.dataclass(frozen=True)
class Gain:
    """A row of the table: values of one quantity for the plain coadd and for the restored patch.

    Parameters
    ----------
    name : `str`
        What is compared.
    kind : `str`
        How values become one number: ``median``; ``bias``, the median deviation of a ratio from 1 in
        per cent; ``share``, the percentage of true values.
    coadd, restored : `numpy.ndarray`
        One value an object (or a patch); empty where the quantity does not exist.
    """

    name: str
    kind: str
    coadd: np.ndarray
    restored: np.ndarray

    def numbers(self) -> tuple[float, float]:
        """Return the number for the plain coadd and that for the restored patch, NaN without values."""
        return self._number(self.coadd), self._number(self.restored)

    def _number(self, values: np.ndarray) -> float:
        if len(values) == 0:
            return math.nan
        if self.kind == "share":
            return 100.0 * float(np.mean(values))
        return 100.0 * float(np.median(values) - 1.0) if self.kind == "bias" else float(np.median(values))


def pool(patches: Sequence[Sequence[Gain]]) -> list[Gain]:
    """Pool the values of the same rows of several patches."""
    return [
        Gain(
            rows[0].name,
            rows[0].kind,
            np.concatenate([row.coadd for row in rows]),
            np.concatenate([row.restored for row in rows]),
        )
        for rows in zip(*patches, strict=True)
    ]


def coadd_detections(coadd: Coadd, origin: tuple[int, int]) -> Detections:
    """Detect sources on the plain coadd: peaks of its matched filter above 5 sigma.

    This is what Rubin's SourceDetectionTask does: convolve with the PSF, threshold, and take the peaks,
    here to a fraction of a pixel.

    Parameters
    ----------
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd.
    origin : `tuple` [`int`, `int`]
        Tract pixel (y, x) of its first element.

    Returns
    -------
    detections : `Detections`
        Peaks, with their point-source fluxes.
    """
    matched = np.where(coadd.matched > 0.0, coadd.matched, np.inf)
    flux = coadd.correlate(coadd.weight * coadd.image, power=1) / matched
    snr = flux * np.sqrt(np.where(coadd.information > 0.0, coadd.information, 0.0))
    peaks = (snr == scipy.ndimage.maximum_filter(snr, 3)) & (snr > 5.0) & coadd.good
    y, x = np.nonzero(peaks)
    dy, dx = peak_offset(snr, y, x)
    return Detections(x + dx + origin[1], y + dy + origin[0], flux[y, x])


def match(detections: Detections, truth: Table, radius: float) -> np.ndarray:
    """Match true objects to a list, each entry to one object at most, the closest pairs first.

    Parameters
    ----------
    detections : `Detections`
        The list.
    truth : `astropy.table.Table`
        True objects.
    radius : `float`
        Largest distance in pixels.

    Returns
    -------
    index : `numpy.ndarray`, (object,), int
        Entry of every object, -1 without one.
    """
    index = np.full(len(truth), -1)
    if len(detections.x) == 0 or len(truth) == 0:
        return index
    tree = scipy.spatial.cKDTree(np.column_stack([detections.x, detections.y]))
    other = scipy.spatial.cKDTree(np.column_stack([truth["x"], truth["y"]]))
    near = other.sparse_distance_matrix(tree, radius, output_type="ndarray")
    taken: set[int] = set()
    for row in np.sort(near, order="v"):
        if index[row["i"]] < 0 and row["j"] not in taken:
            index[row["i"]] = row["j"]
            taken.add(int(row["j"]))
    return index


def split_pairs(index: np.ndarray, truth: Table, detectable: np.ndarray) -> np.ndarray:
    """Tell which close pairs have an entry for each member.

    Parameters
    ----------
    index : `numpy.ndarray`, (object,)
        Result of `match`.
    truth : `astropy.table.Table`
        True objects.
    detectable : `numpy.ndarray`, (object,), bool
        Objects bright enough to count.

    Returns
    -------
    split : `numpy.ndarray`, (pair,), bool
        One value for every pair of two bright enough members.
    """
    split = []
    for pair in np.unique(truth["pair_id"][truth["pair_id"] >= 0]):
        members = np.flatnonzero(truth["pair_id"] == pair)
        if len(members) == 2 and detectable[members].all():
            split.append(bool((index[members] >= 0).all()))
    return np.array(split, dtype=bool)


def aperture_ratios(
    image: np.ndarray, psf: galsim.GSObject, objects: Table, box: Box, pixel_scale: float
) -> np.ndarray:
    """Compare the light around objects with what the truth puts there at the PSF of the image.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Image in nJy.
    psf : `galsim.GSObject`
        PSF of the image with the pixel, in arcsec.
    objects : `astropy.table.Table`
        Isolated objects well inside the image.
    box : `lsst.images.Box`
        Box of the image in tract pixels.
    pixel_scale : `float`
        Size of a pixel in arcsec.

    Returns
    -------
    ratio : `numpy.ndarray`, (object,)
        Measured over true flux within `_APERTURE`.
    """
    radius = _APERTURE / pixel_scale
    size = 2 * math.ceil(radius) + 3
    ratios = []
    for row in objects:
        x, y = row["x"] - box.x.start, row["y"] - box.y.start
        ix, iy = round(x), round(y)
        profile = psf if row["type"] == "star" else galsim.Convolve(galaxy_profile(row), psf, gsparams=GALSIM)
        expected = (
            profile.withFlux(row["flux_nJy"])
            .drawImage(nx=size, ny=size, scale=pixel_scale, offset=(x - ix, y - iy), method="no_pixel")
            .array
        )
        half = size // 2
        cut = np.ascontiguousarray(image[iy - half : iy + half + 1, ix - half : ix + half + 1], dtype=float)
        measured, true = (
            sep.sum_circle(data, [x - ix + half], [y - iy + half], radius, subpix=0)[0][0]
            for data in (cut, expected.astype(float))
        )
        ratios.append(measured / true)
    return np.array(ratios)


def _isolated(truth: Table, box: Box, pixel_scale: float) -> np.ndarray:
    """Return which objects are inside the image and have no neighbour that puts light into their aperture."""
    margin = 2.0 * _APERTURE / pixel_scale + 2.0
    x, y, flux = (np.asarray(truth[name]) for name in ("x", "y", "flux_nJy"))
    inside = (
        (x > box.x.min + margin)
        & (x < box.x.max - margin)
        & (y > box.y.min + margin)
        & (y < box.y.max - margin)
    )
    distance = np.hypot(x[:, None] - x, y[:, None] - y) * pixel_scale
    np.fill_diagonal(distance, np.inf)
    # A star of the flux of its neighbour puts some per cent of it 2 apertures away, and little beyond 4.
    disturbs = (distance < 2.0 * _APERTURE) & (flux > 0.03 * flux[:, None])
    disturbs |= (distance < 4.0 * _APERTURE) & (flux > 3.0 * flux[:, None])
    return inside & ~disturbs.any(axis=1)


def _blank_sky(truth: Table, coadd: Coadd, box: Box, pixel_scale: float) -> np.ndarray:
    """Return the pixels with data that no object lights, also not with the wings of a wide PSF."""
    noise = float(np.median(1.0 / np.sqrt(coadd.weight[coadd.good])))
    psf = galsim.Moffat(beta=_WING_BETA, fwhm=float(coadd.fwhm.max()) * pixel_scale, gsparams=GALSIM)
    light = galsim.ImageD(galsim.BoundsI(box.x.min, box.x.max, box.y.min, box.y.max), init_value=0.0)
    for row in truth:
        profile = psf if row["type"] == "star" else galsim.Convolve(galaxy_profile(row), psf, gsparams=GALSIM)
        profile = profile.withFlux(row["flux_nJy"])
        add_object(light, profile, row["x"], row["y"], pixel_scale, _BLANK * noise, "no_pixel")
    return coadd.good & (light.array < _BLANK * noise)


def _objects(truth: Table, coadd: Coadd, box: Box, pixel_scale: float) -> Table:
    """Return the objects inside the image.

    The further columns say how far above the noise of the coadd a point of their flux is, whether it has data
    there, and whether they are isolated.
    """
    x, y = np.asarray(truth["x"]), np.asarray(truth["y"])
    inside = (x > box.x.min) & (x < box.x.max) & (y > box.y.min) & (y < box.y.max)
    pixels = tuple(np.rint(at[inside] - side.start).astype(int) for at, side in ((y, box.y), (x, box.x)))
    objects = truth[inside]
    objects["snr"] = np.asarray(objects["flux_nJy"]) * np.sqrt(coadd.information[pixels])
    objects["covered"] = coadd.good[pixels]
    objects["isolated"] = _isolated(truth, box, pixel_scale)[inside]
    return objects


def _classes(objects: Table) -> dict[str, np.ndarray]:
    """Return which objects have which name in the rows on fluxes: isolated ones where there are data."""
    snr, mag, star = np.asarray(objects["snr"]), np.asarray(objects["mag"]), objects["type"] == "star"
    clean = np.asarray(objects["isolated"] & objects["covered"])
    return {
        "stars with S/N > 20": star & (snr > 20.0) & clean,
        "galaxies of 22-24 mag": ~star & (mag > 22.0) & (mag <= 24.0) & clean,
        "galaxies of 24-25.5 mag": ~star & (mag > 24.0) & (mag <= 25.5) & clean,
    }


def _relative_sizes(image: np.ndarray, target_sigma: float, objects: Table, box: Box) -> np.ndarray:
    """Return the sizes of bright isolated stars in units of that of the advertised PSF."""
    bright = objects[(objects["type"] == "star") & objects["isolated"] & (objects["snr"] > 100.0)]
    advertised = fit_star(gaussian_stamp(target_sigma, 25), radius=4).sigma
    places = zip(bright["x"] - box.x.start, bright["y"] - box.y.start, strict=True)
    return np.array([fit_star(image, x=float(x), y=float(y), radius=4).sigma / advertised for x, y in places])


def evaluate(
    coadd: Coadd,
    model: np.ndarray,
    target_sigma: float,
    sources: Table,
    truth: Table,
    box: Box,
    pixel_scale: float,
) -> list[Gain]:
    """Compare the plain coadd and the restored patch with the truth.

    Parameters
    ----------
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd; the PSF of the first cell that has one stands for that of all.
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy.
    target_sigma : `float`
        Sigma of its advertised PSF in pixels.
    sources : `astropy.table.Table`
        Source list of the restored patch.
    truth : `astropy.table.Table`
        True objects, also those beyond the border whose light reaches the patch.
    box : `lsst.images.Box`
        Box of the images in tract pixels.
    pixel_scale : `float`
        Size of a pixel in arcsec.

    Returns
    -------
    gains : `list` [`Gain`]
        The rows of the table.
    """
    i, j = np.argwhere(np.isfinite(coadd.psf[:, :, 0, 0]))[0]
    coadd_fwhm = float(coadd.fwhm[i, j]) * pixel_scale
    stamp = galsim.InterpolatedImage(galsim.Image(coadd.psf[i, j].copy()), scale=pixel_scale, flux=1.0)
    target = galsim.Gaussian(sigma=target_sigma * pixel_scale, gsparams=GALSIM)
    image = np.nan_to_num(model)
    objects = _objects(truth, coadd, box, pixel_scale)
    sky = _blank_sky(truth, coadd, box, pixel_scale)
    catalogue = Detections(*(np.asarray(sources[name], dtype=float) for name in ("x", "y", "flux")))
    plain = coadd_detections(coadd, (box.y.start, box.x.start))
    in_catalogue, in_plain = (
        match(detections, objects, _MATCH_RADIUS / pixel_scale) for detections in (catalogue, plain)
    )
    sizes = _relative_sizes(image, target_sigma, objects, box)
    gains = [
        Gain(
            "seeing, FWHM of the PSF (arcsec)",
            "median",
            np.array([coadd_fwhm]),
            np.array([target_sigma * FWHM_PER_SIGMA * pixel_scale]),
        ),
        Gain("size of stars with S/N > 100 against the PSF (%)", "bias", np.empty(0), sizes),
    ]
    scatters: dict[str, Callable[[np.ndarray], float]] = {
        "rms of the blank sky (nJy)": np.std,
        "robust scatter of the blank sky (nJy)": functools.partial(
            scipy.stats.median_abs_deviation, scale="normal"
        ),
    }
    for name, scatter in scatters.items():
        values = (np.array([scatter(a[sky])]) if sky.any() else np.empty(0) for a in (coadd.image, image))
        gains.append(Gain(name, "median", *values))
    for name, chosen in _classes(objects).items():
        some, entry = objects[chosen], in_catalogue[chosen]
        in_images = (
            aperture_ratios(pixels, psf, some, box, pixel_scale)
            for pixels, psf in ((coadd.image, stamp), (image, target))
        )
        ratios = catalogue.flux[entry[entry >= 0]] / np.asarray(some["flux_nJy"])[entry >= 0]
        gains += [
            Gain(f"flux in the image, {name} (%)", "bias", *in_images),
            Gain(f"flux in the catalogue, {name} (%)", "bias", np.empty(0), ratios),
        ]
    snr, covered = np.asarray(objects["snr"]), np.asarray(objects["covered"])
    detectable = (snr > 5.0) & covered
    near = 0.5 * coadd_fwhm / pixel_scale
    return [
        *gains,
        Gain(
            "true sources with S/N > 5 found (%)",
            "share",
            in_plain[detectable] >= 0,
            in_catalogue[detectable] >= 0,
        ),
        Gain(
            "entries without a true source (%)",
            "share",
            *(~np.isin(np.arange(len(d.x)), match(d, objects, near)) for d in (plain, catalogue)),
        ),
        Gain(
            "pairs at 0.5-0.9 arcsec split (%)",
            "share",
            *(split_pairs(index, objects, (snr > 10.0) & covered) for index in (in_plain, in_catalogue)),
        ),
    ]
