# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Measures of an image against the truth: small functions of plain arrays, positions in array coordinates.

``where`` is always the pixels that count, (y, x) bool; images are (y, x).
"""

from __future__ import annotations

__all__ = (
    "Excess",
    "aperture_ratio",
    "found_at_purity",
    "left_over",
    "match_by_rank",
    "near",
    "nrmse",
    "peaks",
    "psnr",
    "ring",
    "seam",
    "ssim",
    "star_shape",
    "stretch",
)

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import scipy.signal
import scipy.spatial
import sep

from lsst.coadd.deepprior.moments import peak_offset
from lsst.coadd.deepprior.psf import fit_star

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
"""Gaussian window of 11x11 pixels (Wang, Bovik, Sheikh & Simoncelli 2004, IEEE TIP 13, 600)."""

_SSIM_K1, _SSIM_K2 = 0.01, 0.03
"""Constants of the same paper."""

_STAR_RADIUS = 4
"""Half the side in pixels of the box in which stars and PSF stamps are fitted."""

_SEAM_WIDTH = 3
"""Pixels on either side of a line that are averaged."""


def stretch(image: np.ndarray, noise: float) -> np.ndarray:
    """Return ``asinh(image / noise)``, in which the sky is linear and stars are logarithmic."""
    return np.arcsinh(np.asarray(image, dtype=float) / noise)


def psnr(image: np.ndarray, truth: np.ndarray, data_range: float, where: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio ``10 log10(data_range^2 / mean square error)`` in dB."""
    mean_square = float(np.mean((image - truth)[where] ** 2))
    return math.inf if mean_square == 0.0 else 10.0 * math.log10(data_range**2 / mean_square)


def ssim(image: np.ndarray, truth: np.ndarray, data_range: float, where: np.ndarray) -> float:
    """Return the mean structural similarity (Wang et al. 2004, equation 13) with their Gaussian window."""

    def mean(a: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(a, _SSIM_SIGMA, radius=_SSIM_RADIUS)

    image, truth = np.asarray(image, dtype=float), np.asarray(truth, dtype=float)
    c1, c2 = (_SSIM_K1 * data_range) ** 2, (_SSIM_K2 * data_range) ** 2
    mx, my = mean(image), mean(truth)
    vx, vy, cov = mean(image**2) - mx**2, mean(truth**2) - my**2, mean(image * truth) - mx * my
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(np.mean(index[where]))


def nrmse(image: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """Return the rms error over the rms of the truth, both linear."""
    square = float(np.mean(truth[where] ** 2))
    return math.sqrt(float(np.mean((image - truth)[where] ** 2)) / square) if square > 0.0 else math.nan


def near(shape: tuple[int, int], x: Sequence[float], y: Sequence[float], radius: float) -> np.ndarray:
    """Return the pixels within some distance of any position."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    result = np.zeros(shape, dtype=bool)
    for x0, y0 in zip(x, y, strict=True):
        result |= (columns - x0) ** 2 + (rows - y0) ** 2 <= radius**2
    return result


def aperture_ratio(error: np.ndarray, alone: np.ndarray, x: float, y: float, radius: float) -> float:
    """Return the flux of an object within a radius in pixels over its true flux there.

    Parameters
    ----------
    error : `numpy.ndarray`, (y, x)
        Image minus truth; so neighbours are subtracted as they truly are.
    alone : `numpy.ndarray`, (y, x)
        True image of the object without its neighbours.
    x, y : `float`
        Its position.
    radius : `float`
        Radius of the aperture.

    Returns
    -------
    ratio : `float`
        1 where the image is the truth.
    """
    missing, true = (
        sep.sum_circle(np.array(image, dtype=float), [x], [y], radius, subpix=0)[0][0]
        for image in (error, alone)
    )
    return float(1.0 + missing / true)


def star_shape(
    error: np.ndarray, alone: np.ndarray, x: float, y: float, psf: np.ndarray
) -> tuple[float, float, float]:
    """Compare the Gaussian fit of a star, neighbours subtracted, with that of the advertised PSF.

    Parameters
    ----------
    error, alone, x, y
        As in `aperture_ratio`.
    psf : `numpy.ndarray`, (k, k)
        Stamp of the PSF, centred.

    Returns
    -------
    size : `float`
        Sigma over that of the PSF.
    e1, e2 : `float`
        Ellipticity minus that of the PSF.
    """
    star = fit_star(error + alone, x=x, y=y, radius=_STAR_RADIUS)
    advertised = fit_star(psf, radius=_STAR_RADIUS)
    return star.sigma / advertised.sigma, star.e1 - advertised.e1, star.e2 - advertised.e2


@dataclasses.dataclass(frozen=True)
class Excess:
    """Mean in the pixels of an artifact minus that around it, and the number of pixels in it."""

    value: float
    n_pixels: int


def left_over(
    error: np.ndarray, artifact: np.ndarray, sky: np.ndarray, gap: int = 3, reach: int = 12
) -> Excess:
    """Measure what is left of an artifact on blank sky.

    Parameters
    ----------
    error : `numpy.ndarray`, (y, x)
        Image minus truth.
    artifact : `numpy.ndarray`, (y, x), bool
        Pixels of the artifact.
    sky : `numpy.ndarray`, (y, x), bool
        Blank pixels.
    gap, reach : `int`
        The surroundings are the blank pixels more than ``gap`` and at most ``reach`` pixels away from it.

    Returns
    -------
    excess : `Excess`
        In the unit of ``error``; NaN if there is nothing to measure.
    """
    inside = artifact & sky
    distance = scipy.ndimage.distance_transform_edt(~artifact) if artifact.any() else np.zeros(error.shape)
    around = sky & (distance > gap) & (distance <= reach)
    if not inside.any() or not around.any():
        return Excess(math.nan, 0)
    return Excess(float(error[inside].mean() - error[around].mean()), int(inside.sum()))


def peaks(
    image: np.ndarray, psf: np.ndarray, noise: np.ndarray, where: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the local maxima of an image after a matched filter with its own PSF.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Image, finite.
    psf : `numpy.ndarray`, (k, k)
        Stamp of its PSF.
    noise : `numpy.ndarray`, (y, x)
        Relative noise of the data, by which heights are divided, so that poorly covered pixels do not lead
        the ranking.
    where : `numpy.ndarray`, (y, x), bool
        Pixels that may be peaks.

    Returns
    -------
    x, y : `numpy.ndarray`, (peak,)
        Positions to a fraction of a pixel, highest peak first.
    """
    height = scipy.signal.fftconvolve(image, psf[::-1, ::-1], mode="same") / noise
    chosen = (height == scipy.ndimage.maximum_filter(height, 3)) & (height > 0.0) & where
    rows, columns = np.nonzero(chosen)
    order = np.argsort(-height[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    dy, dx = peak_offset(height, rows, columns)
    return columns + dx, rows + dy


def match_by_rank(
    x: np.ndarray, y: np.ndarray, true_x: np.ndarray, true_y: np.ndarray, radius: float
) -> np.ndarray:
    """Give every entry of a ranked list the nearest true object that no entry before it has.

    So the matches of the first n entries do not depend on what follows.

    Returns
    -------
    index : `numpy.ndarray`, (entry,), int
        True object, -1 where there is none within ``radius``.
    """
    index = np.full(len(x), -1)
    if len(x) == 0 or len(true_x) == 0:
        return index
    tree = scipy.spatial.cKDTree(np.column_stack([true_x, true_y]))
    taken: set[int] = set()
    for entry, position in enumerate(zip(x, y, strict=True)):
        candidates = [i for i in tree.query_ball_point(position, radius) if i not in taken]
        if candidates:
            best = min(candidates, key=lambda i: math.hypot(true_x[i] - position[0], true_y[i] - position[1]))
            index[entry] = best
            taken.add(best)
    return index


def found_at_purity(index: np.ndarray, n_true: int, purity: float = 0.95) -> np.ndarray:
    """Go down a ranked list to the last entry at which it is pure enough; tell which true objects it holds.

    Parameters
    ----------
    index : `numpy.ndarray`, (entry,)
        Result of `match_by_rank`.
    n_true : `int`
        Number of true objects.
    purity : `float`
        Least share of entries with a true object.

    Returns
    -------
    found : `numpy.ndarray`, (object,), bool
        Objects in the list.
    """
    found = np.zeros(n_true, dtype=bool)
    share = np.cumsum(index >= 0) / np.arange(1, len(index) + 1)
    pure = np.flatnonzero(share >= purity)
    if len(pure):
        kept = index[: pure[-1] + 1]
        found[kept[kept >= 0]] = True
    return found


def seam(
    error: np.ndarray, borders: tuple[Sequence[int], Sequence[int]], where: np.ndarray
) -> tuple[float, float]:
    """Measure the step of an image across the borders of cells.

    Parameters
    ----------
    error : `numpy.ndarray`, (y, x)
        Image minus truth.
    borders : `tuple` [`~collections.abc.Sequence` [`int`], `~collections.abc.Sequence` [`int`]]
        First row and first column of every cell but the first.
    where : `numpy.ndarray`, (y, x), bool
        Pixels that count.

    Returns
    -------
    step : `float`
        The largest step across a border, in the unit of ``error``.
    ratio : `float`
        The same over the rms of the steps across all other lines; noise alone stays below 3 or so.
    """
    largest, ratio = 0.0, 0.0
    for axis, lines in enumerate(borders):
        image, valid = (a if axis == 0 else a.T for a in (np.where(where, error, 0.0), where))
        sums, counts = image.sum(axis=1), valid.sum(axis=1)
        usable = np.arange(_SEAM_WIDTH, len(sums) - _SEAM_WIDTH + 1)

        def side(start: np.ndarray, sums: np.ndarray = sums, counts: np.ndarray = counts) -> np.ndarray:
            rows = start[:, None] + np.arange(_SEAM_WIDTH)
            return sums[rows].sum(axis=1) / np.maximum(counts[rows].sum(axis=1), 1)

        steps = np.abs(side(usable) - side(usable - _SEAM_WIDTH))
        at_border = np.isin(usable, lines)
        if at_border.any() and not at_border.all():
            step = float(steps[at_border].max())
            scatter = float(np.sqrt(np.mean(steps[~at_border] ** 2)))
            largest = max(largest, step)
            ratio = max(ratio, step / scatter if scatter > 0.0 else math.inf if step > 0.0 else 0.0)
    return largest, ratio


def ring(error: np.ndarray, x: float, y: float, inner: float, outer: float, where: np.ndarray) -> float:
    """Return the largest deviation of the mean profile around a star, in the unit of ``error``.

    The profile is the mean in rings one pixel wide between two radii, in pixels.
    """
    rows, columns = np.ogrid[: error.shape[0], : error.shape[1]]
    radius = np.hypot(columns - x, rows - y)
    chosen = where & (radius >= inner) & (radius < outer)
    bins = np.floor(radius[chosen] - inner).astype(int)
    counts = np.bincount(bins)
    means = np.bincount(bins, weights=error[chosen])[counts > 0] / counts[counts > 0]
    return float(np.abs(means).max()) if len(means) else math.nan
