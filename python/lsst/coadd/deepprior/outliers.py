# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Pixels of a visit that the sky, as the other visits show it, does not explain."""

from __future__ import annotations

__all__ = (
    "OUTLIER_PSF_ERROR",
    "Outlier",
    "find_outliers",
    "local_level",
    "outlier_table",
    "outliers_of_visit",
    "shared_deficit",
)

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional
from astropy import units as u
from astropy.table import Column, Table

from .box_maximum import box_maximum
from .psf import gaussian_stamp, shift_stamp
from .smoothing import separably_smooth

_OUTLIER_SIGMA = 5.5
"""Significance of an outlier; noise alone reaches it in one pixel of 30 million."""

_OUTLIER_RIM_SIGMA = 2.5
"""Significance of the pixels around an outlier that are rejected with it."""

OUTLIER_PSF_ERROR = 0.1
"""Relative error granted to the model where outliers are judged, so that a star that moved by a tenth of a
pixel, or varies by some per cent, is not rejected."""

_OUTLIER_SMOOTHING = 1.5
"""Sigma in pixels of the Gaussian that gathers faint trails, a little narrower than usual seeing."""

_APART = 16
"""Distance in pixels at which smoothed noise is independent, and sky that is left is the same."""

_ENOUGH = 200
"""Least number of pairs of pixels that tell the scatter of smoothed noise, to some per cent."""

_SQUARE = 32
"""Side in pixels of the squares that levels are measured in: smaller than the bowl that the subtraction of a
local background leaves around a galaxy, and a level is known to 3 % of the noise of a pixel."""

_LEAST_LEVEL = 0.1
"""Smallest deficit in standard deviations of a pixel. It shifts the smoothed deviations, whose noise is
five times smaller, by half a standard deviation."""


def find_outliers(residual: torch.Tensor, scale: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Find pixels far from the model, single (cosmic rays) or together (trails), with their neighbourhood.

    Parameters
    ----------
    residual : `torch.Tensor`, (y, x)
        Visit minus model.
    scale : `torch.Tensor`, (y, x)
        Standard deviation of ``residual``, in its unit.
    good : `torch.Tensor`, (y, x), bool
        Pixels that may be used.

    Returns
    -------
    outliers : `torch.Tensor`, (y, x), bool
        Pixels to reject, or to look at.
    """
    deviation = torch.where(good, residual / scale, 0.0)
    profile = gaussian_stamp(_OUTLIER_SMOOTHING).sum(axis=0)
    # No pixel counts for more than an outlier, so that a cosmic ray rejects its own surroundings only.
    bounded = deviation.clamp(-_OUTLIER_SIGMA, _OUTLIER_SIGMA)
    smooth = separably_smooth(bounded, profile.tolist())
    norm = separably_smooth(good.to(scale.dtype), (profile**2).tolist())
    together = torch.where(good, smooth / norm.clamp_min(1e-6).sqrt(), 0.0)
    together /= _scatter(together, good)
    return _grown_peaks(deviation.abs(), 1) | _grown_peaks(together.abs(), 3)


def local_level(
    residual: torch.Tensor, scale: torch.Tensor, good: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Measure how far a visit lies above its model, square by square.

    With :math:`d = (y - K u) / s`, good pixels m and sums over a square, it is the robust mean

    .. math:: l = \frac{\sum m\, \mathrm{clip}(d, \pm 2.5) / s}{\sum m / s^2}.

    Parameters
    ----------
    residual, scale, good : `torch.Tensor`, (y, x)
        See `find_outliers`.

    Returns
    -------
    level : `torch.Tensor`, (i, j)
        The level in the unit of ``residual``, NaN without a good pixel.
    noise : `torch.Tensor`, (i, j)
        Standard deviation of a pixel, likewise.
    """
    inverse = torch.where(good, 1.0 / scale, 0.0)
    pull = (residual * inverse).clamp(-_OUTLIER_RIM_SIGMA, _OUTLIER_RIM_SIGMA) * inverse
    images = torch.stack([pull, inverse.square(), good.to(scale.dtype)])
    pull, weight, n_good = torch.nn.functional.avg_pool2d(images, _SQUARE, ceil_mode=True)
    return pull / weight, (n_good / weight).sqrt()


def shared_deficit(levels: torch.Tensor, noise: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return how far most visits lie below a model that cannot be negative: sky that was oversubtracted.

    It is the median of their levels, the upper one of two, and 0 where that is positive or too small to make
    outliers.

    Parameters
    ----------
    levels, noise : `torch.Tensor`, (visit, i, j)
        What `local_level` returns of each visit.
    shape : `tuple` [`int`, `int`]
        Shape of the images of the visits.

    Returns
    -------
    deficit : `torch.Tensor`, (y, x)
        Not positive, in the unit of ``levels``; linear between the centres of the squares.
    """
    upper_median = -(-levels).nanmedian(dim=0).values
    least = _LEAST_LEVEL * noise.nan_to_num(torch.inf).amin(dim=0)
    level = torch.where(upper_median < -least, upper_median, 0.0)[None, None]
    smooth = torch.nn.functional.interpolate(level, scale_factor=_SQUARE, mode="bilinear")
    return smooth[0, 0, : shape[0], : shape[1]]


def _scatter(together: torch.Tensor, good: torch.Tensor) -> float:
    """Return the scatter of smoothed deviations, 1 at least and for white noise.

    It is that of their differences between places that are apart, so that a slope of the sky does not count.
    """
    first, second = (np.s_[::4, :-_APART:4], np.s_[::4, _APART::4])
    differences = (together[first] - together[second])[good[first] & good[second]]
    if len(differences) < _ENOUGH:
        return 1.0
    share = torch.tensor([0.1587, 0.8413], dtype=differences.dtype, device=differences.device)
    low, high = differences.quantile(share).tolist()
    return max(1.0, 0.5 * (high - low) / math.sqrt(2.0))


def _grown_peaks(significance: torch.Tensor, reach: int) -> torch.Tensor:
    """Return pixels above `_OUTLIER_RIM_SIGMA` within some pixels of one above `_OUTLIER_SIGMA`."""
    peaks = (significance > _OUTLIER_SIGMA).to(significance.dtype)
    return (box_maximum(peaks, 2 * reach + 1, 2 * reach + 1) > 0) & (significance > _OUTLIER_RIM_SIGMA)


@dataclasses.dataclass(frozen=True)
class Outlier:
    """Connected pixels of one visit that were rejected as outliers.

    Parameters
    ----------
    visit : `int`
        Index of the visit.
    pixels : `tuple` [`numpy.ndarray`, `numpy.ndarray`]
        Rows and columns in the array of the patch.
    x, y : `float`
        Position in the array of the patch, weighted with the absolute residual.
    length, width : `float`
        Standard deviations of the pixels' positions along the major and minor axis in pixels; that of a
        single pixel is 12^(-1/2).
    flux, flux_err : `float`
        Sum of data minus model over the pixels in nJy, and its error from the variances.
    psf_flux, psf_flux_err : `float`
        Flux in nJy of a point source at the position, and its error; NaN if no pixel under it has data.
    peak_snr : `float`
        Largest absolute residual in units of its noise.
    """

    visit: int
    pixels: tuple[np.ndarray, np.ndarray]
    x: float
    y: float
    length: float
    width: float
    flux: float
    flux_err: float
    psf_flux: float
    psf_flux_err: float
    peak_snr: float


def outliers_of_visit(
    visit: int,
    rejected: np.ndarray,
    residual: np.ndarray,
    variance: np.ndarray,
    good: np.ndarray,
    psf: Callable[[int, int], np.ndarray],
) -> list[Outlier]:
    """Measure the outliers of a visit.

    Parameters
    ----------
    visit : `int`
        Index of the visit.
    rejected : `numpy.ndarray`, (y, x), bool
        Outliers on the pixels of the patch.
    residual, variance : `numpy.ndarray`, (y, x)
        Visit minus model in nJy, and its variance in nJy^2.
    good : `numpy.ndarray`, (y, x), bool
        Pixels of the visit that may be used.
    psf : `~collections.abc.Callable`
        Function of a row and column that returns the PSF stamp (k, k) of their cell.

    Returns
    -------
    outliers : `list` [`Outlier`]
        One for each group of pixels that touch, diagonally too.
    """
    labels, n = scipy.ndimage.label(rejected, np.ones((3, 3)))
    result = []
    for number, box in enumerate(scipy.ndimage.find_objects(labels, n), start=1):
        rows, columns = np.nonzero(labels[box] == number)
        rows, columns = rows + box[0].start, columns + box[1].start
        values, variances = residual[rows, columns].astype(float), variance[rows, columns].astype(float)
        weight = np.abs(values) / np.abs(values).sum()
        y, x = float(weight @ rows), float(weight @ columns)
        # Their centre may lie in a cell in which the visit has no pixel and no PSF.
        nearest = np.argmin((rows - y) ** 2 + (columns - x) ** 2)
        stamp = psf(int(rows[nearest]), int(columns[nearest]))
        moments = np.cov(np.stack([rows, columns]), ddof=0, aweights=weight) + np.eye(2) / 12.0
        minor, major = np.sqrt(np.linalg.eigvalsh(moments))
        psf_flux, psf_flux_err = _point_flux(residual, variance, good, stamp, y, x)
        result.append(
            Outlier(
                visit=visit,
                pixels=(rows, columns),
                x=x,
                y=y,
                length=float(major),
                width=float(minor),
                flux=float(values.sum()),
                flux_err=float(np.sqrt(variances.sum())),
                psf_flux=psf_flux,
                psf_flux_err=psf_flux_err,
                peak_snr=float(np.max(np.abs(values) / np.sqrt(variances))),
            )
        )
    return result


def _point_flux(
    residual: np.ndarray, variance: np.ndarray, good: np.ndarray, stamp: np.ndarray, y: float, x: float
) -> tuple[float, float]:
    """Fit a point source at a position; return its flux and error, NaN without data."""
    half, iy, ix = stamp.shape[0] // 2, round(y), round(x)
    shifted = shift_stamp(stamp, x - ix, y - iy)
    y0, x0 = max(iy - half, 0), max(ix - half, 0)
    box = np.s_[y0 : iy + half + 1, x0 : ix + half + 1]
    height, width = residual[box].shape
    shifted = shifted[y0 - iy + half :, x0 - ix + half :][:height, :width]
    # One weight for all pixels, so that the photons of the source itself do not bias its flux.
    information = float((shifted**2)[good[box]].sum())
    if information == 0.0:
        return float("nan"), float("nan")
    flux = (shifted * residual[box])[good[box]].sum() / information
    error = np.sqrt((shifted**2 * variance[box])[good[box]].sum()) / information
    return float(flux), float(error)


_COLUMNS: dict[str, tuple[type, u.UnitBase | None, str]] = {
    "id": (int, None, "Number of the outlier in its patch and band, from 1."),
    "instrument": (str, None, "Instrument of the visit."),
    "visit": (int, None, "Visit that shows it."),
    "day_obs": (int, None, "Night of the visit, YYYYMMDD."),
    "x": (float, u.pix, "Position on the tract's pixel grid, x."),
    "y": (float, u.pix, "Position on the tract's pixel grid, y."),
    "ra": (float, u.deg, "Right ascension (ICRS)."),
    "dec": (float, u.deg, "Declination (ICRS)."),
    "n_pixels": (int, None, "Number of pixels."),
    "length": (float, u.pix, "Standard deviation of the pixels' positions along the major axis."),
    "width": (float, u.pix, "The same along the minor axis; trails are much longer than wide."),
    "flux": (float, u.nJy, "Sum of visit minus model over the pixels; negative where light is missing."),
    "flux_err": (float, u.nJy, "Its error from the variances."),
    "psf_flux": (float, u.nJy, "Flux of a point source at the position in visit minus model."),
    "psf_flux_err": (float, u.nJy, "Its error from the variances."),
    "peak_snr": (float, None, "Largest absolute deviation of a pixel in units of its noise."),
}


def outlier_table(
    outliers: Sequence[Outlier],
    visits: Sequence[Any],
    origin: tuple[int, int],
    pixel_to_sky: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Table:
    """Make the table of the outliers of a patch.

    Parameters
    ----------
    outliers : `~collections.abc.Sequence` [`Outlier`]
        The outliers.
    visits : `~collections.abc.Sequence`
        The visits, by the index that outliers have, with the attributes ``instrument``, ``visit`` and
        ``day_obs``.
    origin : `tuple` [`int`, `int`]
        Tract pixel ``(y0, x0)`` of the first element of the patch.
    pixel_to_sky : `~collections.abc.Callable`
        Function of tract pixels ``x`` and ``y`` that returns right ascension and declination in degrees.

    Returns
    -------
    table : `astropy.table.Table`
        One row an outlier, visit by visit, with units and descriptions.
    """
    rows = sorted(outliers, key=lambda one: (one.visit, one.y, one.x))
    columns: dict[str, Sequence[object] | np.ndarray] = {
        "id": np.arange(1, len(rows) + 1),
        **{
            name: [getattr(visits[one.visit], name) for one in rows]
            for name in ("instrument", "visit", "day_obs")
        },
        "x": np.array([one.x for one in rows]) + origin[1],
        "y": np.array([one.y for one in rows]) + origin[0],
        "n_pixels": [len(one.pixels[0]) for one in rows],
    }
    columns["ra"], columns["dec"] = pixel_to_sky(np.asarray(columns["x"]), np.asarray(columns["y"]))
    for name in ("length", "width", "flux", "flux_err", "psf_flux", "psf_flux_err", "peak_snr"):
        columns[name] = [getattr(one, name) for one in rows]
    return Table(
        [
            Column(np.asarray(columns[name], dtype=kind), name=name, unit=unit, description=text)
            for name, (kind, unit, text) in _COLUMNS.items()
        ]
    )
