# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Smooth light that a prior has taken from the image, as the halos of large galaxies, is given back."""

from __future__ import annotations

__all__ = ("regain_extended_light",)

from collections.abc import Iterator

import numpy as np
import torch

from .box_maximum import box_maximum
from .groups import lower_median, median_of
from .patch_data import PatchData
from .smoothing import gaussian_smooth
from .statistics import VisitSets

_WIDTH = 4.0
"""Sigma of the filter that finds smooth light, in sigmas of the target PSF: about two of the visits'."""

_WIDER = 2.0
"""Factor between it and a second filter, behind which a missing star has a fourth of its brightness."""

_LEAST, _CERTAIN = 6.0, 9.0
"""Signal to noise ratio behind that filter from which, and above which all of, the light is given back."""

_MODEL_ERROR = 0.02
"""Part of the model's own light, behind that filter, that may be wrong where PSFs are."""

_HOLE = 4.0
"""Half the side of the largest hole in what is given back that is closed, in sigmas of the filter."""

_STEPS = 4
"""Number of steps where there is such light. Robust statistics tell no more than their threshold in each."""

_SHALLOWEST = 0.01
"""Smallest depth of a pixel, as a part of the deepest one's, for which light is told from nothing."""

_FEWEST = 0.2
"""Smallest part of the filter that needs good pixels."""


def regain_extended_light(data: PatchData, sets: VisitSets, latent: torch.Tensor) -> torch.Tensor:
    r"""Give back smooth light that the visits have and a model has not.

    A network restores what it has seen in training. Where that had no large galaxies, it takes their halos
    for sky. With :math:`R = N - c A u` the matched image of what the model leaves and :math:`G` a Gaussian
    twice as wide as the PSF of the visits,

    .. math:: u \leftarrow u + w\, d, \qquad d = \min\left(\frac{G * R}{(G * c)\, A 1},
              \operatorname*{med}_t \frac{G * m_t (y_t - K_t u)}{G * m_t}\right),

    where :math:`w` rises from 0 to 1 while the signal to noise ratio of d, with 2 per cent of the model's
    light as a part of the noise, goes from 6 to 9. So it must behind a filter of twice the width, which tells
    smooth light from a star that is missing. Holes in w, where bright stars are in front, are closed, and
    what w was in one step it is in the next ones, so that they give back all of the light. The lower median
    over the visits keeps out what one visit has, such as an unmasked satellite trail. An image that has all
    light that stands out is not changed at all.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u, in nJy.

    Returns
    -------
    latent : `torch.Tensor`, (y, x)
        The image with the light, in nJy.
    """
    width = _WIDTH * data.sigma
    full = sets.gram.forward(torch.ones_like(latent)[None])[0]
    full = full.clamp_min(_SHALLOWEST * float(full.max()))
    noise = data.matched_noise() * _noise_ratio(data.gram_kernel(), width)
    coverage: torch.Tensor | None = None
    share = torch.zeros_like(latent)
    for _ in range(_STEPS):
        statistics = data.linearise(sets, latent[None], coverage=coverage)
        coverage = statistics.coverage
        prediction = coverage[0] * sets.gram.forward(latent[None])[0]
        error = torch.hypot(noise, _MODEL_ERROR * gaussian_smooth(prediction, width))
        weight = gaussian_smooth(coverage[0], width).clamp_min(_FEWEST) * full
        light = gaussian_smooth(statistics.seen[0] - prediction, width) / weight
        smooth = light
        if bool(torch.maximum(share, _share(light * weight, error)).any()):
            if not data.is_drawn:
                light = torch.minimum(light, _median_left(data, latent, width))
            wider = gaussian_smooth(statistics.seen[0] - prediction, _WIDER * width) / weight
            smooth = torch.minimum(light, wider)
        share = torch.maximum(share, _share(smooth * weight, error))
        if not bool(share.any()):
            break
        share = torch.where(error > 0.0, _without_holes(share, width), 0.0)
        latent = (latent + share * light).clamp_min(0.0)
    return latent


def _share(signal: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return the part of a signal that is given back; nothing where there is no noise, and so no visit."""
    significance = torch.where(error > 0.0, signal / error, 0.0)
    return ((significance - _LEAST) / (_CERTAIN - _LEAST)).clamp(0.0, 1.0)


def _without_holes(share: torch.Tensor, width: float) -> torch.Tensor:
    """Close holes (grey closing), such as bright stars leave in front of a galaxy."""
    size = 1 + 2 * round(_HOLE * width)
    return -box_maximum(-box_maximum(share, size, size), size, size)


def _noise_ratio(kernels: torch.Tensor, width: float) -> float:
    """Return by how much a Gaussian reduces the noise of the matched image.

    Its noise has the covariance A, whose kernel in the cells is (i, j, k, k).
    """
    kernel = kernels.sum(dim=(0, 1))
    centre = kernel.shape[-1] // 2
    reach = int(8.0 * width) + 1
    smooth = gaussian_smooth(gaussian_smooth(torch.nn.functional.pad(kernel, (reach,) * 4), width), width)
    return float((smooth[centre + reach, centre + reach] / kernel[centre, centre]).sqrt())


def _median_left(data: PatchData, latent: torch.Tensor, width: float) -> torch.Tensor:
    """Return the lower median over the visits of what a model leaves of them, smoothed, in nJy (y, x)."""
    model = latent[None]

    def left(group: int) -> Iterator[torch.Tensor]:
        for _, _, visit in data.read(np.flatnonzero(data.group == group).tolist()):
            prediction = visit.kernel.forward(model)[0]
            limit = data.scale(visit, prediction).mul_(data.huber_delta)
            good = (visit.weight > 0).to(latent.dtype)
            residual = (visit.flux - prediction).clamp(-limit, limit) * good
            seen = gaussian_smooth(good, width)
            enough = seen > _FEWEST / data.sampling**2
            yield torch.where(enough, gaussian_smooth(residual, width) / seen, torch.nan)

    return median_of([lower_median(left(group)) for group in range(data.n_groups)]).nan_to_num(0.0)
