# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Least squares for the corrections of all visits, which share a sky and a prior that is learned."""

from __future__ import annotations

__all__ = ("VisitEquations", "solve_equations", "visit_equations")

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .psf_basis import BACKGROUND, NOTHING
from .psf_sky import RefinementSky

_INFORMED = 1.0 / 3.0
"""Largest error of a shape parameter, over the width of its prior, with which other light is trusted."""

_PRIOR_STEPS = 100
"""Steps of expectation maximisation in which the widths of the prior are learned: where PSFs are right they
go to zero, but slowly."""


class VisitEquations(NamedTuple):
    """Normal equations of a visit in its own parameters X and the common ones R."""

    own: np.ndarray
    """X^T w X, (parameter, parameter)."""
    cross: np.ndarray
    """X^T w R."""
    common: np.ndarray
    """R^T w R."""
    own_right: np.ndarray
    """X^T w r, (parameter,)."""
    common_right: np.ndarray
    """R^T w r."""


def visit_equations(sky: RefinementSky, index: int) -> VisitEquations | None:
    """Make the equations of a visit.

    Parameters
    ----------
    sky : `~lsst.coadd.deepprior.psf_sky.RefinementSky`
        The sky, and the data.
    index : `int`
        Index of the visit.

    Returns
    -------
    equations : `VisitEquations` or `None`
        The equations; `None` if the visit has no good pixel.
    """
    data = sky.data
    if data.group[index] < 0:
        return None
    visit = data.visit(index)
    star, other = (visit.kernel.forward(light) for light in (sky.star_light, sky.other_light))
    residual, weight = sky.residual(visit, star, other)
    # Far from a star its light counts as other light, whose sky may follow any PSF.
    near = sky.owner >= 0
    chosen = (near | sky.lit) & (weight > 0)
    dark = (weight > 0) & ~chosen
    whole, outside = (
        sky.templates(light, slice(None))[:, chosen]
        for light in (star + other, other + torch.where(near, 0.0, star))
    )
    ones, zeros = torch.ones_like(whole[:1]), torch.zeros_like(whole[:1])

    def design(modes: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        return torch.cat([modes[:3], background, modes[3:]]).double()

    own, common = design(whole, ones), design(outside, zeros)
    weights, values = weight[chosen].double(), residual[chosen].double()
    weighted = own * weights
    result = [
        (weighted @ own.T),
        (weighted @ common.T),
        ((common * weights) @ common.T),
        (weighted @ values),
        ((common * weights) @ values),
    ]
    arrays = [part.cpu().numpy() for part in result]
    arrays[0][BACKGROUND, BACKGROUND] += float(weight[dark].sum())
    arrays[3][BACKGROUND] += float((weight * residual)[dark].sum())
    return VisitEquations(*arrays)


def solve_equations(
    equations: Sequence[VisitEquations | None], total: np.ndarray, start: np.ndarray, anchored: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve the equations of all visits, and learn the prior.

    Parameters
    ----------
    equations : `~collections.abc.Sequence` [`VisitEquations` or `None`]
        Equations of the visits.
    total : `numpy.ndarray`, (visit, parameter)
        Corrections that were made before, which count for the prior.
    start : `numpy.ndarray`, (parameter,)
        Widths of the prior to start with, 0 for a parameter without one.
    anchored : `bool`
        Whether the mean of the PSF's parameters is left free.

    Returns
    -------
    step : `numpy.ndarray`, (visit, parameter)
        Corrections, of zero mean in all but the PSF, and there too without stars.
    covariance : `numpy.ndarray`, (visit, parameter, parameter)
        Their covariance.
    unlearned : `numpy.ndarray`, (visit, parameter, parameter)
        What it is with the prior of the start: how well a visit itself tells them.
    """
    n = len(start)
    used = [k for k, one in enumerate(equations) if one is not None]
    step, covariance = np.zeros((len(equations), n)), np.zeros((len(equations), n, n))
    own, cross, shared, own_right, common_right = (
        np.array(arrays) for arrays in zip(*(one for one in equations if one is not None), strict=True)
    )
    # Other light alone hardly tells some common corrections.
    weak = 1e-9 * np.eye(n) + 1e-6 * np.diag(np.maximum(np.diagonal(shared.sum(axis=0)), 1.0))
    width = start.copy()
    held = start > 0.0
    known = np.ones(n, dtype=bool)
    for number in range(_PRIOR_STEPS):
        precision = np.zeros(n)
        precision[held] = width[held] ** -2.0
        inverse = np.linalg.inv(own + np.diag(precision + 1e-12))
        right = own_right - precision * total[used]
        spread = inverse @ cross
        schur = np.linalg.inv(weak + (shared - cross.mT @ spread).sum(axis=0))
        common = schur @ (np.einsum("kij,ki->j", spread, right) - common_right.sum(axis=0))
        step[used] = np.einsum("kij,kj->ki", inverse, right + cross @ common)
        covariance[used] = inverse + spread @ schur @ spread.mT
        if number == 0:
            unlearned = covariance.copy()
        if not anchored:
            # What other light hardly tells is left as it is.
            error = np.median(np.sqrt(np.diagonal(inverse, axis1=1, axis2=2)), axis=0)
            known &= (np.arange(n) <= BACKGROUND) | (error < _INFORMED * start)
        moved = total[used] + step[used]
        width = np.sqrt(np.mean(moved**2 + np.diagonal(covariance[used], axis1=1, axis2=2), axis=0))
        width = np.where(known, np.clip(width, NOTHING, np.maximum(start, NOTHING)), NOTHING)
    fixed = np.ones(n, dtype=bool)
    if anchored:
        fixed[BACKGROUND + 1 :] = False
    step[np.ix_(used, np.flatnonzero(fixed))] -= step[used][:, fixed].mean(axis=0)
    return step, covariance, unlearned
