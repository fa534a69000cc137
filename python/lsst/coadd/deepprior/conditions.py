# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Under which conditions a patch was observed: the axes of what a network is trained on."""

from __future__ import annotations

__all__ = ("AXES", "patch_conditions")

import numpy as np
import torch

from .baselines import MaximumLikelihood
from .patch_data import PatchData
from .psf import FWHM_PER_SIGMA

AXES = ("n_visits", "seeing_pixels", "target_pixels", "lit_fraction", "noise_correlation", "base_steps")
"""Names of the conditions."""

_LIT = 5.0
"""Significance of the matched image from which a pixel counts as lit by a source."""

_SKY = 1.0
"""Largest model, in units of the noise of the visit, of pixels in which its noise is correlated."""

_CLIP = 4.0
"""Largest deviation in units of the noise that enters the correlation."""

_N_CORRELATED = 3
"""Number of visits whose noise correlation is measured."""


def patch_conditions(data: PatchData, solution: MaximumLikelihood, base_steps: int) -> dict[str, float]:
    """Measure the conditions of a patch.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    solution : `~lsst.coadd.deepprior.baselines.MaximumLikelihood`
        Maximum-likelihood image of the one set of all visits.
    base_steps : `int`
        Number of steps behind it.

    Returns
    -------
    conditions : `dict` [`str`, `float`]
        By the names in `AXES`: number of visits with a good pixel; median FWHM of their PSFs and FWHM of the
        target PSF in pixels; share of the covered pixels that a source of more than 5 sigma lights; mean
        correlation of the noise of neighbouring pixels of a visit; number of steps of the image that the
        network reads.
    """
    usable = data.group >= 0
    return {
        "n_visits": float(usable.sum()),
        "seeing_pixels": float(np.median(data.seeing[usable])),
        "target_pixels": data.sigma * FWHM_PER_SIGMA,
        "lit_fraction": _lit_fraction(data, solution),
        "noise_correlation": _noise_correlation(data, solution.latent[0]),
        "base_steps": float(base_steps),
    }


def _lit_fraction(data: PatchData, solution: MaximumLikelihood) -> float:
    """Return the share of the covered pixels in which the matched image has more than `_LIT` sigma."""
    covered = solution.statistics.sets.depth[0] > 0
    lit = solution.statistics.seen[0] > _LIT * data.matched_noise()
    return float(lit[covered].to(data.dtype).mean())


def _noise_correlation(data: PatchData, latent: torch.Tensor) -> float:
    """Return the mean correlation of horizontal and vertical neighbours in the sky of some visits."""
    usable = np.flatnonzero(data.group >= 0)
    chosen = usable[np.linspace(0, len(usable) - 1, min(_N_CORRELATED, len(usable))).round().astype(int)]
    products, squares, n_pairs, n_pixels = 0.0, 0.0, 0, 0
    for index in chosen:
        visit = data.visit(int(index))
        prediction = visit.kernel.forward(latent)
        noise = visit.variance.sqrt()
        deviation = (visit.flux - prediction) / noise
        sky = (visit.weight > 0) & (prediction < _SKY * noise) & (deviation.abs() < _CLIP)
        deviation = torch.where(sky, deviation, 0.0)
        squares += float(deviation.square().sum())
        n_pixels += int(sky.sum())
        step = data.sampling
        for here, there in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            products += float((deviation[here] * deviation[there]).sum())
            n_pairs += int((sky[here] & sky[there]).sum())
    if n_pairs == 0 or squares == 0.0:
        return 0.0
    return (products / n_pairs) / (squares / n_pixels)
