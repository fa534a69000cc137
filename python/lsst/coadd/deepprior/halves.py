# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Two visits with independent noise out of one, so that a single visit can be split.

Noise of known variance is divided by adding more of it (data fission: Leiner, Duan, Wasserman & Ramdas 2023,
JASA, arXiv:2112.11079; used for denoisers by Pang, Zheng, Quan & Ji 2021, CVPR):

.. math:: y_\pm = y \pm n', \qquad \mathrm{cov}(y_+, y_-) = \mathrm{cov}(n) - \mathrm{cov}(n') = 0,

where n' is drawn with the variance and correlation of the noise n of the visit. Each has twice its variance,
and their mean is the visit itself.
"""

from __future__ import annotations

__all__ = ("NoiseHalves", "in_halves")

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from .noise_correlation import correlated_noise, visit_correlations
from .observation import Observation
from .patch_data import PatchData


class NoiseHalves(Sequence[Observation]):
    """Visits as two visits each, of half the depth, that share no noise: 2 t and 2 t + 1 are those of t.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits; indexed one at a time.
    correlations : `numpy.ndarray`, (visit, k, k)
        Correlation of the noise of each visit (see
        `~lsst.coadd.deepprior.noise_correlation.visit_correlations`).
    seed : `int`
        Seed of the noise that is added; a visit gets the same whenever it is read.

    Raises
    ------
    ValueError
        Raised if the numbers of visits and of correlations differ.
    """

    def __init__(self, observations: Sequence[Observation], correlations: np.ndarray, seed: int) -> None:
        if len(observations) != len(correlations):
            raise ValueError(
                f"{len(observations)} visits need as many correlations of their noise, not "
                f"{len(correlations)}."
            )
        self._observations = observations
        self._correlations = correlations
        self._seed = seed

    def __len__(self) -> int:
        return 2 * len(self._observations)

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} halves of visits, none is number {index}.")
        visit, half = divmod(index, 2)
        whole = self._observations[visit]
        rng = np.random.default_rng([self._seed, visit])
        added = correlated_noise(whole.flux.shape, self._correlations[visit], rng)
        added *= np.sqrt(np.where(whole.good, whole.variance, 0.0), dtype=np.float32)
        return dataclasses.replace(
            whole,
            flux=whole.flux - added if half else whole.flux + added,
            variance=2.0 * whole.variance,
            name=f"{whole.name}, {'second' if half else 'first'} half of the noise",
        )


def in_halves(data: PatchData, latent: torch.Tensor, seed: int) -> PatchData:
    """Return a patch with two visits in place of each, which share no noise.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The patch.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy, behind which the noise of the visits is measured.
    seed : `int`
        Seed of the noise that is added.

    Returns
    -------
    halves : `~lsst.coadd.deepprior.patch_data.PatchData`
        The patch with the same canvas and target PSF.
    """
    return data.anew(NoiseHalves(data.observations, visit_correlations(data, latent), seed))
