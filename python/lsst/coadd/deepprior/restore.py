# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The restoration of a patch: from arrays to arrays.

A convolutional encoder/decoder is fitted to the visits of the patch themselves (Navarro, Hall, Budavari &
Sukurdeep 2023, arXiv:2302.02030), with the visits split so that fitting their noise does not pay: in each
step the encoder reads one set of visits and the loss is taken on the others (Lehtinen et al. 2018,
arXiv:1803.04189).
"""

from __future__ import annotations

__all__ = ("FittedPatch", "Restoration", "RestoreSettings", "assemble", "fit_patch", "restore")

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .baselines import inner_smooth, maximum_likelihood
from .batches import Batches
from .conditions import patch_conditions
from .data_steps import data_steps
from .finer import block_correlation
from .fit import mean_latent_image
from .halves import in_halves
from .joint_fit import Coadd
from .network import Features, Trunk, encoder_features, latent_and_slope
from .noise import CoaddLayers, NoisyModel, coadd_layers, local_variance
from .noise_correlation import visit_correlations
from .noise_draws import draw_noise
from .observation import Observation
from .operators import CellLayout
from .outliers import Outlier
from .point_sources import PointSources, point_sources
from .prior_carried import prior_carried
from .psf import FWHM_PER_SIGMA, gaussian_stamp, target_sigma
from .psf_check import injected_latent, measure_leakage, place_stars
from .scratch import fit_scratch
from .statistics import PatchData, VisitSets
from .weights import TrainedNetwork

if TYPE_CHECKING:
    from .fit_checkpoint import FitCheckpoint

Progress = Callable[[str, int, int, float], None]
"""Called with the phase, the step, the number of steps and the loss."""

_DRAW_STEPS = 0.3
"""Steps of maximum likelihood for a noise realisation, as a part of those of the image: without new
linearisations, which disturb their acceleration, so many give bright pixels the same noise."""

MARGIN = 16
"""Width in pixels of the visits of the canvas around the patch, for the light of sources just outside."""


@dataclasses.dataclass(frozen=True)
class RestoreSettings:
    """Numerical settings of `restore`.

    Parameters
    ----------
    target_fwhm : `float` or `None`
        FWHM of the target PSF in pixels; `None` is half the median seeing, at least 2 pixels.
    base_steps : `int`
        Steps of maximum likelihood behind the base that the network corrects.
    steps : `int`
        Steps of the fit of the network; 0 returns the base.
    refresh_every : `int`
        Steps between two passes over the visits that linearise the loss anew.
    learning_rate : `float`
        Largest learning rate of Adam.
    n_splits : `int`
        Number of ways in which the visits are split.
    huber_delta : `float`
        Threshold of the Huber loss in standard deviations.
    psf_error : `float`
        Relative error of the PSF models, a part of the predicted flux.
    n_variance_draws : `int`
        Least number of noise realisations behind the variance plane.
    n_noise_realizations : `int`
        Number of noise realisations that are returned; if it is the larger, so many are drawn.
    check_psf : `bool`
        Restore once more with injected stars and compare their PSF with the target.
    seed : `int`
        Seed of all random numbers.
    """

    target_fwhm: float | None = None
    base_steps: int = 240
    steps: int = 400
    refresh_every: int = 25
    learning_rate: float = 2e-3
    n_splits: int = 24
    huber_delta: float = 1.5
    psf_error: float = 0.01
    n_variance_draws: int = 4
    n_noise_realizations: int = 1
    check_psf: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("base_steps", 1),
            ("steps", 0),
            ("refresh_every", 1),
            ("n_splits", 1),
            ("n_variance_draws", 1),
            ("n_noise_realizations", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if self.learning_rate <= 0.0 or self.huber_delta <= 0.0 or self.psf_error < 0.0:
            raise ValueError(
                "learning_rate and huber_delta must be positive and psf_error must not be negative."
            )


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


@dataclasses.dataclass(frozen=True, eq=False)
class FittedPatch:
    """A patch of which the sky is restored, and not yet what is known of its errors.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    data : `~lsst.coadd.deepprior.statistics.PatchData`
        The same visits on their canvas.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    settings : `RestoreSettings`
        Numerical settings.
    net : `~lsst.coadd.deepprior.network.Trunk` or `None`
        The network; `None` where the base is the result.
    points : `~lsst.coadd.deepprior.point_sources.PointSources`
        The latent image and the points in it.
    method : `str`
        What was done.
    conditions : `dict` [`str`, `float`]
        What a trained network is asked whether it knows.
    outside : `list` [`str`]
        What it does not know.
    curves : `dict` [`str`, `list` [`float`]]
        Objectives against steps.
    times : `dict` [`str`, `float`]
        Seconds that the parts took, to be added to.
    started : `float`
        When it began, by `time.monotonic`.
    """

    observations: Sequence[Observation]
    data: PatchData
    sets: VisitSets
    settings: RestoreSettings
    net: Trunk | None
    points: PointSources
    method: str
    conditions: dict[str, float]
    outside: list[str]
    curves: dict[str, list[float]]
    times: dict[str, float]
    started: float

    @property
    def noise(self) -> float:
        """Median noise of the coadd in nJy (`float`)."""
        depth = self.data.weight.sum(axis=0)
        return float(np.median(depth[depth > 0.0])) ** -0.5

    def image(self, latent: torch.Tensor) -> np.ndarray:
        """Return x = r * u on the pixels of the patch ((y, x), float32, nJy)."""
        return _image(self.data, latent)

    def drawn(
        self, latent: torch.Tensor, seed: int, correlations: np.ndarray
    ) -> tuple[PatchData, torch.Tensor]:
        """Draw new noise on a model, and restore what the visits would be.

        Parameters
        ----------
        latent : `torch.Tensor`, (y, x)
            The model: a latent image on the canvas, in nJy.
        seed : `int`
            Seed of the noise.
        correlations : `numpy.ndarray`, (visit, k, k)
            Correlation of the noise of each visit.

        Returns
        -------
        noisy : `~lsst.coadd.deepprior.statistics.PatchData`
            The patch with the statistics of the drawn visits.
        again : `torch.Tensor`, (y, x)
            The latent image that is restored from them, in nJy.
        """
        noisy = draw_noise(self.data, self.sets, latent, seed, correlations)
        steps = math.ceil(_DRAW_STEPS * self.settings.base_steps)
        solution = maximum_likelihood(noisy, self.sets, steps=steps)
        features = encoder_features(solution)[0]
        del solution
        return noisy, _latent(noisy, self.sets, self.net, features).latent

    def residual_of(
        self, again: torch.Tensor, latent: torch.Tensor, seed: int, correlations: np.ndarray
    ) -> np.ndarray:
        """Return the residual coadd of drawn visits, (y, x), in nJy; ``again`` is restored from them."""
        model = NoisyModel(self.observations, self.data, latent, seed, correlations)
        return coadd_layers(self.data.with_observations(model), again, self.observations).residual


def restore(
    observations: Sequence[Observation],
    layout: CellLayout,
    settings: RestoreSettings = RestoreSettings(),
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
        Raised if no visit has a good pixel in a cell with a PSF.
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
    image = _image(data, latent)
    if not np.isfinite(image).all():
        raise FloatingPointError("The restored image is not finite; please report this patch.")
    layers = coadd_layers(data, latent, observations)
    times["coadd"] = time.monotonic() - mark
    mark = time.monotonic()
    correlations = visit_correlations(data, latent, observations)
    variance, draws, residual_draws = _variance(fitted, correlations, progress)
    times["noise"] = time.monotonic() - mark
    mark = time.monotonic()
    leakage = _leakage(fitted, correlations, draws[0]) if settings.check_psf else []
    times["psf"] = time.monotonic() - mark
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
    carried = prior_carried(image, variance, layers.n_good, plain)
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


def fit_patch(
    observations: Sequence[Observation],
    layout: CellLayout,
    settings: RestoreSettings,
    *,
    network: TrainedNetwork | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    checkpoint: FitCheckpoint | None = None,
    batches: Batches | None = None,
) -> FittedPatch:
    """Restore the sky of a patch: `restore` without what is known of the errors.

    Parameters, and what is raised, are those of `restore`.

    Returns
    -------
    fitted : `FittedPatch`
        The restored sky.
    """
    started = time.monotonic()
    data = PatchData(
        observations,
        layout,
        lambda seeing: target_sigma(seeing, settings.target_fwhm),
        margin=MARGIN * observations[0].sampling,
        huber_delta=settings.huber_delta,
        psf_error=settings.psf_error,
        device=device,
    )
    sets = data.sets()
    times = {"read": time.monotonic() - started}
    curves: dict[str, list[float]] = {"base_step": [], "base_objective": [], "fit_step": [], "held_out": []}

    def base_progress(step: int, n_steps: int, objective: float) -> None:
        curves["base_step"].append(float(step))
        curves["base_objective"].append(objective)
        if progress is not None:
            progress("base", step, n_steps, objective)

    mark = time.monotonic()
    solution = maximum_likelihood(data, sets, steps=settings.base_steps, progress=base_progress)
    features = encoder_features(solution)[0]
    conditions = patch_conditions(data, solution)
    del solution
    times["base"] = time.monotonic() - mark
    mark = time.monotonic()
    outside = network.outside(conditions) if network is not None else []
    net: Trunk | None = None
    if network is not None and not outside:
        net = copy.deepcopy(network.trunk).to(device=data.device, dtype=data.dtype)
        method = "pretrained network"
    elif settings.steps == 0:
        method = "maximum likelihood: no steps asked for"
    else:
        to_fit = data
        if data.n_groups == 1:
            base = latent_and_slope(features.start, features.noise)[0]
            to_fit = in_halves(data, base, observations, settings.seed)
        net, curve = fit_scratch(to_fit, settings, progress, checkpoint, batches)
        method = "network fitted from scratch"
        curves["fit_step"] = [float(step) for step, _ in curve]
        curves["held_out"] = [value for _, value in curve]
    points = _latent(data, sets, net, features)
    del features
    times["fit"] = time.monotonic() - mark
    return FittedPatch(
        observations=observations,
        data=data,
        sets=sets,
        settings=settings,
        net=net,
        points=points,
        method=method,
        conditions=conditions,
        outside=outside,
        curves=curves,
        times=times,
        started=started,
    )


def _latent(data: PatchData, sets: VisitSets, net: Trunk | None, features: Features) -> PointSources:
    """Return the latent image of the set of all visits (without a network the base) and its points."""
    if net is None:
        latent = latent_and_slope(features.start, features.noise)[0]
    else:
        latent = data_steps(data, sets, mean_latent_image(net, features), features.gate)
    return point_sources(data, sets, latent)


def _image(data: PatchData, latent: torch.Tensor) -> np.ndarray:
    """Return x = r * u on the pixels of the patch."""
    ny, nx = data.layout.shape
    image = inner_smooth(latent, data.sigma)[data.margin : data.margin + ny, data.margin : data.margin + nx]
    return image.cpu().numpy().astype(np.float32)


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
    """Restore the first noise realisation once more, with stars in it; compare them with the target PSF."""
    data, latent, seed = fitted.data, fitted.points.latent, fitted.settings.seed
    image = fitted.image(latent)
    stars = place_stars(data, fitted.observations, image, seed)
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
            "visit_fwhm_pixels": {
                observation.name: float(s)
                for observation, s in zip(fitted.observations, data.seeing, strict=True)
            },
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
