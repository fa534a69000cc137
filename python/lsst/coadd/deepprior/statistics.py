# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Sufficient statistics of sets of visits: robust matched images and Gram kernels.

The data term of a set of visits is the robust sum

.. math:: L(u) = \sum_t \sum_p m_t w_t s_t^2\, \rho_\delta\!\left(\frac{y_t - K_t u}{s_t}\right),

with Huber's function of threshold delta, one weight w a visit and cell (the inverse sky variance), the mask m
and the scale :math:`s_t^2 = v_t + (\epsilon K_t u_0)^2`: the variance of the pixel and an error of the PSF.
One weight a cell, and not one a pixel, keeps bright star cores as well conditioned as the sky, while the
threshold of the clipping follows the noise of every pixel. At a model :math:`u_0` it is majorised by a
quadratic that needs the visits no more (Huber & Ronchetti 2009, Robust Statistics, section 7.8):

.. math:: Q(u) = \tfrac12 u^T A u - u^T M, \quad A = \sum_t K_t^T w_t K_t, \quad
          M = A u_0 + \sum_t K_t^T m_t w_t\, \mathrm{clip}(y_t - K_t u_0, \pm\delta s_t).

Visits are dealt into a fixed number of groups and sets are made of groups, so neither the memory nor the
cost of a step of a fit depends on the number of visits; a visit is read once for all sets that it belongs to,
and dropped (`~lsst.coadd.deepprior.patch_data`).
"""

from __future__ import annotations

__all__ = (
    "SetStatistics",
    "StatisticsSums",
    "VisitSets",
    "VisitTensors",
    "set_products",
)

import dataclasses
import functools

import torch

from .operators import CellConvolution
from .parallel import by_rows
from .shared_spectra import AdjointSum

_MIN_COVERAGE = 1e-3
"""Part of the prediction that must have data for a pixel to be changed."""

_MAX_GAIN = 4.0 / 3.0
"""Gain of A up to which multiplicative steps with extrapolation are stable. On a constant image a step takes
the part (1 - gain) of a wave over to the next; the limit is 2 without extrapolation."""

MAX_COVERAGE = 2.0
"""Largest coverage; a bound of 1 would shift the solution where A predicts less than the visits do."""


@dataclasses.dataclass(frozen=True)
class VisitTensors:
    """One visit on the canvas: pixels, weights and the operator that predicts it."""

    flux: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    """Weight of the cell where the pixel is good, else 0 (1/nJy^2)."""
    kernel: CellConvolution


@dataclasses.dataclass(frozen=True)
class VisitSets:
    """Sets of groups of visits, and what depends on their masks, weights and PSFs but not on their pixels.

    Parameters
    ----------
    members : `torch.Tensor`, (set, group), bool
        Which groups of visits belong to which set.
    gram : `~lsst.coadd.deepprior.operators.CellConvolution`
        The operator A of every set.
    sensitivity : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t``: the inverse variance with which the set sees a pixel of the canvas (1/nJy^2).
    depth : `torch.Tensor`, (set, y, x)
        ``sum_t w_t m_t`` of the pixel itself (1/nJy^2).
    n_pixels : `torch.Tensor`, (set,)
        Number of good pixels of all visits of the set.
    """

    members: torch.Tensor
    gram: CellConvolution
    sensitivity: torch.Tensor
    depth: torch.Tensor
    n_pixels: torch.Tensor

    def __len__(self) -> int:
        return len(self.members)

    @functools.cached_property
    def damping(self) -> torch.Tensor | None:
        """Power of the ratios of multiplicative steps that keeps them stable where PSFs are sharper than the
        target; `None` where all are 1 (`torch.Tensor`, (set, 1, 1)).
        """
        gain = self.gram.gain[:, None, None]
        return torch.where(gain > _MAX_GAIN, 1.0 / gain, 1.0) if bool((gain > _MAX_GAIN).any()) else None

    def __getitem__(self, some: slice) -> VisitSets:
        """Select sets."""
        return VisitSets(*(getattr(self, field.name)[some] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class SetStatistics:
    """What the numerics keep of the data of several sets; the leading dimension of all images is the set.

    Parameters
    ----------
    sets : `VisitSets`
        The sets.
    matched : `torch.Tensor`, (set, y, x)
        The image M on the canvas, in 1/nJy.
    seen : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t y^_t`` with y^ the clipped data: M without what stands in for masked pixels, in
        1/nJy.
    coverage : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t K_t u_0`` over ``A u_0``: the part of the prediction of A that has data, 0 to 1,
        and a little more where A predicts too little because PSFs or weights change at the border of a cell.
    coadd : `torch.Tensor`, (set, y, x)
        Weighted mean of the clipped visits, 0 where no visit is good (nJy); interpolated on a finer grid.
    objective : `torch.Tensor`, (set,)
        Robust objective L at the model of the linearisation, divided by the number of good pixels.
    """

    sets: VisitSets
    matched: torch.Tensor
    seen: torch.Tensor
    coverage: torch.Tensor
    coadd: torch.Tensor
    objective: torch.Tensor

    @functools.cached_property
    def uncovered(self) -> torch.Tensor:
        """Pixels of whose prediction too little has data to change them (`torch.Tensor`, bool)."""
        return self.coverage <= _MIN_COVERAGE


def set_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the scalar products of images (set, y, x) set by set, (set,), without a copy of them."""
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)])


def _weigh(
    prediction: torch.Tensor, clipped: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> None:
    """Weigh prediction and clipped residual; the residual becomes that of Huber's function."""
    residual.sub_(clipped, alpha=0.5)
    clipped *= weight
    prediction *= weight


def _add(total: torch.Tensor, chosen: torch.Tensor, values: torch.Tensor) -> None:
    """Add images to those of some sets."""
    if len(chosen) == len(total):
        by_rows(torch.Tensor.add_, total, values)
    else:
        total[chosen] += values


class StatisticsSums:
    """Sums over visits that `SetStatistics` are made of.

    Parameters
    ----------
    models : `torch.Tensor`, (set, y, x)
        Model of every set.
    with_coverage : `bool`
        Whether the coverage is computed.
    """

    def __init__(self, models: torch.Tensor, *, with_coverage: bool) -> None:
        self._gradient = AdjointSum(models)
        self._predicted = AdjointSum(models) if with_coverage else None
        self._weighted = torch.zeros_like(models)
        self._objective = models.new_zeros(len(models))

    def add(
        self,
        visit: VisitTensors,
        chosen: torch.Tensor,
        prediction: torch.Tensor,
        clipped: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        """Add a visit to some sets.

        Parameters
        ----------
        visit : `VisitTensors`
            The visit.
        chosen : `torch.Tensor`, (chosen,), int
            The sets.
        prediction, clipped, residual : `torch.Tensor`, (chosen, y, x)
            Model at the PSF of the visit, clipped residual and residual, in nJy; they are overwritten.
        """
        by_rows(_weigh, prediction, clipped, residual, visit.weight)
        self._objective[chosen] += set_products(residual, clipped)
        torch.add(prediction, clipped, out=residual)
        _add(self._weighted, chosen, residual)
        self._gradient.add(visit.kernel, chosen, clipped)
        if self._predicted is not None:
            self._predicted.add(visit.kernel, chosen, prediction)

    @property
    def predicted(self) -> torch.Tensor:
        """The adjoint of the prediction that has data, ``sum_t K_t^T w_t m_t K_t u_0`` (set, y, x)."""
        if self._predicted is None:
            raise RuntimeError("The coverage was not computed.")
        return self._predicted.total()

    def statistics(
        self, sets: VisitSets, models: torch.Tensor, coverage: torch.Tensor | None
    ) -> SetStatistics:
        """Return the statistics, after which nothing can be added.

        Parameters
        ----------
        sets : `VisitSets`
            The sets.
        models : `torch.Tensor`, (set, y, x)
            Their models.
        coverage : `torch.Tensor`, (set, y, x) or `None`
            The coverage, where it was not computed.
        """
        tiny = torch.finfo(models.dtype).tiny
        everywhere = sets.gram.forward(models)
        gradient = self._gradient.total()
        if coverage is None:
            predicted = self.predicted
            coverage = (predicted / everywhere.clamp_min(tiny)).clamp_(0.0, MAX_COVERAGE)
            seen = predicted.add_(gradient)
        else:
            seen = torch.addcmul(gradient, coverage, everywhere)
        return SetStatistics(
            sets=sets,
            matched=everywhere.add_(gradient),
            seen=seen,
            coverage=coverage,
            coadd=self._weighted.div_(sets.depth.clamp_min(tiny)).mul_(sets.depth > 0),
            objective=self._objective / sets.n_pixels.clamp_min(1.0),
        )
