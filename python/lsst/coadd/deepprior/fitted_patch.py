# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The sky of a patch, restored, without what is known of its errors."""

from __future__ import annotations

__all__ = ("MARGIN", "FittedPatch", "Progress", "RestoreSettings", "fit_patch")

import copy
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .baselines import inner_smooth, maximum_likelihood
from .batches import Batches
from .border_stars import coadd_stamps, place_border_stars
from .conditions import patch_conditions
from .data_steps import data_steps
from .fit import mean_latent_image
from .halves import in_halves
from .network import Features, Trunk, encoder_features, latent_and_slope
from .noise import NoisyModel, coadd_layers
from .noise_draws import draw_noise
from .numerical_settings import check_settings
from .observation import Observation
from .operators import CellLayout
from .parallel import give_freed_memory_back
from .patch_data import NothingToRestoreError, PatchData
from .point_sources import PointSources, point_sources
from .psf import target_sigma
from .scratch import fit_scratch
from .statistics import VisitSets
from .weights import TrainedNetwork

if TYPE_CHECKING:
    from .fit_checkpoint import FitCheckpoint

_LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int, float], None]
"""Called with the phase, the step, the number of steps and the loss."""

_DRAW_STEPS = 0.3
"""Steps of maximum likelihood for a noise realisation, as a part of those of the image: without new
linearisations, which disturb their acceleration, so many give bright pixels the same noise."""

_BRIGHT = 10.0
_LOST = 0.5
"""A network has lost the light if it leaves less than this part of it in most pixels of the base that are so
many times brighter than the noise. One that predicts visits at all keeps nearly all of it; one that has not
may still keep the brightest star."""

MARGIN = 16
"""Width in pixels of the visits of the canvas around the patch, for the light of sources just outside."""


@dataclasses.dataclass(frozen=True)
class RestoreSettings:
    """Numerical settings of `restore`.

    Parameters
    ----------
    target_fwhm : `float` or `None`
        FWHM of the target PSF in pixels; `None` is what `~lsst.coadd.deepprior.psf.target_sigma` chooses.
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
        check_settings(
            self,
            {
                "base_steps": 1,
                "steps": 0,
                "refresh_every": 1,
                "n_splits": 1,
                "n_variance_draws": 1,
                "n_noise_realizations": 0,
            },
        )


@dataclasses.dataclass(frozen=True, eq=False)
class FittedPatch:
    """A patch of which the sky is restored, and not yet what is known of its errors.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The same visits on their canvas.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    stamps : `numpy.ndarray`, (i, j, k, k)
        PSF of the coadd of the visits in every cell.
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
    stamps: np.ndarray
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
        ny, nx = self.data.layout.shape
        smooth = inner_smooth(latent, self.data.sigma)
        image = smooth[self.data.margin : self.data.margin + ny, self.data.margin : self.data.margin + nx]
        return image.cpu().numpy().astype(np.float32)

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
        noisy : `~lsst.coadd.deepprior.patch_data.PatchData`
            The patch with the statistics of the drawn visits.
        again : `torch.Tensor`, (y, x)
            The latent image that is restored from them, in nJy.
        """
        give_freed_memory_back()
        noisy = draw_noise(self.data, self.sets, latent, seed, correlations)
        give_freed_memory_back()
        steps = math.ceil(_DRAW_STEPS * self.settings.base_steps)
        solution = maximum_likelihood(noisy, self.sets, steps=steps)
        features = encoder_features(solution)[0]
        del solution
        give_freed_memory_back()
        return noisy, _latent(noisy, self.sets, self.stamps, self.net, features).latent

    def residual_of(
        self, again: torch.Tensor, latent: torch.Tensor, seed: int, correlations: np.ndarray
    ) -> np.ndarray:
        """Return the residual coadd of drawn visits, (y, x), in nJy; ``again`` is restored from them."""
        give_freed_memory_back()
        model = NoisyModel(self.observations, self.data, latent, seed, correlations)
        return coadd_layers(self.data.with_observations(model), again).residual


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
    sigma: float | None = None,
) -> FittedPatch:
    """Restore the sky of a patch: `restore` without what is known of the errors.

    Other parameters, and what is raised, are those of `restore`.

    Parameters
    ----------
    sigma : `float`, optional
        Sigma of the target PSF in pixels, in place of what the settings and the seeing say.

    Returns
    -------
    fitted : `FittedPatch`
        The restored sky.
    """
    started = time.monotonic()
    if not len(observations):
        raise NothingToRestoreError("There is no visit of the patch to restore.")
    data = PatchData(
        observations,
        layout,
        (lambda seeing: target_sigma(seeing, settings.target_fwhm)) if sigma is None else sigma,
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
    conditions = patch_conditions(data, solution, settings.base_steps)
    del solution
    give_freed_memory_back()
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
        if outside:
            _LOG.info("The patch is outside of what the network was trained on (%s).", "; ".join(outside))
        to_fit = data
        if data.n_groups == 1:
            base = latent_and_slope(features.start, features.noise)[0]
            to_fit = in_halves(data, base, settings.seed)
        net, curve = fit_scratch(
            to_fit,
            settings,
            progress,
            checkpoint,
            batches,
            is_sound=functools.partial(_keeps_light, features=features),
        )
        method = "network fitted from scratch"
        if net is None:
            method = "maximum likelihood: the network that was fitted lost the light of bright sources"
        curves["fit_step"] = [float(step) for step, _ in curve]
        curves["held_out"] = [value for _, value in curve]
    stamps = coadd_stamps(data)
    points = _latent(data, sets, stamps, net, features, progress)
    del features
    give_freed_memory_back()
    times["fit"] = time.monotonic() - mark
    return FittedPatch(
        observations=observations,
        data=data,
        sets=sets,
        stamps=stamps,
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


def _keeps_light(net: Trunk, features: Features) -> bool:
    """Return whether a network keeps what the data show beyond doubt."""
    base = latent_and_slope(features.start, features.noise)[0]
    bright = base > _BRIGHT * features.noise
    kept = mean_latent_image(net, features)[bright] / base[bright]
    return len(kept) == 0 or float(kept.median()) > _LOST


def _latent(
    data: PatchData,
    sets: VisitSets,
    stamps: np.ndarray,
    net: Trunk | None,
    features: Features,
    progress: Progress | None = None,
) -> PointSources:
    """Return the latent image of the set of all visits (without a network the base) and its points."""

    def report(phase: str) -> Callable[[int, int], None]:
        return lambda step, n_steps: progress(phase, step, n_steps, math.nan) if progress else None

    if net is None:
        latent = latent_and_slope(features.start, features.noise)[0]
    else:
        image = mean_latent_image(net, features)
        give_freed_memory_back()
        latent = data_steps(data, sets, image, features.gate, report("data steps"))
    give_freed_memory_back()
    latent = place_border_stars(data, sets, latent, stamps)
    give_freed_memory_back()
    return point_sources(data, sets, latent, report("points"))
