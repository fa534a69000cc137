# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Steps after the network: sources that stand out get their flux back, and what no source claims goes."""

from __future__ import annotations

__all__ = ("data_steps", "regain_flux")

from collections.abc import Callable

import torch

from .extended_light import regain_extended_light
from .patch_data import PatchData
from .statistics import SetStatistics, VisitSets

_SIGNIFICANCE = 20.0
"""Signal to noise ratio of the model, seen through a matched filter, at which a step is half a step. Chosen
with `_STEPS` on simulated scenes of seeds that the benchmark does not report: lower values change faint
sources more and cost fidelity."""

_STEPS = 6
"""Number of steps; more of them change little."""

_UNCLAIMED = 0.7
"""Signal to noise ratio of the model, seen through a matched filter, at which half of the light is left to
the residual. Chosen on the same scenes: from 0.5 to 1 the sky of the image gets nearer to zero, while
galaxies near the limit of detection lose some per cent."""


def data_steps(
    data: PatchData,
    sets: VisitSets,
    latent: torch.Tensor,
    gate: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    r"""Give back the flux of significant sources that a prior has taken.

    Smooth light that is missing altogether comes first (`~lsst.coadd.deepprior.extended_light`). Then, since
    a network of limited size leaves some per cent of the light even of sources far above the noise, the
    multiplicative step of maximum likelihood (`~lsst.coadd.deepprior.baselines.maximum_likelihood_step`) is
    taken to the power of how sure the data are that there is a source,

    .. math:: u \leftarrow u \left(\frac{N}{c A u}\right)^{h\, q^2 / (1 + q^2)}, \qquad
              q = \frac{c A u}{\tau\, \sigma_M},

    with :math:`\sigma_M` the noise of the matched image and h the part of the network in the pixel. The ratio
    is smooth on the scale of the PSF, so significant sources get their flux back while the sky and the shapes
    stay.

    A mean of what the sky may be has some light everywhere, since a source too faint to be seen may be
    anywhere. In the end that light is left to the residual, where it is counted without being placed,

    .. math:: u \leftarrow u\, \frac{s^2}{s_0^2 + s^2}, \qquad s = \frac{A u}{\sigma_M}, \quad s_0 = 0.7.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u of the network, in nJy.
    gate : `torch.Tensor`, (y, x)
        Part of the network's correction that was let through, 0 to 1; bright stars have none and fit the
        data already.
    progress : `~collections.abc.Callable`, optional
        Called with the number of steps done and of all, after each.

    Returns
    -------
    latent : `torch.Tensor`, (y, x)
        The image with the steps taken, in nJy.
    """
    noise = data.matched_noise()
    latent = regain_extended_light(data, sets, latent)
    latent = regain_flux(data, sets, latent, gate, progress)
    significance = torch.where(noise > 0.0, sets.gram.forward(latent[None])[0] / noise, torch.inf).square()
    return latent / (1.0 + _UNCLAIMED**2 / significance.clamp_min(torch.finfo(latent.dtype).tiny))


def regain_flux(
    data: PatchData,
    sets: VisitSets,
    latent: torch.Tensor,
    gate: torch.Tensor | float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Take the steps of `data_steps` that give significant sources the flux that the data have.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u, in nJy.
    gate : `torch.Tensor`, (y, x) or `float`, optional
        By how much a pixel may change, 0 to 1.
    progress : `~collections.abc.Callable`, optional
        As in `data_steps`.

    Returns
    -------
    latent : `torch.Tensor`, (y, x)
        The image with the steps taken, in nJy.
    """
    noise = data.matched_noise()
    tiny = torch.finfo(latent.dtype).tiny
    statistics: SetStatistics | None = None
    for step in range(_STEPS):
        # That the coverage is of the first image changes the steps, but not where they end.
        known = None if statistics is None else statistics.coverage
        statistics = data.linearise(sets, latent[None], coverage=known)
        coverage = statistics.coverage[0]
        prediction = coverage * sets.gram.forward(latent[None])[0]
        # In cells without a visit there is no noise, and nothing to hear.
        significance = torch.where(noise > 0.0, prediction / (_SIGNIFICANCE * noise), 0.0).square()
        power = gate * significance / (1.0 + significance)
        ratio = (statistics.seen[0] / prediction.clamp_min(tiny)).clamp(0.1, 10.0)
        latent = latent * torch.where(coverage > 0.0, ratio**power, 1.0)
        if progress is not None:
            progress(step + 1, _STEPS)
    return latent
