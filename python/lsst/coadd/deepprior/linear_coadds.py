# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Images that are linear in the visits: plain coadd, best visit, proper coadd; a restoration is compared
with them.
"""

from __future__ import annotations

__all__ = ("PeerImage", "best_seeing_visit", "inverse_variance_coadd", "proper_coadd", "weighted_mean")

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch

from .noise import entering_visits
from .observation import Observation
from .operators import CellConvolution, CellLayout
from .patch_data import PatchData

_FULL_COVERAGE = 0.95
"""Part of the patch that a visit must cover to stand for it."""

_CORE = 1e-4
"""Part of the light that the filters of the proper coadd put into the central pixel of every PSF, so that
frequencies of which a truncated stamp knows nothing pass as in the plain coadd and the noise stays white."""


@dataclasses.dataclass(frozen=True, eq=False)
class PeerImage:
    """Image of a patch made by one of the methods that a restoration is compared with.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x), float32
        Image on the pixels of the patch in nJy; NaN where it has no data.
    psf : `numpy.ndarray`, (k, k)
        Stamp of the PSF of the image at the centre of the patch, of unit sum.
    """

    image: np.ndarray
    psf: np.ndarray


def _patch_slices(data: PatchData) -> tuple[slice, slice]:
    """Select the patch on its canvas."""
    ny, nx = data.layout.shape
    return slice(data.margin, data.margin + ny), slice(data.margin, data.margin + nx)


def _central_cell(usable: np.ndarray) -> tuple[int, int]:
    """Return the usable cell (i, j) nearest to the centre of the patch."""
    cells = np.argwhere(usable)
    distance = ((cells - (np.array(usable.shape) - 1) / 2) ** 2).sum(axis=1)
    i, j = cells[np.argmin(distance)]
    return int(i), int(j)


def _padded(psf: np.ndarray, size: int) -> np.ndarray:
    """Pad stamps to one size; those of missing cells become 0."""
    border = (size - psf.shape[-1]) // 2
    return np.pad(np.nan_to_num(psf), ((0, 0), (0, 0), (border, border), (border, border)))


def weighted_mean(
    data: PatchData, observations: Sequence[Observation]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average the good pixels of the visits that enter a cell (`~lsst.coadd.deepprior.noise`), unclipped.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits on their canvas.
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The same visits, for their PSFs.

    Returns
    -------
    mean : `numpy.ndarray`, (y, x), float64
        Mean with one weight a visit and cell, the inverse sky variance, in nJy; NaN without a good pixel.
    variance : `numpy.ndarray`, (y, x), float64
        Sky variance of the mean in nJy^2; NaN without a good pixel.
    psf : `numpy.ndarray`, (i, j, k, k)
        Mean PSF of every cell with the same weights; NaN in cells that no visit enters.
    """
    weight = np.where(entering_visits(data), data.weight, 0.0)
    inner = _patch_slices(data)
    total, depth = np.zeros(data.layout.shape), np.zeros(data.layout.shape)
    size = max(observation.psf.shape[-1] for observation in observations)
    psf = np.zeros((data.layout.n_i, data.layout.n_j, size, size))
    for index, visit in data.visits():
        pixel_weight = data.pixel_weight(weight[index]) * (visit.weight[inner] > 0).cpu().numpy()
        total += pixel_weight * visit.flux[inner].cpu().numpy()
        depth += pixel_weight
        psf += weight[index][:, :, None, None] * _padded(observations[index].psf, size)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(depth > 0.0, 1.0 / depth, np.nan)
        return total / depth, variance, psf / weight.sum(axis=0)[:, :, None, None]


def inverse_variance_coadd(
    observations: Sequence[Observation], layout: CellLayout, sigma: float
) -> PeerImage:
    """Average the visits with their inverse sky variances.

    This is the plain coadd: masked pixels are left out, nothing is clipped, and a visit enters the cells
    that it covers as far as any does, as in the cell-based coadds of Rubin.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    sigma : `float`
        Sigma of the target PSF in pixels, which all peers take; this one does not depend on it.

    Returns
    -------
    peer : `PeerImage`
        The coadd at its own PSF.

    Raises
    ------
    ValueError
        Raised if no visit has a good pixel, or if one is not on the layout.
    """
    data = PatchData(observations, layout, sigma)
    mean, _, psf = weighted_mean(data, observations)
    return PeerImage(mean.astype(np.float32), psf[_central_cell(np.isfinite(psf).all(axis=(2, 3)))])


def best_seeing_visit(observations: Sequence[Observation], layout: CellLayout, sigma: float) -> PeerImage:
    """Return the visit of sharpest PSF, by the FWHM of a Gaussian fit to its stamp (`PatchData.seeing`).

    It is chosen among the visits that cover at least 95 % of the patch, or, without any, among those that
    cover the most. Parameters, return value and errors are those of `inverse_variance_coadd`; masked pixels
    are NaN.
    """
    data = PatchData(observations, layout, sigma)
    coverage = np.where(data.weight > 0.0, data.overlap, 0.0).mean(axis=(1, 2))
    enough = np.flatnonzero(coverage >= min(_FULL_COVERAGE, coverage.max()))
    best = int(enough[np.argmin(data.seeing[enough])])
    visit = data.visit(best)
    image = torch.where(visit.weight > 0, visit.flux, torch.nan)[_patch_slices(data)]
    psf = observations[best].psf[_central_cell(data.weight[best] > 0.0)].astype(np.float64)
    return PeerImage(image.cpu().numpy().astype(np.float32), psf / psf.sum())


def proper_coadd(observations: Sequence[Observation], layout: CellLayout, sigma: float) -> PeerImage:
    r"""Coadd the visits so that white noise stays white and nothing of point sources is lost.

    The proper coadd R (Zackay & Ofek 2017, ApJ 836, 188) of visits :math:`M_j` of noise
    :math:`\sigma_j` and PSF :math:`P_j`, here in nJy so that their zero points :math:`F_j` are 1, is

    .. math:: \hat R =
        \frac{\sum_j \hat P_j^* \hat M_j / \sigma_j^2}{\sqrt{\sum_j |\hat P_j|^2 / \sigma_j^2}}, \qquad
        \hat P_R = \frac{\sqrt{\sum_j |\hat P_j|^2 / \sigma_j^2}}{\sqrt{\sum_j \sigma_j^{-2}}}.

    It is divided by :math:`F_R = (\sum_j \sigma_j^{-2})^{1/2}`, so that it is in nJy. The filters of the
    visits are made for every cell and blended over the borders; they reach as far as two stamps, and the PSF
    is what they make of the PSFs. A masked pixel, or one beyond the box of a visit, takes the weighted mean
    of the visits that are good there and, where there is none, the `PatchData.lower_median`; the surroundings
    of the patch are 0. Parameters, return value and errors are those of `inverse_variance_coadd`.
    """
    data = PatchData(observations, layout, sigma)
    weight = np.where(entering_visits(data), data.weight, 0.0)
    size = max(observation.psf.shape[-1] for observation in observations)
    reach = 2 * size - 1
    n_fft = scipy.fft.next_fast_len(2 * reach + 1, real=True)

    def transfer(index: int) -> np.ndarray:
        """Transfer functions of the PSFs of a visit, (i, j, n_fft, n_fft // 2 + 1)."""
        stamps = np.pad(_padded(observations[index].psf, size), ((0, 0), (0, 0), *((0, n_fft - size),) * 2))
        return scipy.fft.rfft2(np.roll(stamps, (-(size // 2),) * 2, axis=(-2, -1)))

    def cut(transfers: np.ndarray) -> np.ndarray:
        """Kernels of transfer functions, centred, (i, j, reach, reach)."""
        kernels = scipy.fft.irfft2(transfers, s=(n_fft, n_fft))
        return np.roll(kernels, (reach // 2,) * 2, axis=(-2, -1))[..., :reach, :reach]

    used = [index for index in range(len(data)) if weight[index].any()]
    depth = weight.sum(axis=0)
    power = sum(weight[index][:, :, None, None] * np.abs(transfer(index) + _CORE) ** 2 for index in used)
    # 1 in cells without a visit, whose weights are 0.
    depth = np.where(depth > 0.0, depth, 1.0)[:, :, None, None]
    whitening = np.sqrt(np.where(power > 0.0, power, 1.0) * depth)

    inner = _patch_slices(data)
    total, seen = torch.zeros(data.shape, device=data.device), torch.zeros(data.shape, device=data.device)
    for _, visit in data.visits():
        total += visit.weight * visit.flux
        seen += visit.weight
    fill = torch.where(seen > 0, total / seen, data.lower_median(data.sets())[0])
    image = torch.zeros(data.shape, device=data.device)
    entering = np.zeros(layout.shape, dtype=bool)
    psf = np.zeros((layout.n_i, layout.n_j, n_fft, n_fft // 2 + 1), dtype=complex)
    for index in used:
        visit = data.visit(index)
        psfs = transfer(index)
        kernels = cut(weight[index][:, :, None, None] * np.conj(psfs + _CORE) / whitening)
        operator = CellConvolution(
            torch.as_tensor(kernels, dtype=data.dtype, device=data.device), layout, data.margin
        )
        image += operator.forward(torch.where(visit.weight > 0, visit.flux, fill))
        entering |= (data.pixel_weight(weight[index]) > 0) & (visit.weight[inner] > 0).cpu().numpy()
        centred = np.roll(
            np.pad(kernels, ((0, 0), (0, 0), *((0, n_fft - reach),) * 2)), (-(reach // 2),) * 2, axis=(-2, -1)
        )
        psf += scipy.fft.rfft2(centred) * psfs
    stamp = cut(psf)[_central_cell(weight.sum(axis=0) > 0.0)]
    result = np.where(entering, image[inner].cpu().numpy(), np.nan).astype(np.float32)
    return PeerImage(result, stamp / stamp.sum())
