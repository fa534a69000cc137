# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Deconvolutions without a network that a restoration is compared with, at the same target PSF."""

from __future__ import annotations

__all__ = ("checked_steps", "coadd_deconvolution", "peer_of_latent", "richardson_lucy", "starlet_map")

import math
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import scipy.signal
import torch

from .baselines import (
    PSF_ERRORS,
    inner_smooth,
    maximum_likelihood,
    maximum_likelihood_step,
    robust_start,
)
from .linear_coadds import PeerImage, weighted_mean
from .observation import Observation
from .operators import CellConvolution, CellLayout
from .patch_data import PatchData
from .psf import FWHM_PER_SIGMA, carry_kernel, fwhm, gaussian_stamp
from .smoothing import separably_smooth
from .statistics import VisitSets

_REFRESH_EVERY = 20
"""Steps between two passes over the visits."""

_MIN_SENSITIVITY = 1e-2
"""Part of the largest sensitivity below which a pixel counts as not seen."""

_SCALES = 5
"""Number of scales of the starlet transform whose coefficients are sparse."""

_SPLINE = (1.0 / 16.0, 4.0 / 16.0, 6.0 / 16.0, 4.0 / 16.0, 1.0 / 16.0)
"""The B3 spline at whole pixels, the smoothing of that transform."""

_START_STEPS = 240
"""Steps of maximum likelihood before the proximal ones, which would need thousands for star cores."""

_DUAL_STEPS = 5
"""Steps of the inner, dual iteration in each proximal step; it goes on from the last one."""

_MAX_ITER, _MIN_ITER, _E_REL = 100, 10, 1e-3
"""Defaults ``maxIter``, ``minIter`` and ``eRel`` of Rubin's DeconvolveExposureConfig."""

_DETECTION, _GROW = 5.0, 2.4
"""Threshold in sigma and growth in PSF sigmas, the defaults of Rubin's SourceDetectionTask."""


def checked_steps(steps: Sequence[int]) -> list[int]:
    """Return the numbers of steps after which an image is wanted in order, or raise `ValueError`."""
    if not steps or min(steps) < 1:
        raise ValueError(f"Ask for one or more positive numbers of steps, not {list(steps)}.")
    return sorted(set(steps))


def peer_of_latent(data: PatchData, sets: VisitSets, latent: torch.Tensor) -> PeerImage:
    """Turn the latent image of a peer into its image on the patch.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (1, y, x)
        Latent image u on the canvas, in nJy.

    Returns
    -------
    peer : `PeerImage`
        The image x at the target PSF; NaN where no visit sees the sky.
    """
    seen = sets.sensitivity > _MIN_SENSITIVITY * sets.sensitivity.max()
    image = torch.where(seen, inner_smooth(latent, data.sigma), torch.nan)[0]
    y, x = (slice(data.margin, data.margin + n) for n in data.layout.shape)
    return PeerImage(image[y, x].cpu().numpy().astype(np.float32), gaussian_stamp(data.sigma))


def richardson_lucy(
    observations: Sequence[Observation],
    layout: CellLayout,
    sigma: float,
    *,
    steps: Sequence[int],
) -> dict[int, PeerImage]:
    """Deconvolve the visits jointly by multiplicative steps, stopped early.

    These are plain steps of the image space reconstruction algorithm (Daube-Witherspoon & Muehllehner 1986,
    IEEE TMI 5, 61), the twin of the multi-frame method of Richardson (1972) and Lucy (1974) for Gaussian
    noise, on the robust likelihood of `~lsst.coadd.deepprior.patch_data.PatchData`: the same model, masks and
    Huber weights as the restoration has, without a prior.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    sigma : `float`
        Sigma of the target PSF in pixels.
    steps : `~collections.abc.Sequence` [`int`]
        Numbers of steps after which an image is wanted.

    Returns
    -------
    peers : `dict` [`int`, `PeerImage`]
        Image at the target PSF by number of steps; NaN where no visit sees the sky.

    Raises
    ------
    ValueError
        Raised if there is no positive number of steps, if no visit has a good pixel, or if one is not on the
        layout.
    """
    wanted = checked_steps(steps)
    data = PatchData(observations, layout, sigma)
    sets = data.sets()
    latent, _ = robust_start(data, sets)
    peers = {}
    for step in range(wanted[-1]):
        if step % _REFRESH_EVERY == 0:
            refresh = step // _REFRESH_EVERY
            error = PSF_ERRORS[refresh] if refresh < len(PSF_ERRORS) else None
            statistics = data.linearise(sets, latent, psf_error=error)
        latent = maximum_likelihood_step(latent, statistics)
        if step + 1 in wanted:
            peers[step + 1] = peer_of_latent(data, sets, latent)
    return peers


def _smooth(image: torch.Tensor, scale: int) -> torch.Tensor:
    """Convolve images (..., y, x) with the dilated B3 spline; 0 outside, so it is its own transpose."""
    return separably_smooth(image, _SPLINE, 2**scale)


def _starlet(image: torch.Tensor) -> torch.Tensor:
    """Return the wavelet scales (scale, y, x) of an image, without what the coarsest smoothing leaves.

    This is the isotropic undecimated transform of Starck, Murtagh & Fadili (2010, Sparse Image and Signal
    Processing). Its norm as an operator is at most 1: the transfer functions of the scales are
    not negative and add up to 1 at most.
    """
    scales = []
    for scale in range(_SCALES):
        smooth = _smooth(image, scale)
        scales.append(image - smooth)
        image = smooth
    return torch.stack(scales)


def _starlet_transpose(coefficients: torch.Tensor) -> torch.Tensor:
    """Apply the transpose of `_starlet`."""
    image = torch.zeros_like(coefficients[0])
    for scale in reversed(range(_SCALES)):
        image = coefficients[scale] + _smooth(image - coefficients[scale], scale)
    return image


def _scale_noise(sets: VisitSets) -> torch.Tensor:
    """Propagate the noise of the visits to the starlet scales of the gradient of the likelihood.

    The noise of the gradient has the covariance A, so that of scale j at a pixel is ``w_j^T A w_j`` with w_j
    the wavelet there; it is taken at the deepest pixel and follows the depth from there.

    Returns
    -------
    noise : `torch.Tensor`, (scale, y, x)
        Standard deviation in 1/nJy.
    """
    sensitivity = sets.sensitivity[0]
    probe = torch.zeros_like(sensitivity)
    probe.view(-1)[sensitivity.argmax()] = 1.0
    wavelets = _starlet(probe)
    variance = (wavelets * sets.gram[0].forward(wavelets)).sum(dim=(-2, -1))
    return (variance[:, None, None] * (sensitivity / sensitivity.max()).clamp_min(0.0)).sqrt()


def starlet_map(
    observations: Sequence[Observation],
    layout: CellLayout,
    sigma: float,
    *,
    strength: float,
    steps: int = 200,
) -> PeerImage:
    r"""Deconvolve the visits jointly with sparse starlet coefficients and a positive latent image.

    It minimises over :math:`u \ge 0` the robust likelihood of `richardson_lucy` plus

    .. math:: \lambda \sum_j \sum_p \sigma_j(p)\, |(W_j\, r * u)(p)|,

    with W the starlet transform of the image :math:`x = r * u` and :math:`\sigma_j` the noise of scale j of
    the gradient, propagated from the data (as Farrens et al. 2017, A&A 601, A66, do). The likelihood is
    majorised by a quadratic every 20 steps, on which proximal gradient steps are taken with the momentum of
    FISTA (Beck & Teboulle 2009a, SIAM J. Imaging Sci. 2, 183). The proximal operator of the analysis prior
    and the constraint is found by their fast dual projected gradient (2009b, IEEE TIP 18, 2419), which goes
    on from the last step. The start is the image of maximum likelihood.

    Parameters
    ----------
    observations, layout, sigma
        As those of `richardson_lucy`.
    strength : `float`
        The factor :math:`\lambda`, not negative.
    steps : `int`, optional
        Number of proximal steps.

    Returns
    -------
    peer : `PeerImage`
        Image at the target PSF; NaN where no visit sees the sky.

    Raises
    ------
    ValueError
        Raised if the strength is negative or the number of steps is not positive, and as `richardson_lucy`
        does.
    """
    if not strength >= 0.0:
        raise ValueError(f"The strength of the prior must not be negative, but is {strength}.")
    checked_steps([steps])
    data = PatchData(observations, layout, sigma)
    sets = data.sets()
    gram = sets.gram[0]
    latent = maximum_likelihood(data, sets, steps=_START_STEPS).latent[0]
    bound = strength * _scale_noise(sets)
    curvature = _largest_eigenvalue(gram, latent)
    dual = torch.zeros_like(bound)
    for step in range(steps):
        if step % _REFRESH_EVERY == 0:
            matched = data.linearise(sets, latent[None]).matched[0]
            point, momentum = latent, 1.0
        target = point - (gram.forward(point) - matched) / curvature
        new, dual = _starlet_prox(target, dual, bound, curvature, sigma)
        next_momentum = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum**2))
        point = new + (momentum - 1.0) / next_momentum * (new - latent)
        latent, momentum = new, next_momentum
    return peer_of_latent(data, sets, latent[None])


def _largest_eigenvalue(gram: CellConvolution, like: torch.Tensor) -> float:
    """Bound the largest eigenvalue of A from above by power iteration from a constant image."""
    image, norm = torch.ones_like(like), 1.0
    for _ in range(20):
        image = gram.forward(image / image.norm())
        norm = float(image.norm())
    return 1.05 * norm


def _starlet_prox(
    target: torch.Tensor, dual: torch.Tensor, bound: torch.Tensor, curvature: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise ``curvature / 2 |u - target|^2 + sum bound |W r u|`` over ``u >= 0`` by some dual steps."""

    def primal(point: torch.Tensor) -> torch.Tensor:
        return (target - inner_smooth(_starlet_transpose(point), sigma) / curvature).clamp_min(0.0)

    point, momentum = dual, 1.0
    for _ in range(_DUAL_STEPS):
        # The norm of W r is at most 1, so the gradient of the dual changes by 1 / curvature at most.
        new = point + curvature * _starlet(inner_smooth(primal(point), sigma))
        new = torch.minimum(torch.maximum(new, -bound), bound)
        next_momentum = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum**2))
        point = new + (momentum - 1.0) / next_momentum * (new - dual)
        dual, momentum = new, next_momentum
    return primal(dual), dual


def coadd_deconvolution(
    observations: Sequence[Observation],
    layout: CellLayout,
    sigma: float,
    *,
    steps: Sequence[int] | None = None,
    footprints: bool = True,
) -> dict[int, PeerImage]:
    """Deconvolve the plain coadd as the pipelines of Rubin do today.

    This is the algorithm of ``DeconvolveExposureTask`` (package meas_extensions_scarlet): from the coadd
    itself, projected Landweber steps on the difference kernel between the PSF of the coadd and a Gaussian,
    of a length that follows from the sparsity and signal of the image and is halved whenever the loss rises,
    and nothing outside the footprints of detections. There the Gaussian has a sigma of 0.8 pixel, here that
    of the target; the PSFs are those of the cells, pixels without data have no residual, and the image may go
    on beyond the patch.

    Parameters
    ----------
    observations, layout, sigma
        As those of `richardson_lucy`.
    steps : `~collections.abc.Sequence` [`int`], optional
        Numbers of steps after which an image is wanted; the default is the stopping rule of the task (a
        relative change of the loss below 1e-3, between 12 and 100 steps).
    footprints : `bool`, optional
        Whether the image is kept at 0 outside the footprints of 5-sigma detections, which is the default of
        the task.

    Returns
    -------
    peers : `dict` [`int`, `PeerImage`]
        Image at the target PSF by number of steps; NaN where the coadd has no data.

    Raises
    ------
    ValueError
        Raised as `richardson_lucy` does.
    """
    wanted = [_MAX_ITER] if steps is None else checked_steps(steps)
    data = PatchData(observations, layout, sigma)
    mean, variance, psf = weighted_mean(data, observations)
    seen, has_psf = np.isfinite(mean), np.isfinite(psf).all(axis=(2, 3))
    nearest = scipy.ndimage.distance_transform_edt(~has_psf, return_distances=False, return_indices=True)
    psf = psf[tuple(nearest)]
    kernels = np.array([[carry_kernel(stamp, sigma) for stamp in row] for row in psf])
    operator = CellConvolution(
        torch.as_tensor(kernels, dtype=data.dtype, device=data.device), layout, data.margin
    )
    mean = np.where(seen, mean, 0.0)
    noise = float(np.sqrt(np.mean(variance[seen])))
    middle = psf[layout.n_i // 2, layout.n_j // 2]
    kept = _footprints(mean, noise, middle) if footprints else np.ones_like(seen)
    coadd, good, allowed = (
        torch.as_tensor(image, dtype=data.dtype, device=data.device)
        for image in (
            np.pad(mean, data.margin),
            np.pad(seen, data.margin),
            np.pad(kept, data.margin, mode="edge"),
        )
    )
    inner = tuple(slice(data.margin, data.margin + n) for n in layout.shape)
    model, length = coadd, _landweber_length(mean, noise, seen)
    losses: list[float] = []
    peers = {}
    for step in range(1, wanted[-1] + 1):
        residual = good * (coadd - operator.forward(model))
        losses.append(0.5 * float(residual.square().sum()))
        model = (model + length * operator.adjoint(residual)).clamp_min(0.0) * allowed
        change = losses[-1] - losses[-2] if step > 1 else 0.0
        if change > 0.0:
            length /= 2.0
        stop = steps is None and step > _MIN_ITER + 1 and abs(change) < _E_REL * losses[-1]
        if stop or step in wanted:
            image = np.where(seen, model[inner].cpu().numpy(), np.nan).astype(np.float32)
            peers[step] = PeerImage(image, gaussian_stamp(sigma))
        if stop:
            break
    return peers


def _landweber_length(coadd: np.ndarray, noise: float, seen: np.ndarray) -> float:
    """Return the length of the first step as ``calculateUpdateStep`` of the task does."""
    signal = coadd[seen & (coadd > 3.0 * noise)]
    snr = float(np.median(signal)) / noise if signal.size else 1.0
    return min(1.0, max(0.01, signal.size / np.count_nonzero(seen) * math.sqrt(snr) / 0.1))


def _footprints(coadd: np.ndarray, noise: float, psf: np.ndarray) -> np.ndarray:
    """Find the pixels of 5-sigma detections on the coadd convolved with its PSF, grown by 2.4 PSF sigmas."""
    matched = scipy.signal.fftconvolve(coadd, psf[::-1, ::-1], mode="same")
    detected = matched > _DETECTION * noise * math.sqrt((psf**2).sum())
    if not detected.any():
        return detected
    return scipy.ndimage.distance_transform_edt(~detected) <= _GROW * fwhm(psf) / FWHM_PER_SIGMA
