# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""New noise on a model, as a restoration sees it: statistics from one pass over the visits.

Visits :math:`K_t u + n_t` are restored to see what their noise does to the image. That u is known, so nothing
has to be linearised again and again. Huber's estimate answers to noise, to first order (Huber & Ronchetti
2009, Robust Statistics, section 7.6), as least squares answer to

.. math:: \hat n = \frac{\mathrm{clip}(n, \pm\delta s)}{P(|n| < \delta s)}, \qquad
          P = \mathrm{erf}\!\left(\frac{\delta s}{\sqrt{2}\,\sigma}\right),

with :math:`\sigma` the noise of the pixel and s the scale of the clipping at the model. The part of the
prediction that has data is that of u plus a sky of the noise of the coadd: a restoration puts light also
where the model has next to none, and there the wings of a masked star would tell what part of it has data.
"""

from __future__ import annotations

__all__ = ("draw_noise",)

import math
from collections.abc import Iterator

import numpy as np
import torch

from .groups import lower_median
from .noise_correlation import correlated_noise
from .patch_data import PatchData
from .shared_spectra import ModelSpectra
from .statistics import MAX_COVERAGE, StatisticsSums, VisitSets


def draw_noise(
    data: PatchData, sets: VisitSets, latent: torch.Tensor, seed: int, correlations: np.ndarray
) -> PatchData:
    """Draw visits as they would be if a model were true, in one pass over their masks and variances.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy.
    seed : `int`
        Seed of the noise, which is that of `~lsst.coadd.deepprior.noise.NoisyModel`.
    correlations : `numpy.ndarray`, (visit, k, k)
        Correlation of the noise of each visit (see
        `~lsst.coadd.deepprior.noise_correlation.visit_correlations`).

    Returns
    -------
    noisy : `~lsst.coadd.deepprior.patch_data.PatchData`
        The patch with the statistics of the drawn visits, linearised at ``latent``.

    Raises
    ------
    ValueError
        Raised if there is more than one set.
    """
    if len(sets) != 1:
        raise ValueError(f"Noise is drawn for one set of all visits, not for {len(sets)}.")
    models = latent[None]
    sums, seen = StatisticsSums(models, with_coverage=True), ModelSpectra(models)
    every = torch.zeros(1, dtype=torch.int64, device=data.device)

    def fluxes(group: int) -> Iterator[torch.Tensor]:
        for index, observation, visit in data.read(np.flatnonzero(data.group == group).tolist()):
            shape = observation.flux.shape
            prediction = seen.seen_by(visit.kernel)
            noise = torch.zeros_like(prediction)
            y, x = (o + data.margin for o in observation.origin)
            drawn = correlated_noise(shape, correlations[index], np.random.default_rng([seed, index]))
            noise[0, y : y + shape[0], x : x + shape[1]] = torch.as_tensor(
                drawn, dtype=data.dtype, device=data.device
            )
            noise *= visit.variance.sqrt()
            limit = data.scale(visit, prediction).mul_(data.huber_delta)
            flux = torch.where(visit.weight > 0, prediction[0] + noise[0], torch.nan)
            clipped = torch.clamp(noise, -limit, limit)
            # At the noise of the pixel alone, where nothing is drawn too.
            least = math.erf(data.huber_delta / math.sqrt(2.0))
            certainty = limit.mul_(visit.variance.clamp_min(torch.finfo(data.dtype).tiny).mul(2.0).rsqrt())
            clipped /= certainty.erf_().clamp_min_(least)
            sums.add(visit, every, prediction, clipped, noise)
            yield flux

    medians = [lower_median(fluxes(group)) for group in range(data.n_groups)]
    tiny = torch.finfo(data.dtype).tiny
    ones = sets.gram.forward(torch.ones_like(models))
    sky = float(ones[ones > 0.0].median()) ** -0.5
    coverage = sums.predicted + sky * sets.sensitivity
    coverage /= (sets.gram.forward(models) + sky * ones).clamp_min_(tiny)
    coverage.clamp_(0.0, MAX_COVERAGE)
    statistics = data.without_gaps(sums.statistics(sets, models, coverage))
    return data.with_statistics(statistics, data.median_of_groups(sets, medians))
