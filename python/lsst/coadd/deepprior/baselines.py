# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Restorations without a network: the base and features of the network, and what it is compared with."""

from __future__ import annotations

__all__ = (
    "PSF_ERRORS",
    "STAGES",
    "AcceleratedSteps",
    "MaximumLikelihood",
    "inner_smooth",
    "maximum_likelihood",
    "maximum_likelihood_step",
    "robust_start",
)

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from .parallel import by_rows
from .patch_data import PatchData
from .psf import FWHM_PER_SIGMA, inner_sigma
from .smoothing import gaussian_smooth
from .statistics import SetStatistics, VisitSets, set_products

PSF_ERRORS = (1.0, 0.3, 0.1, 0.03)
"""PSF errors of the first refreshes: star cores are clipped only once the model has come near them."""

STAGES = (20, 80)
"""Numbers of steps whose images are kept for sources that fewer do not resolve and that need not all of them:
in a large galaxy maximum likelihood makes lumps of the noise. Chosen on simulated scenes of seeds that the
benchmark does not report; four stages are no better."""

_BRIGHT = 10.0
"""Signal to noise ratio of a pixel of the start above which it counts as bright."""

_REFRESH_EVERY = 20
"""Steps between two passes over the visits."""

_FIRST_STEPS, _EARLY_STEPS = 3, 6
"""Number of steps of the first and of the early image, which are not accelerated."""

_PLAIN_STEPS = 15
"""Number of steps before the acceleration begins."""

_DARK = 1e-18
"""Latent images below this (nJy) are 0. The squares of such numbers are too small for normal ones of float32,
and processors take many times as long for those that are not."""


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood:
    """Result of `maximum_likelihood`.

    Parameters
    ----------
    first, early : `torch.Tensor`, (set, y, x)
        Latent image after very few and after few steps, in nJy.
    stages : `tuple` [`torch.Tensor`, ...], (set, y, x)
        Latent images after the numbers of steps of `STAGES` that were taken, in nJy.
    latent : `torch.Tensor`, (set, y, x)
        Latent image after all steps, in nJy.
    statistics : `~lsst.coadd.deepprior.statistics.SetStatistics`
        Statistics linearised at ``latent``.
    """

    first: torch.Tensor
    early: torch.Tensor
    stages: tuple[torch.Tensor, ...]
    latent: torch.Tensor
    statistics: SetStatistics


def inner_smooth(latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolve a latent image with the inner kernel: ``x = r * u``.

    Parameters
    ----------
    latent : `torch.Tensor`, (..., y, x)
        Latent image u on the canvas; it is zero outside.
    sigma : `float`
        Sigma of the target PSF in pixels.

    Returns
    -------
    image : `torch.Tensor`, (..., y, x)
        The image x, whose PSF is the target.
    """
    return gaussian_smooth(latent, inner_sigma(sigma))


def maximum_likelihood_step(latent: torch.Tensor, statistics: SetStatistics) -> torch.Tensor:
    r"""Multiply by the ratio of data to prediction, :math:`u \leftarrow u\,K^T(w m \hat y) / K^T(w m K u)`.

    This is the multiplicative step for non-negative least squares (Daube-Witherspoon & Muehllehner 1986, IEEE
    TMI 5, 61) on the clipped data; like Richardson-Lucy it keeps u positive. The prediction is that of the
    Gram form times the part of it that had data at the linearisation, so that masked pixels, saturated cores
    and edges slow nothing down. The ratio is kept above 0.1 so that a pixel that a later refresh needs can
    come back. Where PSFs are sharper than the target, it is taken to a power below 1. What has become darker
    than anything that could come back is 0.
    """
    new, damping = statistics.sets.gram.forward(latent), statistics.sets.damping
    tiny = torch.finfo(latent.dtype).tiny

    def multiply(
        new: torch.Tensor,
        latent: torch.Tensor,
        coverage: torch.Tensor,
        uncovered: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        ratio = torch.div(seen, new.mul_(coverage).clamp_min_(tiny), out=new).clamp_(0.1, 10.0)
        if damping is not None:
            ratio.pow_(damping)
        ratio.masked_fill_(uncovered, 1.0).mul_(latent)
        torch.threshold_(ratio, _DARK, 0.0)

    by_rows(multiply, new, latent, statistics.coverage, statistics.uncovered, statistics.seen)
    return new


class AcceleratedSteps:
    """Multiplicative steps with the vector extrapolation of Biggs & Andrews (1997, Applied Optics 36, 1766).

    Every step starts from ``u + a (u - u_previous)`` with ``a`` the correlation of the last two corrections
    of a set, which takes star cores to the target PSF in some 240 steps instead of thousands.

    Parameters
    ----------
    latent : `torch.Tensor`, (set, y, x)
        Start, positive where a pixel may become positive.

    Notes
    -----
    Latent images that were returned are overwritten two steps later.
    """

    def __init__(self, latent: torch.Tensor) -> None:
        self.latent = latent
        self._previous: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._momentum: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None

    def step(self, update: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Take one step and return the new latent image.

        Parameters
        ----------
        update : `~collections.abc.Callable`
            Takes a latent image to the next one.
        """
        start = self.latent
        if self._momentum is not None and self._previous is not None:
            start, weight = self._previous, 1.0 + self._momentum

            def extrapolate(start: torch.Tensor, latent: torch.Tensor) -> None:
                torch.maximum(start.lerp_(latent, weight), 0.1 * latent, out=start)

            by_rows(extrapolate, start, self.latent)
        new = update(start)
        # What was extrapolated is not needed any more, other than the start.
        correction = torch.sub(new, start, out=start if start is self._previous else None)
        norm = _dot(correction, correction)
        if self._last is not None and self._norm is not None:
            overlap = _dot(correction, self._last)
            self._momentum = (overlap / self._norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(0.0, 0.999)
            self._previous = self.latent
        self._last, self._norm = correction, norm
        self.latent = new
        return new


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the scalar product of images set by set, (set, 1, 1)."""
    return set_products(one, other)[:, None, None]


def robust_start(data: PatchData, sets: VisitSets) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positive starts that outliers of single visits have not reached, a smooth and a sharp one.

    The smooth one is the lower median of the visits, smoothed with a Gaussian as wide as the median seeing,
    since multiplicative steps keep the pixel noise of their start in whatever the visits are blind to. In the
    sharp one bright pixels with data are those of the median itself, which shortens the way to star cores.
    Those beyond the data stay smooth: were they dark, a star beyond the border would be piled up at it, from
    where multiplicative steps take thousands to move it.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        The sets.

    Returns
    -------
    smooth, sharp : `torch.Tensor`, (set, y, x)
        In nJy; 0 where no visit sees the canvas.
    """
    seeing = float(np.median(data.seeing[data.group >= 0])) / FWHM_PER_SIGMA
    sensitivity = sets.gram.forward(torch.ones_like(sets.sensitivity))
    noise = sensitivity.clamp_min(torch.finfo(data.dtype).tiny).rsqrt()
    median = data.lower_median(sets)
    smooth = torch.maximum(gaussian_smooth(median, seeing), 0.1 * noise)
    bright = (smooth / (_BRIGHT * noise)).square()
    core = torch.where(median == 0.0, smooth, torch.maximum(median, 0.1 * noise))
    sharp = torch.lerp(smooth, core, bright / (1.0 + bright))
    return smooth * (sensitivity > 0), sharp * (sensitivity > 0)


def maximum_likelihood(
    data: PatchData,
    sets: VisitSets,
    *,
    steps: int = 240,
    progress: Callable[[int, int, float], None] | None = None,
) -> MaximumLikelihood:
    """Maximise the robust likelihood of several sets of visits by many multiplicative steps.

    The start is the lower median of the visits and the error ascribed to the PSF shrinks from refresh to
    refresh, so that outliers of single visits never enter while bright star cores are not clipped before the
    model has reached them.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        The sets.
    steps : `int`, optional
        Number of steps of the final image.
    progress : `~collections.abc.Callable`, optional
        Called with the step, the number of steps and the objective after every refresh.

    Returns
    -------
    result : `MaximumLikelihood`
        Latent images and statistics of every set.
    """
    early, latent = robust_start(data, sets)
    first = early
    stages = []
    accelerated: AcceleratedSteps | None = None
    for step in range(steps):
        if step % _REFRESH_EVERY == 0:
            refresh = step // _REFRESH_EVERY
            error = PSF_ERRORS[refresh] if refresh < len(PSF_ERRORS) else data.psf_error
            statistics = data.linearise(sets, latent, psf_error=error)
            if progress is not None:
                progress(step, steps, float(statistics.objective.mean()))
        if step < _EARLY_STEPS:
            early = maximum_likelihood_step(early, statistics)
        if step < _FIRST_STEPS:
            first = early
        if step < _PLAIN_STEPS:
            latent = maximum_likelihood_step(latent, statistics)
        else:
            accelerated = AcceleratedSteps(latent) if accelerated is None else accelerated
            latent = accelerated.step(functools.partial(maximum_likelihood_step, statistics=statistics))
        if step + 1 in STAGES:
            stages.append(latent.clone())
    return MaximumLikelihood(first, early, tuple(stages), latent, data.linearise(sets, latent))
