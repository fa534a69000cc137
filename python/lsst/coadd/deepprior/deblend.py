# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Sources of a restored image: its peaks, the light of each, and which of them the data asks for."""

from __future__ import annotations

__all__ = ("BLEND", "DetectionSettings", "detect_sources", "shown", "significance")

import dataclasses
import math

import numpy as np
import scipy.ndimage
import scipy.sparse

from .joint_fit import JointFit
from .plain_coadd import Coadd
from .psf import gaussian_stamp
from .stamps import Stamp, sum_stamps

BLEND = 0.05
"""Two sources are blended when the correlation of their templates exceeds this."""


@dataclasses.dataclass(frozen=True)
class DetectionSettings:
    """What decides which sources enter the catalogue."""

    min_snr: float = 5.0
    """Smallest ratio of flux to its error, and of the height of a peak above the saddle to a higher one to
    the peak of a point source with a flux of one standard error."""
    min_rise: float = 2.5
    """Smallest ratio of that height to the standard deviation of ``x``."""
    threshold: float = 0.7
    """Surface brightness at which sources end on ``x``, in units of the peak that a point source with a flux
    of one standard error of the data has there."""
    psf_error: float = 0.02
    """Share of a neighbour's light under a source, or of the light at a saddle, that errors of the PSF may
    have put there."""


def detect_sources(
    model: np.ndarray, model_error: np.ndarray, sigma: float, coadd: Coadd, settings: DetectionSettings
) -> tuple[list[Stamp], list[Stamp]]:
    """Find the sources of a restored image and share its light between them.

    Parameters
    ----------
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy, finite.
    model_error : `numpy.ndarray`, (y, x)
        Its standard deviation in nJy, 0 where it is not known.
    sigma : `float`
        Sigma in pixels of its Gaussian PSF.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Data and noise that decide what is a source.
    settings : `DetectionSettings`
        Thresholds.

    Returns
    -------
    pieces : `list` [`~lsst.coadd.deepprior.stamps.Stamp`]
        The part of the model that belongs to each source, in nJy.
    templates : `list` [`~lsst.coadd.deepprior.stamps.Stamp`]
        The pieces carried to the coadd PSF, for unit flux.
    """
    unit = _unit(sigma, coadd)
    rise = np.maximum(settings.min_snr * unit, settings.min_rise * model_error)
    segments, peaks = _segments(model, unit, rise, settings)
    islands = scipy.ndimage.label(segments, np.ones((3, 3)))[0][tuple(peaks.T)]
    return _accepted(_pieces(model, segments, peaks, coadd), islands, coadd, settings)


def shown(model: np.ndarray, sigma: float, coadd: Coadd, settings: DetectionSettings) -> np.ndarray:
    """Return where a restored image has light.

    Parameters
    ----------
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy, finite.
    sigma : `float`
        Sigma in pixels of its Gaussian PSF.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Noise of the data.
    settings : `DetectionSettings`
        Holds the threshold.

    Returns
    -------
    shown : `numpy.ndarray`, (y, x), bool
        Pixels above the threshold.
    """
    return model > settings.threshold * _unit(sigma, coadd)


def _unit(sigma: float, coadd: Coadd) -> np.ndarray:
    """Return the peak, (y, x) in nJy, on the restored image of a point source whose flux is its error."""
    return gaussian_stamp(sigma).max() / np.sqrt(np.maximum(coadd.information, 1e-30))


def significance(fit: JointFit, settings: DetectionSettings) -> np.ndarray:
    """Return the ratio of all fluxes of a fit to their errors, traces of the neighbours included.

    Parameters
    ----------
    fit : `~lsst.coadd.deepprior.joint_fit.JointFit`
        Joint fit of templates.
    settings : `DetectionSettings`
        Holds the error of the PSF that leaves such traces.

    Returns
    -------
    snr : `numpy.ndarray`, (source,)
        The ratios.
    """
    flux = fit.solution()
    light = np.maximum(flux, 0.0)
    neighbours = fit.normal @ light / fit.normal.diagonal() - light
    return flux / np.hypot(fit.errors(), settings.psf_error * neighbours)


def _segments(
    model: np.ndarray, unit: np.ndarray, rise: np.ndarray, settings: DetectionSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the model into one segment a peak.

    Every pixel belongs to the peak that steepest ascent leads to; peaks that rise too little above the
    saddle to a higher one are merged with it, the highest saddle first (topological persistence).

    Returns labels (y, x), 0 where there is no source, and the positions (label - 1, 2) of the peaks.
    """
    inside = model > settings.threshold * unit
    height = np.pad(np.where(inside, model, -np.inf), 1, constant_values=-np.inf)
    steps = [(0, 0), *((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)]
    core = np.s_[1:-1, 1:-1]
    around = np.stack([np.roll(height, (-dy, -dx), axis=(0, 1))[core] for dy, dx in steps])
    offset = np.array([dy * height.shape[1] + dx for dy, dx in steps])
    target = np.arange(height.size).reshape(height.shape)
    target[core] += offset[around.argmax(axis=0)]
    uphill = target.ravel()
    while not np.array_equal(further := uphill[uphill], uphill):
        uphill = further
    basin = uphill.reshape(height.shape)[core]

    saddles: list[tuple[np.ndarray, ...]] = []
    for first, second in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1, :], np.s_[1:, :]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        border = (basin[first] != basin[second]) & inside[first] & inside[second]
        level = np.minimum(model[first], model[second])
        saddles.append((level[border], basin[first][border], basin[second][border]))
    levels, firsts, seconds = (np.concatenate(values) for values in zip(*saddles, strict=True))

    heights, rises = height.ravel(), np.pad(rise, 1).ravel()
    parent = {int(peak): int(peak) for peak in np.unique(basin[inside])}

    def summit(peak: int) -> int:
        while parent[peak] != peak:
            parent[peak] = peak = parent[parent[peak]]
        return peak

    for n in np.argsort(-levels, kind="stable"):
        low, high = sorted((summit(int(firsts[n])), summit(int(seconds[n]))), key=lambda peak: heights[peak])
        least = np.hypot(rises[low], settings.min_snr * settings.psf_error * levels[n])
        if low != high and heights[low] - levels[n] < least:
            parent[low] = high

    summits = sorted({summit(peak) for peak in parent})
    label = {peak: n for n, peak in enumerate(summits, start=1)}
    table = np.zeros(height.size, dtype=np.int32)
    table[list(parent)] = [label[summit(peak)] for peak in parent]
    peaks = np.transpose(np.unravel_index(np.array(summits, dtype=int), height.shape)) - 1
    return np.where(inside, table[basin], 0), peaks


def _pieces(model: np.ndarray, segments: np.ndarray, peaks: np.ndarray, coadd: Coadd) -> list[Stamp]:
    """Share the light of the model between its peaks."""
    reach = math.ceil(np.nanmedian(coadd.fwhm)) if len(peaks) else 0
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    padded = np.pad(segments, reach)
    total = np.zeros(model.shape)
    shares = []
    for label, box in enumerate(scipy.ndimage.find_objects(segments), start=1):
        ys, xs = (
            slice(max(s.start - reach, 0), min(s.stop + reach, n))
            for s, n in zip(box, model.shape, strict=True)
        )
        own = padded[ys.start : ys.stop + 2 * reach, xs.start : xs.stop + 2 * reach] == label
        inside = scipy.ndimage.binary_dilation(own, disc)[reach:-reach, reach:-reach]
        mirror_y = 2 * peaks[label - 1, 0] - np.arange(ys.start, ys.stop)
        mirror_x = 2 * peaks[label - 1, 1] - np.arange(xs.start, xs.stop)
        valid = np.outer(
            *((m >= 0) & (m < n) for m, n in zip((mirror_y, mirror_x), model.shape, strict=True))
        )
        mirrored = np.where(
            valid, model[np.ix_(mirror_y % model.shape[0], mirror_x % model.shape[1])], np.inf
        )
        # The small term gives the pixels that only one source reaches to it, whatever lies opposite.
        share = inside * (np.minimum(model[ys, xs], mirrored) + 1e-6 * model[ys, xs])
        total[ys, xs] += share
        shares.append(Stamp(ys.start, xs.start, share))
    part = np.divide(model, total, out=np.zeros(model.shape), where=total > 0.0)
    return [Stamp(s.y0, s.x0, s.array * part[s.slices]) for s in shares]


def _accepted(
    pieces: list[Stamp], islands: np.ndarray, coadd: Coadd, settings: DetectionSettings
) -> tuple[list[Stamp], list[Stamp]]:
    """Merge or drop the pieces that the data does not ask for; return those left and their templates.

    A weak piece goes to the neighbour on its island of pixels above the threshold that it overlaps most,
    the weakest first; without one it is dropped.
    """
    carried = [coadd.carry(piece) for piece in pieces]
    alone = np.bincount(islands)[islands] == 1
    groups = []
    for k, stamp in enumerate(carried):
        weighted = coadd.weight[stamp.slices] * stamp.array
        noise = math.sqrt((weighted**2 * coadd.variance[stamp.slices]).sum())
        signal = (weighted * coadd.image[stamp.slices]).sum()
        if noise > 0.0 and not (alone[k] and signal < settings.min_snr * noise):
            groups.append([k])
    if not groups:
        return [], []
    # In units of a piece's own light the template of a merger is the sum of the two.
    fit = JointFit.of([carried[k] for (k,) in groups], coadd)
    while groups:
        snr = significance(fit, settings)
        island = islands[[group[0] for group in groups]]
        overlaps = fit.correlation()
        target = np.arange(len(groups))
        for k in np.flatnonzero(snr < settings.min_snr).tolist():
            entries = slice(overlaps.indptr[k], overlaps.indptr[k + 1])
            others, overlap = overlaps.indices[entries], overlaps.data[entries]
            near = (overlap > BLEND) & (island[others] == island[k])
            others, overlap = others[near], overlap[near]
            if not len(others):
                target[k] = -1
            elif np.all((snr[others] > snr[k]) | ((snr[others] == snr[k]) & (others > k))):
                target[k] = others[np.argmax(overlap)]
        if np.array_equal(target, np.arange(len(groups))):
            break
        names, columns = np.unique(target[target >= 0], return_inverse=True)
        rows = np.flatnonzero(target >= 0)
        fit = fit.combined(
            scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(groups), len(names)))
        )
        merged: list[list[int]] = [[] for _ in names]
        for row, column in zip(rows, columns, strict=True):
            merged[column] += groups[row]
        groups = merged
    left = [sum_stamps([pieces[k] for k in group]) for group in groups]
    templates = []
    for piece, group in zip(left, groups, strict=True):
        stamp = sum_stamps([carried[k] for k in group])
        templates.append(stamp._replace(array=stamp.array / piece.array.sum()))
    return left, templates
