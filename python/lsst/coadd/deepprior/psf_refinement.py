# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Learning the PSFs of the visits from the visits themselves, before the restoration.

Two steps take turns. With the PSFs as they are, maximum likelihood and the fit of points give the sky. With
the sky as it is, small corrections of every visit, of its PSF, flux scale, shift and background, are fitted
to its own pixels by robust least squares (see `~lsst.coadd.deepprior.psf_basis`).

What the sky looks like depends on the PSFs, though: a correction that all visits share can be undone by
another sky. So stars tell the corrections :math:`a_t`, since their shape is known, but all other light
only how those of the visits differ from a common c, which is fitted too. With S and R what a parameter
changes in the prediction of stars and of other light, the residuals are

.. math:: y_t - p_t \approx (S_t + R_t)\, a_t - R_t\, c.

A prior of zero mean holds the corrections small, with a width that is learned from the visits for each
parameter: where the PSFs are right it goes to zero, and so do the corrections.
"""

from __future__ import annotations

__all__ = ("CorrectedObservations", "PsfRefinement", "refine_psfs", "summary")

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .observation import Observation
from .operators import CellLayout
from .patch_data import NothingToRestoreError, PatchData
from .psf import StarFit, fit_star, shift_stamp, target_sigma
from .psf_basis import (
    BACKGROUND,
    FLUX,
    SHIFT_X,
    SHIFT_Y,
    PsfBasis,
    blind_stamps,
    corrected_stamps,
    reference_sigma,
    stamp_changes,
)
from .psf_equations import solve_equations, visit_equations
from .psf_sky import RefinementSky

_PSF_ERRORS = {False: (0.1, 0.05, 0.03, 0.02, 0.01, 0.01), True: (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)}
"""Relative error that is granted to PSFs in the passes, for given PSFs and for guesses."""

_LARGEST_STEP = 0.5
"""Largest change of a shape parameter in one pass."""

_MEAN_PASSES = 2

_LARGE_CHANGE = 0.1
"""Relative change of the FWHM above which a visit is flagged."""

_UNCERTAIN = 0.01
"""Relative error of the FWHM above which a visit is flagged, with the widths of the prior of the start: that
the PSFs of the others were right says little of one without stars."""


@dataclasses.dataclass(frozen=True, eq=False)
class PsfRefinement:
    """Result of `refine_psfs`; the order of the visits is that of the observations.

    Parameters
    ----------
    stamps : `list` [`numpy.ndarray`, (cell_i, cell_j, k, k)]
        PSFs of the visits: of unit sum, centred like those that were given, and nowhere more negative.
    flux_scale : `numpy.ndarray`, (visit,)
        Flux of a visit over that of the mean visit; its mean is 1.
    shift : `numpy.ndarray`, (visit, 2)
        Shift (x, y) of a visit in pixels; its mean is 0.
    background : `numpy.ndarray`, (visit,)
        Background of a visit in nJy; its mean is 0.
    anchored : `bool`
        Whether stars have fixed what the PSFs have in common; if not, their mean correction is zero.
    stars : `numpy.ndarray`, (star, 2)
        Positions (y, x) of these stars in the array of the patch; none where they are too few to fix it.
    n_candidates : `int`
        Number of points that are bright enough and alone, be they stars of one shape or not.
    fwhm_error, ellipticity_error : `numpy.ndarray`, (visit,)
        Standard errors of the FWHM, relatively, and of a component of the ellipticity, from the noise and
        the prior that was learned from all visits; NaN without stars.
    own_fwhm_error : `numpy.ndarray`, (visit,)
        That of the FWHM with the prior of the start, not with what the others tell of it; NaN without stars.
    before, after : `list` [`~lsst.coadd.deepprior.psf.StarFit`]
        Gaussians fitted to the PSFs in the middle one of the cells, as given and as refined.
    seconds : `float`
        Time that it took.
    """

    stamps: list[np.ndarray]
    flux_scale: np.ndarray
    shift: np.ndarray
    background: np.ndarray
    anchored: bool
    stars: np.ndarray
    n_candidates: int
    fwhm_error: np.ndarray
    ellipticity_error: np.ndarray
    own_fwhm_error: np.ndarray
    before: list[StarFit | None]
    after: list[StarFit | None]
    seconds: float = 0.0

    def flags(self, visit: int) -> dict[str, bool]:
        """Return the quality flags of the PSF of a visit.

        Parameters
        ----------
        visit : `int`
            Index of the visit.

        Returns
        -------
        flags : `dict` [`str`, `bool`]
            ``not_anchored``: no stars have fixed what the PSFs have in common, only their differences are
            refined; ``large_change``: the FWHM has changed by more than a tenth; ``uncertain``: the visit
            itself tells the FWHM no better than to 1 %.
        """
        before, after = self.before[visit], self.after[visit]
        large = before is None or after is None or abs(after.sigma / before.sigma - 1.0) > _LARGE_CHANGE
        return {
            "not_anchored": not self.anchored,
            "large_change": bool(large),
            "uncertain": not bool(self.own_fwhm_error[visit] <= _UNCERTAIN),
        }


class CorrectedObservations(Sequence[Observation]):
    """Observations with refined PSFs, of one flux scale, and without shift and background.

    The shift is undone in the PSF, which loses its centre: pixels are not resampled.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits as they are.
    refinement : `PsfRefinement`
        What was learned of them.
    """

    def __init__(self, observations: Sequence[Observation], refinement: PsfRefinement) -> None:
        if len(observations) != len(refinement.stamps):
            raise ValueError(
                f"The PSFs of {len(refinement.stamps)} visits are not those of {len(observations)}."
            )
        self._observations = observations
        self._refinement = refinement
        self._stamps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        refinement, observation = self._refinement, self._observations[index]
        if index not in self._stamps:
            self._stamps[index] = _shifted(refinement.stamps[index], *refinement.shift[index])
        return _corrected(
            observation, self._stamps[index], refinement.flux_scale[index], refinement.background[index]
        )


def _shifted(stamps: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """Shift the stamps of all cells, (cell_i, cell_j, k, k)."""
    if dx == 0.0 and dy == 0.0:
        return stamps
    result = np.full(stamps.shape, np.nan)
    for cell in np.argwhere(np.isfinite(stamps).all(axis=(2, 3))):
        shifted = shift_stamp(stamps[tuple(cell)], dx, dy)
        result[tuple(cell)] = shifted / shifted.sum()
    return result


def _corrected(observation: Observation, psf: np.ndarray, scale: float, background: float) -> Observation:
    """Return an observation with another PSF, flux scale and background."""
    if scale == 1.0 and background == 0.0:
        return dataclasses.replace(observation, psf=psf)
    return dataclasses.replace(
        observation,
        flux=((observation.flux - background) / scale).astype(observation.flux.dtype),
        variance=(observation.variance / scale**2).astype(observation.variance.dtype),
        noise=None if observation.noise is None else (observation.noise / scale).astype(np.float32),
        psf=psf,
    )


def refine_psfs(
    observations: Sequence[Observation],
    layout: CellLayout,
    *,
    blind: bool = False,
    base_steps: int = 100,
    target_fwhm: float | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int, float], None] | None = None,
) -> PsfRefinement:
    """Learn PSFs, flux scales, shifts and backgrounds of the visits of a patch.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    blind : `bool`, optional
        Take no more from the PSFs of the visits than their FWHM, as a guess of the seeing.
    base_steps : `int`, optional
        Steps of maximum likelihood in each pass.
    target_fwhm : `float`, optional
        FWHM in pixels of the PSF of the sky in between, that of the restoration; by default what
        `~lsst.coadd.deepprior.psf.target_sigma` chooses.
    device : `torch.device` or `str`, optional
        Where to compute.
    progress : `~collections.abc.Callable`, optional
        Called with ``"psf"``, the pass, the number of passes and the largest relative change of a FWHM.

    Returns
    -------
    refinement : `PsfRefinement`
        What was learned.

    Raises
    ------
    NothingToRestoreError
        Raised if no visit has a good pixel in a cell with a PSF.
    ValueError
        Raised if a visit does not fit the layout or is on finer pixels than its own, if ``base_steps`` is not
        positive, or by `~lsst.coadd.deepprior.psf.target_sigma`.
    """
    if base_steps < 1:
        raise ValueError(f"base_steps must be at least 1, not {base_steps}.")
    begin = time.monotonic()
    found, given = [], []
    for observation in observations:
        if observation.sampling != 1:
            raise ValueError(
                f"PSFs are learned on the pixels of the warps, but {observation.name} is on finer ones; "
                "learn them before visits are brought to these."
            )
        found.append(observation.seeing())
        given.append(observation.psf)
    seeing = np.array(found)
    if not np.isfinite(seeing).any():
        raise NothingToRestoreError("No visit of the patch has a PSF in any cell.")
    stamps = [blind_stamps(psf) for psf in given] if blind else given
    seeing = seeing[np.isfinite(seeing)]
    sigma = target_sigma(seeing, target_fwhm)
    basis = PsfBasis(reference_sigma(seeing))
    n_visits = len(observations)
    nothing = np.full(n_visits, np.nan)
    total = np.zeros((n_visits, basis.n_parameters))
    before = [_shape(psf) for psf in given]
    started = [_shape(psf) for psf in stamps]
    result = PsfRefinement(
        stamps,
        np.ones(n_visits),
        np.zeros((n_visits, 2)),
        np.zeros(n_visits),
        False,
        np.zeros((0, 2)),
        0,
        nothing,
        nothing,
        nothing,
        before,
        before,
    )
    errors = _PSF_ERRORS[blind]
    for number, psf_error in enumerate(errors):
        data = PatchData(
            CorrectedObservations(observations, result), layout, sigma, psf_error=psf_error, device=device
        )
        sky = RefinementSky(data, basis, base_steps)
        if result.anchored and not sky.anchored:
            # Stars that fail the stricter test of a later pass were good enough for the one before.
            break
        equations = [visit_equations(sky, index) for index in range(n_visits)]
        prior = basis.prior(blind, sky.anchored)
        step, covariance, unlearned = solve_equations(equations, total, prior, sky.anchored)
        shape = np.clip(step[:, basis.shape.start :], -_LARGEST_STEP, _LARGEST_STEP)
        step[:, basis.shape.start :] = shape
        total += step
        stamps = [
            corrected_stamps(psf, basis, parameters[basis.shape])
            for psf, parameters in zip(result.stamps, step, strict=True)
        ]
        scale = result.flux_scale * (1.0 + step[:, FLUX])
        background = result.background + result.flux_scale * step[:, BACKGROUND]
        used, last = data.group >= 0, result.after
        if not sky.anchored:
            stamps = _with_mean_shape(stamps, started, basis, total, used)
        known = used & sky.anchored
        fwhm_error, ellipticity_error = _errors(stamps, basis, covariance, known)
        own_fwhm_error, _ = _errors(stamps, basis, unlearned, known)
        result = PsfRefinement(
            stamps,
            scale / scale[used].mean(),
            _centred(result.shift + step[:, SHIFT_X : SHIFT_Y + 1], used),
            _centred(background, used),
            sky.anchored,
            sky.stars[:, :2] - data.margin,
            sky.n_candidates,
            fwhm_error,
            ellipticity_error,
            own_fwhm_error,
            before,
            [_shape(psf) for psf in stamps],
        )
        if progress is not None:
            changes = [
                abs(a.sigma / b.sigma - 1.0) for a, b in zip(result.after, last, strict=True) if a and b
            ]
            progress("psf", number + 1, len(errors), max(changes))
    return dataclasses.replace(result, seconds=time.monotonic() - begin)


def _with_mean_shape(
    stamps: list[np.ndarray],
    wanted: list[StarFit | None],
    basis: PsfBasis,
    total: np.ndarray,
    used: np.ndarray,
) -> list[np.ndarray]:
    """Give the PSFs of the visits that are used the mean size and ellipticity that they had; ``total`` is
    kept up.
    """
    for _ in range(_MEAN_PASSES):
        pairs = zip(map(_shape, stamps), wanted, used, strict=True)
        shapes = [(a, b) for a, b, own in pairs if a and b and own]
        change = np.mean(
            [(2.0 * math.log(a.sigma / b.sigma), a.e1 - b.e1, a.e2 - b.e2) for a, b in shapes], axis=0
        )
        parameters = np.zeros(basis.n_parameters)
        parameters[basis.moments] = -change
        total[used] += parameters
        stamps = [
            corrected_stamps(psf, basis, parameters[basis.shape]) if own else psf
            for psf, own in zip(stamps, used, strict=True)
        ]
    return stamps


def _centred(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Take the mean over the visits from values of visits, but for those that are not used."""
    return np.where(used.reshape(-1, *(1,) * (values.ndim - 1)), values - values[used].mean(axis=0), 0.0)


def _middle(psf: np.ndarray) -> np.ndarray | None:
    """Return the stamp in the middle one of the cells that have one."""
    cells = np.argwhere(np.isfinite(psf).all(axis=(2, 3)))
    return psf[tuple(cells[len(cells) // 2])] if len(cells) else None


def _shape(psf: np.ndarray) -> StarFit | None:
    """Fit a Gaussian to the stamp in the middle one of the cells."""
    stamp = _middle(psf)
    return None if stamp is None else _stamp_shape(stamp)


def _stamp_shape(stamp: np.ndarray) -> StarFit:
    rough = math.sqrt(stamp.sum() / (2.0 * math.pi * stamp.max()))
    return fit_star(stamp, radius=min(stamp.shape[0] // 2, max(3, math.ceil(2.5 * rough))))


def _errors(
    stamps: list[np.ndarray], basis: PsfBasis, covariance: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors of FWHM and ellipticity of the visits, from the covariance of their parameters."""
    fwhm_error, ellipticity_error = (np.full(len(stamps), np.nan) for _ in range(2))
    epsilon = 1e-2
    for index in np.flatnonzero(known):
        stamp = _middle(stamps[index])
        if stamp is None:
            continue
        middle = _stamp_shape(stamp)
        slopes = []
        for change in stamp_changes(stamp, basis):
            changed = _stamp_shape(stamp + epsilon * change)
            slopes.append(
                [math.log(changed.sigma / middle.sigma), changed.e1 - middle.e1, changed.e2 - middle.e2]
            )
        jacobian = np.array(slopes) / epsilon
        variance = np.diagonal(jacobian.T @ covariance[index][basis.shape, basis.shape] @ jacobian)
        fwhm_error[index] = math.sqrt(variance[0])
        ellipticity_error[index] = math.sqrt(0.5 * (variance[1] + variance[2]))
    return fwhm_error, ellipticity_error


def summary(refinement: PsfRefinement, names: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of a refinement, as plain Python values.

    Parameters
    ----------
    refinement : `PsfRefinement`
        What was learned.
    names : `~collections.abc.Sequence` [`str`]
        Names of the visits.

    Returns
    -------
    numbers : `dict`
        ``anchored``, ``n_stars``, ``n_candidates`` and ``visits``, by name: shape before and after, flux
        scale, shift, background, errors and flags.
    """
    visits = {}
    for index, name in enumerate(names):
        before, after = refinement.before[index], refinement.after[index]
        numbers: dict[str, Any] = {
            "flux_scale": float(refinement.flux_scale[index]),
            "shift_x_pixels": float(refinement.shift[index, 0]),
            "shift_y_pixels": float(refinement.shift[index, 1]),
            "background_nJy": float(refinement.background[index]),
            "fwhm_relative_error": _or_none(refinement.fwhm_error[index]),
            "ellipticity_error": _or_none(refinement.ellipticity_error[index]),
            "own_fwhm_relative_error": _or_none(refinement.own_fwhm_error[index]),
            "flags": refinement.flags(index),
        }
        if before is not None and after is not None:
            numbers |= {
                "size_change": float(after.sigma / before.sigma - 1.0),
                "e1": float(after.e1),
                "e2": float(after.e2),
                "e1_given": float(before.e1),
                "e2_given": float(before.e2),
            }
        visits[name] = numbers
    return {
        "anchored": refinement.anchored,
        "n_stars": len(refinement.stars),
        "n_candidates": refinement.n_candidates,
        "visits": visits,
    }


def _or_none(value: float) -> float | None:
    """Return a number, or `None` for NaN, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
