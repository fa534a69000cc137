# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What the data say beside the restored image: coadd, residual coadd, outliers and noise realisations."""

from __future__ import annotations

__all__ = ("CoaddLayers", "NoisyModel", "coadd_layers", "entering_visits", "local_variance")

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import torch

from .finer import own_stamp, spread_layers
from .noise_correlation import correlated_noise
from .observation import Observation
from .operators import CellLayout
from .outliers import (
    OUTLIER_PSF_ERROR,
    Outlier,
    find_outliers,
    local_level,
    outliers_of_visit,
    shared_deficit,
)
from .patch_data import PatchData

_MIN_VISITS_FOR_OUTLIERS = 3

_LARGEST_DEVIATION = 1e9
"""Deviation in standard deviations up to which pixels count in chi^2; its square is a number in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class CoaddLayers:
    """Coadds of the visits and of what the model leaves, on the pixels of the patch.

    Parameters
    ----------
    coadd : `numpy.ndarray`, (y, x), float32
        Weighted mean of the accepted pixels, in nJy; NaN where there is none.
    residual : `numpy.ndarray`, (y, x), float32
        Weighted mean of data minus model, in nJy; NaN where there is no accepted pixel.
    variance : `numpy.ndarray`, (y, x), float32
        Variance of both, from the variances of the visits, in nJy^2; NaN where there is no accepted pixel.
    psf : `numpy.ndarray`, (i, j, k, k)
        PSF of both in every cell; NaN in cells that no visit enters.
    n_visits : `numpy.ndarray`, (y, x), int16
        Number of accepted pixels.
    n_good : `numpy.ndarray`, (y, x), int16
        Number of visits with a good pixel, also of those that do not enter the coadds of the cell.
    masked, clipped : `numpy.ndarray`, (y, x), bool
        Whether a visit of the cell was masked, or rejected as an outlier, in the pixel.
    weight : `numpy.ndarray`, (visit, i, j)
        Weight of a visit in a cell; 0 where it does not enter.
    outliers : `list` [`~lsst.coadd.deepprior.outliers.Outlier`]
        What was rejected, visit by visit.
    chi2 : `float`
        Mean of ((data - model) / noise)^2 over the accepted pixels.
    """

    coadd: np.ndarray
    residual: np.ndarray
    variance: np.ndarray
    psf: np.ndarray
    n_visits: np.ndarray
    n_good: np.ndarray
    masked: np.ndarray
    clipped: np.ndarray
    weight: np.ndarray
    outliers: list[Outlier]
    chi2: float


def entering_visits(data: PatchData) -> np.ndarray:
    """Decide which visits enter the coadd of which cell.

    A visit enters if it covers as much of the cell as any visit does, so that the PSF of the coadd does not
    jump inside a cell; in Rubin's cell coadds, where visits are larger than cells, this means the whole cell.

    Returns
    -------
    enters : `numpy.ndarray`, (visit, i, j), bool
        True where a visit has weight and its box covers the most that any visit covers.
    """
    overlap = np.where(data.weight > 0.0, data.overlap, 0.0)
    return (overlap > 0.0) & (overlap >= overlap.max(axis=0) - 1e-9)


def coadd_layers(data: PatchData, latent: torch.Tensor) -> CoaddLayers:
    """Coadd the visits, and what the model leaves of them, in one pass.

    Where most visits lie below the model, which cannot be negative, they are judged once more, in another
    pass: an outlier must be far from the model and from what they share (see
    `~lsst.coadd.deepprior.outliers.shared_deficit`).

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy.

    Returns
    -------
    layers : `CoaddLayers`
        Both coadds with the same weights, so that ``coadd - residual`` is the model at the PSF of the coadd.
    """
    step = data.sampling
    weight = np.where(entering_visits(data), data.weight, 0.0)
    ny, nx = data.layout.shape
    deficit = torch.zeros((ny // step, nx // step), dtype=data.dtype, device=data.device)
    sums = _sums(data, latent, weight, deficit)
    if sums.found:
        levels, noise = (torch.stack(images) for images in zip(*sums.levels, strict=True))
        shared = shared_deficit(levels, noise, (ny // step, nx // step))
        if bool((shared.cpu().numpy()[sums.n_rejected > 0] < 0.0).any()):
            deficit = shared
            sums = _sums(data, latent, weight, deficit)
    # Where half of the visits or more are far from the model, it is the model that is wrong.
    clipped = (sums.n_rejected > 0) & (2 * sums.n_rejected < sums.count)
    total = sums.total
    for pixels, values in sums.set_apart:
        kept = ~clipped.ravel()[pixels]
        total.reshape(5, -1)[:, pixels[kept]] += values[:, kept]
    n_visits = (sums.count - np.where(clipped, sums.n_rejected, 0)).astype(np.int16)
    with np.errstate(invalid="ignore", divide="ignore"):
        coadd, residual_coadd, variance = total[1] / total[0], total[2] / total[0], total[3] / total[0] ** 2
        psf = sums.psf / weight.sum(axis=0)[:, :, None, None]
    layers = CoaddLayers(
        coadd=coadd.astype(np.float32),
        residual=residual_coadd.astype(np.float32),
        variance=variance.astype(np.float32),
        psf=psf,
        n_visits=n_visits,
        n_good=sums.n_good,
        masked=n_visits < sums.n_entering,
        clipped=clipped,
        weight=weight,
        outliers=_rejected(data, latent, weight, deficit, sums.found, clipped),
        chi2=float(total[4].sum(dtype=np.float64)) / max(int(n_visits.sum()), 1),
    )
    return layers if step == 1 else spread_layers(layers, step)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the visits of one pass, without the outliers of each.

    Parameters
    ----------
    total : `numpy.ndarray`, (5, y, x)
        Sums of weights, of weighted data, of weighted residuals, of variances and of squared deviations.
    set_apart : `list` [`tuple` [`numpy.ndarray`, `numpy.ndarray`]]
        Pixels that are outliers of a visit, by their number in the patch, and their terms of these sums.
    count, n_good, n_rejected, n_entering : `numpy.ndarray`, (y, x), int16
        Number of visits that enter the coadds with a good pixel, that have one, that have an outlier, and
        that enter the cell.
    psf : `numpy.ndarray`, (i, j, k, k)
        Weighted sum of the PSFs.
    found : `list` [`~lsst.coadd.deepprior.outliers.Outlier`]
        The outliers.
    levels : `list` [`tuple` [`torch.Tensor`, `torch.Tensor`]]
        What `~lsst.coadd.deepprior.outliers.local_level` says of each visit, if outliers were looked for
        without a deficit.
    """

    total: np.ndarray
    set_apart: list[tuple[np.ndarray, np.ndarray]]
    count: np.ndarray
    n_good: np.ndarray
    n_rejected: np.ndarray
    n_entering: np.ndarray
    psf: np.ndarray
    found: list[Outlier]
    levels: list[tuple[torch.Tensor, torch.Tensor]]


def _sums(
    data: PatchData,
    latent: torch.Tensor,
    weight: np.ndarray,
    deficit: torch.Tensor,
) -> _Sums:
    """Read the visits once; outliers are far from the model and from the sum of model and deficit."""
    layout, step, inner = data.layout, data.sampling, data.sampled
    shape = tuple(deficit.shape)
    # Outliers are added at the end, where they count: in a sum with one of 1e8 the other visits are lost.
    total = np.zeros((5, *shape), dtype=np.float32)
    set_apart: list[tuple[np.ndarray, np.ndarray]] = []
    count, n_good, n_rejected, n_entering = (np.zeros(shape, dtype=np.int16) for _ in range(4))
    reject = int((data.weight > 0.0).any(axis=(1, 2)).sum()) >= _MIN_VISITS_FOR_OUTLIERS
    psf = np.zeros((layout.n_i, layout.n_j, 1, 1))
    found: list[Outlier] = []
    levels: list[tuple[torch.Tensor, torch.Tensor]] = []
    oversubtracted = bool(deficit.any())
    for index, observation, visit in data.read():
        prediction = visit.kernel.forward(latent)
        residual = visit.flux - prediction
        good = visit.weight > 0
        pixel_weight = data.pixel_weight(weight[index].astype(np.float32))[::step, ::step]
        seen = good[inner].cpu().numpy()
        n_good += seen
        w = pixel_weight * seen
        variance = np.where(w > 0, visit.variance[inner].cpu().numpy(), 1.0)
        difference = residual[inner].cpu().numpy()
        deviation = np.where(w > 0, difference / np.sqrt(variance), 0.0)
        terms = [
            w,
            w * visit.flux[inner].cpu().numpy(),
            w * difference,
            w**2 * variance,
            np.clip(deviation, -_LARGEST_DEVIATION, _LARGEST_DEVIATION) ** 2,
        ]
        count += w > 0
        n_entering += pixel_weight > 0
        if reject:
            scale = data.scale(visit, prediction, OUTLIER_PSF_ERROR)
            own, scale, usable = residual[inner], scale[inner], good[inner]
            far = find_outliers(own, scale, usable)
            if oversubtracted:
                far &= find_outliers(own - deficit, scale, usable)
            else:
                levels.append(local_level(own, scale, usable))
            outlier = far.cpu().numpy() & (w > 0)
            n_rejected += outlier
            psf_at = functools.partial(_stamp_at, observation.psf, layout, step)
            found += outliers_of_visit(
                index, outlier, difference - deficit.cpu().numpy(), variance, w > 0, psf_at
            )
            pixels = np.flatnonzero(outlier)
            set_apart.append((pixels, np.stack([term.ravel()[pixels] for term in terms])))
            for term in terms:
                term[outlier] = 0.0
        for one, term in zip(total, terms, strict=True):
            one += term
        psf = _add_stamps(psf, weight[index][:, :, None, None] * np.nan_to_num(observation.psf))
    return _Sums(total, set_apart, count, n_good, n_rejected, n_entering, psf, found, levels)


def _rejected(
    data: PatchData,
    latent: torch.Tensor,
    weight: np.ndarray,
    deficit: torch.Tensor,
    found: list[Outlier],
    clipped: np.ndarray,
) -> list[Outlier]:
    """Return the outliers that are left out of the coadds; of some it is a part, which is measured anew."""
    inner, step = data.sampled, data.sampling
    outliers = [one for one in found if clipped[one.pixels].all()]
    partly = [one for one in found if clipped[one.pixels].any() and not clipped[one.pixels].all()]
    for index, observation, visit in data.read(sorted({one.visit for one in partly})):
        outlier = np.zeros(clipped.shape, dtype=bool)
        for group in partly:
            if group.visit == index:
                outlier[group.pixels] = clipped[group.pixels]
        difference = ((visit.flux - visit.kernel.forward(latent))[inner] - deficit).cpu().numpy()
        usable = (visit.weight[inner] > 0).cpu().numpy()
        usable &= data.pixel_weight(weight[index].astype(np.float32))[::step, ::step] > 0
        variance = np.where(usable, visit.variance[inner].cpu().numpy(), 1.0)
        psf_at = functools.partial(_stamp_at, observation.psf, data.layout, step)
        outliers += outliers_of_visit(index, outlier, difference, variance, usable, psf_at)
    return outliers


def _stamp_at(stamps: np.ndarray, layout: CellLayout, step: int, y: int, x: int) -> np.ndarray:
    """Return the stamp of the cell that holds a pixel of the visits."""
    return own_stamp(stamps[step * y // layout.height, step * x // layout.width], step)


def _add_stamps(total: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """Add stamps (i, j, k, k) of odd sizes about their centres."""
    difference = (stamps.shape[-1] - total.shape[-1]) // 2
    grow, border = max(difference, 0), max(-difference, 0)
    total = np.pad(total, ((0, 0), (0, 0), (grow, grow), (grow, grow)))
    return total + np.pad(stamps, ((0, 0), (0, 0), (border, border), (border, border)))


class NoisyModel(Sequence[Observation]):
    """The visits as they would be if the model were true: K u plus new noise like their own.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits themselves, which give masks, variances and PSFs.
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The same visits on their canvas.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy.
    seed : `int`
        Seed of the noise; a visit has the same noise whenever it is read.
    correlations : `numpy.ndarray`, (visit, k, k)
        Correlation of the noise of each visit (see
        `~lsst.coadd.deepprior.noise_correlation.visit_correlations`).
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        data: PatchData,
        latent: torch.Tensor,
        seed: int,
        correlations: np.ndarray,
    ) -> None:
        self._observations = observations
        self._data = data
        self._latent = latent
        self._seed = seed
        self._correlations = correlations

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        original = self._observations[index]
        y, x = (o + self._data.margin for o in original.origin)
        ny, nx = original.flux.shape
        prediction = (
            self._data.kernel(index, original).forward(self._latent)[y : y + ny, x : x + nx].cpu().numpy()
        )
        rng = np.random.default_rng([self._seed, index])
        noise = correlated_noise((ny, nx), self._correlations[index], rng)
        sigma = np.sqrt(np.where(original.good, original.variance, 0.0))
        return dataclasses.replace(original, flux=(prediction + noise * sigma).astype(np.float32))


_SKY_SMOOTHING, _LIGHT_SMOOTHING = 3.0, 1.5
"""Sigmas in pixels of the neighbourhoods in which the variance of the sky and of light are estimated: wide
for the few realisations that there are, narrow since the foot of a star may be uncertain and its peak not."""

_LEAST_NOISE = 1e-3
"""Smallest standard deviation of a restored image, in units of the noise of the coadd. That no realisation
has any light tells little of the next one, and a variance of 0 would be an infinite weight."""


def local_variance(differences: Sequence[np.ndarray], image: np.ndarray, noise: float) -> np.ndarray:
    r"""Estimate the variance of an image from differences that noise alone made.

    With q the mean of their squares, n the noise of the coadd, x the image and :math:`s = n^2 + n x`, which
    rises towards bright sources as steeply as the noise may,

    .. math:: v = n^2\, G_3 * \frac{q}{s} + n x\, \frac{G_{1.5} * q}{G_{1.5} * s},

    where G is a Gaussian of so many pixels: what is uncertain in the surroundings of a source does not spread
    to its peak, nor the other way round.

    Parameters
    ----------
    differences : `~collections.abc.Sequence` [`numpy.ndarray`], (y, x)
        Independent realisations of the noise of the image. Their mean is a part of it and is not subtracted:
        that ``x`` loses some of its own noise when it is restored again tells how much noise it holds.
    image : `numpy.ndarray`, (y, x)
        The image, not negative.
    noise : `float`
        Noise of the coadd, in the unit of the image.

    Returns
    -------
    variance : `numpy.ndarray`, (y, x), float32
        Squared unit of the image; positive.
    """
    if not differences:
        raise ValueError("A variance needs at least one realisation of the noise.")
    light = noise * image.astype(np.float64)
    scale = noise**2 + light
    mean_square = np.zeros(image.shape)
    for difference in differences:
        mean_square += difference.astype(np.float64) ** 2 / len(differences)

    def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(values, sigma, mode="reflect")

    variance = light * smooth(mean_square, _LIGHT_SMOOTHING) / smooth(scale, _LIGHT_SMOOTHING)
    variance += noise**2 * smooth(mean_square / scale, _SKY_SMOOTHING)
    return np.maximum(variance, (_LEAST_NOISE * noise) ** 2).astype(np.float32)
