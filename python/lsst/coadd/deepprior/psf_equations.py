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

_PRIOR_STEPS = 8
"""Steps in which the widths of the prior are learned."""


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
    present = [one for one in equations if one is not None]
    width = start.copy()
    held = start > 0.0
    known = np.ones(n, dtype=bool)
    unlearned = np.zeros_like(covariance)
    for number in range(_PRIOR_STEPS):
        precision = np.zeros(n)
        precision[held] = width[held] ** -2.0
        inverses = [np.linalg.inv(one.own + np.diag(precision + 1e-12)) for one in present]
        rights = [
            one.own_right - precision * before for one, before in zip(present, total[used], strict=True)
        ]
        schur = 1e-9 * np.eye(n)
        right = np.zeros(n)
        for one, inverse, own_right in zip(present, inverses, rights, strict=True):
            schur += one.common - one.cross.T @ inverse @ one.cross
            right += -one.common_right + one.cross.T @ inverse @ own_right
        schur += np.diag(1e-6 * np.maximum(sum(np.diagonal(one.common) for one in present), 1.0))
        schur_inverse = np.linalg.inv(schur)
        common = schur_inverse @ right
        for k, one, inverse, own_right in zip(used, present, inverses, rights, strict=True):
            step[k] = inverse @ (own_right + one.cross @ common)
            spread = inverse @ one.cross
            covariance[k] = inverse + spread @ schur_inverse @ spread.T
        if number == 0:
            unlearned[...] = covariance
        if not anchored:
            # What other light hardly tells is left as it is.
            error = np.median([np.sqrt(np.diagonal(inverse)) for inverse in inverses], axis=0)
            known &= (np.arange(n) <= BACKGROUND) | (error < _INFORMED * start)
        moved = total[used] + step[used]
        width = np.sqrt(np.mean(moved**2 + np.diagonal(covariance[used], axis1=1, axis2=2), axis=0))
        width = np.where(known, np.clip(width, NOTHING, np.maximum(start, NOTHING)), NOTHING)
    fixed = np.ones(n, dtype=bool)
    if anchored:
        fixed[BACKGROUND + 1 :] = False
    step[np.ix_(used, np.flatnonzero(fixed))] -= step[used][:, fixed].mean(axis=0)
    return step, covariance, unlearned
