# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The restoration of a patch: from arrays to arrays.

A convolutional encoder/decoder corrects the image of maximum likelihood. It has learned from many patches, or
is fitted to the visits of the patch themselves (Navarro, Hall, Budavari & Sukurdeep 2023, arXiv:2302.02030).
In both cases visits are split so that fitting their noise does not pay: in each step the encoder reads one
set of visits and the loss is taken on the others (Lehtinen et al. 2018, arXiv:1803.04189).
"""

from __future__ import annotations

__all__ = ("Restoration", "assemble", "restore")


import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .batches import Batches
from .finer import block_correlation
from .fitted_patch import FittedPatch, Progress, RestoreSettings, fit_patch
from .noise import CoaddLayers, coadd_layers, local_variance
from .noise_correlation import visit_correlations
from .observation import Observation
from .operators import CellLayout
from .outliers import Outlier
from .parallel import give_freed_memory_back
from .plain_coadd import Coadd
from .prior_carried import prior_carried
from .psf import FWHM_PER_SIGMA, gaussian_stamp
from .psf_check import injected_latent, measure_leakage, place_stars
from .weights import TrainedNetwork

if TYPE_CHECKING:
    from .fit_checkpoint import FitCheckpoint

_STANDARD = RestoreSettings()


@dataclasses.dataclass(frozen=True, eq=False)
class Restoration:
    """Result of `restore`; images have the shape (y, x) of the patch.

    Parameters
    ----------
    image : `numpy.ndarray`, float32
        Restored image x with the target PSF, in nJy; finite everywhere.
    variance : `numpy.ndarray`, float32
        Variance that the noise of the visits gives x, from noise realisations, in nJy^2; NaN where no visit
        is good.
    target_psf : `numpy.ndarray`, (k, k)
        The PSF of x.
    target_sigma : `float`
        Its sigma in pixels.
    coadd, residual, residual_variance : `numpy.ndarray`, float32
        Inverse-variance coadds of the visits and of data minus model, and the variance of both; NaN where no
        visit is.
    residual_psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF of both; NaN in cells without a visit.
    noise_realizations, residual_noise_realizations : `list` [`numpy.ndarray`], float32
        Realisations of the noise of ``image`` and of ``residual``, in nJy. Those of one place have the same
        noise of the visits: carried to the PSF of the coadd and added, they are that of the plain coadd.
    n_visits : `numpy.ndarray`, int16
        Number of visits with an accepted pixel in the coadds.
    n_good : `numpy.ndarray`, int16
        Number of visits with a good pixel; 0 where no visit constrains ``image``.
    masked, clipped : `numpy.ndarray`, bool
        Whether a visit was masked, or rejected as an outlier, in the pixel.
    outliers : `list` [`~lsst.coadd.deepprior.outliers.Outlier`]
        What was rejected, visit by visit.
    prior_carried : `numpy.ndarray`, bool
        Pixels whose structure the prior and not the data carries, also those that no visit constrains (see
        `~lsst.coadd.deepprior.prior_carried.prior_carried`).
    cell_weight : `numpy.ndarray`, (visit, cell_i, cell_j)
        Weight of a visit in the coadd of a cell, 0 where it does not enter (1/nJy^2).
    cell_good_fraction, cell_overlap : `numpy.ndarray`, (visit, cell_i, cell_j)
        Fraction of the pixels of a cell that are good, and that the visit covers.
    curves : `dict` [`str`, `list` [`float`]]
        Objectives against steps.
    metrics : `dict`
        Numbers of the run, plain Python objects.
    """

    image: np.ndarray
    variance: np.ndarray
    target_psf: np.ndarray
    target_sigma: float
    coadd: np.ndarray
    residual: np.ndarray
    residual_variance: np.ndarray
    residual_psf: np.ndarray
    noise_realizations: list[np.ndarray]
    residual_noise_realizations: list[np.ndarray]
    n_visits: np.ndarray
    n_good: np.ndarray
    masked: np.ndarray
    clipped: np.ndarray
    outliers: list[Outlier]
    prior_carried: np.ndarray
    cell_weight: np.ndarray
    cell_good_fraction: np.ndarray
    cell_overlap: np.ndarray
    curves: dict[str, list[float]]
    metrics: dict[str, Any]


def restore(
    observations: Sequence[Observation],
    layout: CellLayout,
    settings: RestoreSettings = _STANDARD,
    *,
    network: TrainedNetwork | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    checkpoint: FitCheckpoint | None = None,
    batches: Batches | None = None,
) -> Restoration:
    """Restore a patch from its visits.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits; indexed one at a time.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    settings : `RestoreSettings`, optional
        Numerical settings.
    network : `~lsst.coadd.deepprior.weights.TrainedNetwork`, optional
        A trained network, which is used as it is. Without one, or where the patch is outside of what it was
        trained on, a network with a random start is fitted to the patch.
    device : `torch.device` or `str`, optional
        Where to compute.
    progress : `~collections.abc.Callable`, optional
        Called with the phase, the step, the number of steps and the loss.
    checkpoint : `~lsst.coadd.deepprior.fit_checkpoint.FitCheckpoint`, optional
        Where a fit keeps its state, and goes on from if there is one.
    batches : `~lsst.coadd.deepprior.batches.Batches`, optional
        How many splits of the visits a fit prepares and linearises at once.

    Returns
    -------
    restoration : `Restoration`
        Restored image, coadds, planes and numbers.

    Raises
    ------
    NothingToRestoreError
        Raised if there is no visit, or none with a good pixel in a cell with a PSF.
    ValueError
        Raised if a visit does not fit the layout, or the target PSF cannot be made.
    FloatingPointError
        Raised if the fit diverged.
    torch.OutOfMemoryError
        Raised if the memory of a GPU does not suffice, not even for one split at a time.

    Notes
    -----
    A network is fitted to a single visit too, which is split by its noise (see
    `~lsst.coadd.deepprior.halves`). ``metrics["method"]`` says what was done.
    """
    fitted = fit_patch(
        observations,
        layout,
        settings,
        network=network,
        device=device,
        progress=progress,
        checkpoint=checkpoint,
        batches=batches,
    )
    data, times = fitted.data, fitted.times
    latent = fitted.points.latent
    mark = time.monotonic()
    image = fitted.image(latent)
    if not np.isfinite(image).all():
        raise FloatingPointError("The restored image is not finite; please report this patch.")
    layers = coadd_layers(data, latent)
    times["coadd"] = time.monotonic() - mark
    give_freed_memory_back()
    mark = time.monotonic()
    correlations = visit_correlations(data, latent)
    variance, draws, residual_draws = _variance(fitted, correlations, progress)
    times["noise"] = time.monotonic() - mark
    give_freed_memory_back()
    mark = time.monotonic()
    leakage = _leakage(fitted, correlations, draws[0]) if settings.check_psf else []
    times["psf"] = time.monotonic() - mark
    give_freed_memory_back()
    return assemble(fitted, layers, variance, draws, residual_draws, leakage)


def assemble(
    fitted: FittedPatch,
    layers: CoaddLayers,
    variance: np.ndarray,
    draws: list[np.ndarray],
    residual_draws: list[np.ndarray],
    leakage: list[dict[str, Any]],
) -> Restoration:
    """Put together what was made of a patch.

    Parameters
    ----------
    fitted : `FittedPatch`
        The restored sky.
    layers : `~lsst.coadd.deepprior.noise.CoaddLayers`
        Coadds of the visits and of what it leaves of them.
    variance : `numpy.ndarray`, (y, x)
        Variance of the restored image, in nJy^2.
    draws, residual_draws : `list` [`numpy.ndarray`], (y, x)
        Noise realisations of the restored image and of the residual, in nJy.
    leakage : `list` [`dict`]
        What `~lsst.coadd.deepprior.psf_check.measure_leakage` found.

    Returns
    -------
    restoration : `Restoration`
        The result.
    """
    data = fitted.data
    image, sigma = fitted.image(fitted.points.latent), data.sigma
    covered = layers.n_good > 0
    plain = Coadd(image, sigma, layers.residual, layers.variance, layers.psf)
    plain = plain.correlated(block_correlation(data.sampling))
    carried = prior_carried(image, variance, layers.residual, layers.n_good, plain)
    fitted.times["total"] = time.monotonic() - fitted.started
    return Restoration(
        image=image,
        variance=np.where(covered, variance, np.float32(np.nan)),
        target_psf=gaussian_stamp(sigma),
        target_sigma=sigma,
        coadd=layers.coadd,
        residual=layers.residual,
        residual_variance=layers.variance,
        residual_psf=layers.psf,
        noise_realizations=draws[: fitted.settings.n_noise_realizations],
        residual_noise_realizations=residual_draws,
        n_visits=layers.n_visits,
        n_good=layers.n_good,
        masked=layers.masked,
        clipped=layers.clipped,
        outliers=layers.outliers,
        prior_carried=carried,
        cell_weight=layers.weight,
        cell_good_fraction=data.good_fraction,
        cell_overlap=data.overlap,
        curves=fitted.curves,
        metrics=_metrics(fitted, layers, image, variance, leakage),
    )


def _variance(
    fitted: FittedPatch, correlations: np.ndarray, progress: Progress | None
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Restore new noise on the model itself; return the variance of what changes, and what to publish."""
    latent, settings = fitted.points.latent, fitted.settings
    image = fitted.image(latent)
    differences, residuals = [], []
    n_draws = max(settings.n_variance_draws, settings.n_noise_realizations)
    for draw in range(n_draws):
        seed = settings.seed + 1000 * (draw + 1)
        _, again = fitted.drawn(latent, seed, correlations)
        differences.append(fitted.image(again) - image)
        if draw < settings.n_noise_realizations:
            residuals.append(fitted.residual_of(again, latent, seed, correlations))
        if progress is not None:
            progress("noise", draw + 1, n_draws, float(np.std(differences[-1])))
    return local_variance(differences, image, fitted.noise), differences, residuals


def _leakage(fitted: FittedPatch, correlations: np.ndarray, first_draw: np.ndarray) -> list[dict[str, Any]]:
    """Restore the first noise realisation once more, with stars in it; compare them with the target PSF.

    Nothing is restored where there is no room for a star.
    """
    data, latent, seed = fitted.data, fitted.points.latent, fitted.settings.seed
    image = fitted.image(latent)
    stars = place_stars(data, fitted.observations, image, seed)
    if len(stars.flux) == 0:
        return []
    _, again = fitted.drawn(latent + injected_latent(data, stars), seed + 1000, correlations)
    return measure_leakage(fitted.image(again) - (image + first_draw), stars, data.sigma)


def _metrics(
    fitted: FittedPatch,
    layers: CoaddLayers,
    image: np.ndarray,
    variance: np.ndarray,
    leakage: list[dict[str, Any]],
) -> dict[str, Any]:
    """Collect the numbers of the run."""
    data, curves = fitted.data, fitted.curves
    covered = layers.n_good > 0
    seen = layers.n_visits > 0
    return {
        "method": fitted.method,
        "n_visits": int((data.group >= 0).sum()),
        "network": {"conditions": fitted.conditions, "outside": fitted.outside},
        "points": {"tried": fitted.points.n_candidates, "kept": len(fitted.points.flux)},
        "settings": dataclasses.asdict(fitted.settings),
        "psf": {
            "target_fwhm_pixels": data.sigma * FWHM_PER_SIGMA,
            "visit_fwhm_pixels": {name: float(s) for name, s in zip(data.names, data.seeing, strict=True)},
            "injected_stars": leakage,
        },
        "noise": {
            "coadd_sigma_nJy": _root_median(layers.variance[seen]),
            "restored_sigma_nJy": _root_median(variance[covered]),
        },
        "residual": {
            "chi2_per_pixel": layers.chi2,
            "median_nJy": float(np.median(layers.residual[seen])),
            "clipped_fraction": float(layers.clipped.mean()),
        },
        "held_out": {"first": curves["held_out"][0], "last": curves["held_out"][-1]}
        if curves["held_out"]
        else {},
        "flux": {
            "restored_total_nJy": float(image[seen].sum(dtype=np.float64)),
            "residual_total_nJy": float(layers.residual[seen].sum(dtype=np.float64)),
            "coadd_total_nJy": float(layers.coadd[seen].sum(dtype=np.float64)),
        },
        "seconds": fitted.times,
    }


def _root_median(variance: np.ndarray) -> float:
    """Return the root of the median."""
    return float(np.sqrt(np.median(variance)))
