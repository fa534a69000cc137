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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.spatial
import torch

from .baselines import inner_smooth, maximum_likelihood
from .observation import Observation
from .operators import CellLayout
from .point_sources import PointSources, point_latent, point_sources
from .psf import StarFit, fit_star, gaussian_stamp, shift_stamp, target_sigma
from .psf_basis import (
    BACKGROUND,
    FLUX,
    NOTHING,
    SHIFT_X,
    SHIFT_Y,
    PsfBasis,
    blind_stamps,
    corrected_stamps,
    reference_sigma,
    stamp_changes,
)
from .statistics import NothingToRestoreError, PatchData, VisitTensors

MIN_STARS = 5
"""Number of stars from which the common mode is fitted."""

MIN_SNR = 50.0
"""Their least signal-to-noise ratio in all visits together."""

_PSF_ERRORS = {False: (0.1, 0.05, 0.03, 0.02, 0.01, 0.01), True: (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)}
"""Relative error that is granted to PSFs in the passes, for given PSFs and for guesses."""

_REACH = 1.75
"""Radius in median FWHM around a star within which it tells the PSF."""

_NEIGHBOUR = 0.05
"""Brightest peak within the reach of a star, over that of the star, with which it counts as alone."""

_LOCUS = 0.02
"""Scatter of the shapes of stars that is taken for one, in relative second moments."""

_LOCUS_CHI2 = 11.3
"""Largest chi^2 of three degrees of freedom of a star; a point exceeds it once in a hundred times."""

_LIT = 5.0
"""Significance of the matched image from which other light tells how PSFs differ."""

_SKY_ERROR = 0.03
"""Relative error that is granted to all light but that of stars, of which the shape is not known."""

_HUBER = 3.0
"""Deviation in standard deviations from which a pixel counts linearly."""

_OUTLIER = 4.0
"""Significance of the residuals at the seeing from which pixels are left out, as are those around them."""

_INFORMED = 1.0 / 3.0
"""Largest error of a shape parameter, over the width of its prior, with which other light is trusted."""

_PRIOR_STEPS = 8
"""Steps in which the widths of the prior are learned."""

_OUTLIER_PSF_ERROR = 0.015
"""Least relative error that is granted to PSFs where outliers are told."""

_MASKED = 5.0
"""Predicted flux of a masked pixel, in standard deviations, around which the sky is not known well enough."""

_LARGEST_STEP = 0.5
"""Largest change of a shape parameter in one pass."""

_MEAN_PASSES = 2

_LARGE_CHANGE = 0.1
_UNCERTAIN = 0.01
"""Relative change and relative error of the FWHM from which a visit is flagged."""


@dataclasses.dataclass(frozen=True, eq=False)
class PsfRefinement:
    """Result of `refine_psfs`; the order of the visits is that of the observations.

    Parameters
    ----------
    stamps : `list` [`numpy.ndarray`, (cell_i, cell_j, k, k)]
        PSFs of the visits: non-negative, of unit sum, centred like those that were given.
    flux_scale : `numpy.ndarray`, (visit,)
        Flux of a visit over that of the mean visit; its mean is 1.
    shift : `numpy.ndarray`, (visit, 2)
        Shift (x, y) of a visit in pixels; its mean is 0.
    background : `numpy.ndarray`, (visit,)
        Background of a visit in nJy; its mean is 0.
    anchored : `bool`
        Whether stars have fixed what the PSFs have in common; if not, their mean correction is zero.
    stars : `numpy.ndarray`, (star, 2)
        Positions (y, x) of these stars in the array of the patch.
    n_candidates : `int`
        Number of points bright enough to be one of them.
    fwhm_error, ellipticity_error : `numpy.ndarray`, (visit,)
        Standard errors of the FWHM, relatively, and of a component of the ellipticity, from the noise and
        the learned prior; NaN without stars.
    before, after : `list` [`~lsst.coadd.deepprior.psf.StarFit`]
        Gaussians fitted to the PSFs in the middle one of the cells, as given and as refined.
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
    before: list[StarFit | None]
    after: list[StarFit | None]

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
            refined; ``large_change``: the FWHM has changed by more than a tenth; ``uncertain``: the error
            of the FWHM is above 1 %, or not known.
        """
        before, after = self.before[visit], self.after[visit]
        large = before is None or after is None or abs(after.sigma / before.sigma - 1.0) > _LARGE_CHANGE
        return {
            "not_anchored": not self.anchored,
            "large_change": bool(large),
            "uncertain": not bool(self.fwhm_error[visit] <= _UNCERTAIN),
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
        Raised if a visit does not fit the layout, or ``base_steps`` is not positive.
    """
    if base_steps < 1:
        raise ValueError(f"base_steps must be at least 1, not {base_steps}.")
    seeing = np.array([observation.seeing() for observation in observations])
    if not np.isfinite(seeing).any():
        raise NothingToRestoreError("No visit of the patch has a PSF in any cell.")
    given = [observation.psf for observation in observations]
    stamps = [blind_stamps(psf) for psf in given] if blind else given
    seeing = seeing[np.isfinite(seeing)]
    sigma = target_sigma(seeing)
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
        before,
        before,
    )
    errors = _PSF_ERRORS[blind]
    for number, psf_error in enumerate(errors):
        data = PatchData(
            CorrectedObservations(observations, result), layout, sigma, psf_error=psf_error, device=device
        )
        sky = _Sky(data, basis, base_steps)
        if result.anchored and not sky.anchored:
            # Stars that fail the stricter test of a later pass were good enough for the one before.
            break
        equations = [_visit_equations(sky, index) for index in range(n_visits)]
        step, covariance = _solve(equations, total, basis.prior(blind, sky.anchored), sky.anchored)
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
        fwhm_error, ellipticity_error = _errors(stamps, basis, covariance, used & sky.anchored)
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
            before,
            [_shape(psf) for psf in stamps],
        )
        if progress is not None:
            changes = [
                abs(a.sigma / b.sigma - 1.0) for a, b in zip(result.after, last, strict=True) if a and b
            ]
            progress("psf", number + 1, len(errors), max(changes))
    return result


def _with_mean_shape(
    stamps: list[np.ndarray],
    wanted: list[StarFit | None],
    basis: PsfBasis,
    total: np.ndarray,
    used: np.ndarray,
) -> list[np.ndarray]:
    """Give the PSFs of the visits the mean size and ellipticity that they had; ``total`` is kept up."""
    for _ in range(_MEAN_PASSES):
        shapes = [(a, b) for a, b in zip(map(_shape, stamps), wanted, strict=True) if a and b]
        change = np.mean(
            [(2.0 * math.log(a.sigma / b.sigma), a.e1 - b.e1, a.e2 - b.e2) for a, b in shapes], axis=0
        )
        parameters = np.zeros(basis.n_parameters)
        parameters[basis.moments] = -change
        total[used] += parameters
        stamps = [corrected_stamps(psf, basis, parameters[basis.shape]) for psf in stamps]
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


class _Sky:
    """The sky of a pass: stars that tell the PSF, and all other light."""

    def __init__(self, data: PatchData, basis: PsfBasis, base_steps: int) -> None:
        self.data = data
        self.basis = basis
        sets = data.sets()
        solution = maximum_likelihood(data, sets, steps=base_steps)
        points = point_sources(data, sets, solution.latent[0])
        seeing = float(np.median(data.seeing[data.group >= 0]))
        self.reach = _REACH * seeing
        self.width = 2 * round(0.5 * seeing) + 1
        self._fft_shape = tuple(scipy.fft.next_fast_len(n + 4 * round(seeing), real=True) for n in data.shape)
        self._transfer = torch.as_tensor(basis.transfer(self._fft_shape), device=data.device).to(
            torch.complex64
        )
        self.latent = points.latent
        candidates = self._candidates(points)
        self.n_candidates = len(candidates)
        self._separate(candidates)
        self.stars = candidates[self._on_locus(candidates)]
        self.anchored = len(self.stars) >= MIN_STARS
        if not self.anchored:
            self.stars = self.stars[:0]
        self._separate(self.stars)
        significant = solution.statistics.seen[0] > _LIT * data.matched_noise()
        self.lit = _grown(significant, self.width)

    def _candidates(self, points: PointSources) -> np.ndarray:
        """Return y, x and flux of the points that are bright and alone, (candidate, 3)."""
        data = self.data
        found = np.column_stack([points.y, points.x, points.flux])
        margin, (ny, nx) = data.margin, data.layout.shape
        power = data.gram_kernel()
        half = power.shape[-1] // 2
        # For a point the kernel of A holds the inner kernel too, so this is somewhat less than its S/N.
        information = data.pixel_weight(power[..., half, half].cpu().numpy())
        rows, columns = (np.rint(found[:, k]).astype(int) - margin for k in (0, 1))
        inside = (rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx)
        found, rows, columns = found[inside], rows[inside], columns[inside]
        found = found[found[:, 2] * np.sqrt(information[rows, columns]) > MIN_SNR]
        if len(found) == 0:
            return found
        rest = self.latent - self._drawn(np.column_stack([points.y, points.x, points.flux]))
        image = inner_smooth(rest, data.sigma).cpu().numpy()
        peaks = np.argwhere((image == scipy.ndimage.maximum_filter(image, 5)) & (image > 0.0))
        all_points = np.column_stack([points.y, points.x])
        height = float(gaussian_stamp(data.sigma).max())
        alone = np.ones(len(found), dtype=bool)
        near = scipy.spatial.cKDTree(found[:, :2])
        for peak, value in zip(peaks, image[tuple(peaks.T)], strict=True):
            for k in near.query_ball_point(peak, self.reach):
                alone[k] &= value < _NEIGHBOUR * height * found[k, 2]
        for point, flux in zip(all_points, points.flux, strict=True):
            for k in near.query_ball_point(point, self.reach):
                alone[k] &= flux <= found[k, 2]
        return found[alone]

    def _drawn(self, stars: np.ndarray) -> torch.Tensor:
        """Return the latent image of stars (star, 3: y, x, flux)."""
        data = self.data
        canvas = np.zeros(data.shape)
        for y, x, flux in stars:
            iy, ix = round(y), round(x)
            stamp = point_latent(data.sigma, y - iy, x - ix)
            y0, x0 = iy - stamp.shape[0] // 2, ix - stamp.shape[0] // 2
            canvas[y0 : y0 + stamp.shape[0], x0 : x0 + stamp.shape[0]] += flux * stamp
        return torch.as_tensor(canvas, dtype=data.dtype, device=data.device)

    def _separate(self, stars: np.ndarray) -> None:
        """Divide the latent image into stars and other light, of which there is none near a star."""
        self.star_light = self._drawn(stars)
        y, x = np.indices(self.data.shape)
        owner = np.full(self.data.shape, -1)
        if len(stars):
            distance, nearest = scipy.spatial.cKDTree(stars[:, :2]).query(np.dstack([y, x]))
            owner[distance <= self.reach] = nearest[distance <= self.reach]
        self.owner = torch.as_tensor(owner, device=self.data.device)
        rest = (self.latent - self.star_light).clamp_min(0.0)
        self.other_light = torch.where(self.owner < 0, rest, 0.0)

    def templates(self, prediction: torch.Tensor, parameters: Sequence[int] | slice) -> torch.Tensor:
        """Return what parameters without background change in a prediction, (parameter, y, x)."""
        spectrum = torch.fft.rfft2(prediction, s=self._fft_shape)
        images = torch.fft.irfft2(spectrum * self._transfer[parameters], s=self._fft_shape)
        return images[..., : prediction.shape[0], : prediction.shape[1]]

    def residual(
        self, visit: VisitTensors, star: torch.Tensor, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residuals and robust weights of the pixels of a visit, 1/nJy^2.

        Pixels without weight are those that are not good, those of trails and of other things that the sky
        does not have, and those around a masked core.
        """
        good = visit.weight > 0
        prediction = star + other
        residual = torch.where(good, visit.flux - prediction, 0.0)
        scale = torch.hypot(self.data.scale(visit, star), _SKY_ERROR * other)
        deviation = residual / scale
        weight = (_HUBER / deviation.abs().clamp_min(1e-30)).clamp_max(1.0) / scale.square()
        # An error of the PSF or a shift is the same in all pixels of a star, and is no outlier.
        noise = visit.variance.sqrt()
        smooth, light = self._smoothed(torch.stack([residual / noise, prediction.abs() / noise]))
        granted = max(self.data.psf_error, _OUTLIER_PSF_ERROR) * light
        outlier = smooth.abs() > _OUTLIER * torch.hypot(torch.ones_like(granted), granted)
        lost = _grown(outlier | (~good & (prediction > _MASKED * scale)), self.width)
        return residual, torch.where(good & ~lost, weight, 0.0)

    def _smoothed(self, images: torch.Tensor) -> torch.Tensor:
        """Smooth images (..., y, x) with the reference PSF, so that white noise keeps its variance."""
        stamp = gaussian_stamp(self.basis.sigma)
        kernel = torch.as_tensor(stamp / math.sqrt(np.sum(stamp**2))).to(images)
        return torch.nn.functional.conv2d(images[:, None], kernel[None, None], padding=stamp.shape[0] // 2)[
            :, 0
        ]

    def _on_locus(self, stars: np.ndarray) -> np.ndarray:
        """Tell which candidates have the shape that most have, (candidate,) bool."""
        if len(stars) < MIN_STARS:
            return np.zeros(len(stars), dtype=bool)
        # Flux, position, size, ellipticity, and light that is under the star in all visits alike.
        n = 7
        matrix, right = np.zeros((len(stars), n, n)), np.zeros((len(stars), n))
        chosen = self.owner >= 0
        owner = self.owner[chosen].cpu().numpy()
        wanted = [FLUX, SHIFT_X, SHIFT_Y, 3, 4, 5]
        for _, visit in self.data.visits():
            light = visit.kernel.forward(self.star_light)
            residual, weight = self.residual(visit, light, visit.kernel.forward(self.other_light))
            images = torch.cat([self.templates(light, wanted), torch.ones_like(light)[None]])
            columns = images[:, chosen].cpu().numpy().astype(float)
            weights, values = (image[chosen].cpu().numpy().astype(float) for image in (weight, residual))
            for k in range(len(stars)):
                own = owner == k
                part = columns[:, own] * weights[own]
                matrix[k] += part @ columns[:, own].T
                right[k] += part @ values[own]
        covariance = np.array([np.linalg.pinv(m, hermitian=True) for m in matrix])
        moments = np.einsum("kij,kj->ki", covariance, right)[:, 3:6]
        errors = covariance[:, 3:6, 3:6] + _LOCUS**2 * np.eye(3)
        difference = moments[:, None] - moments
        near = _chi2(difference, errors[:, None] + errors) < _LOCUS_CHI2
        most = near.sum(axis=1)
        members = near[min(np.flatnonzero(most == most.max()), key=lambda k: moments[k, 0])]
        inverse = np.linalg.inv(errors[members])
        centre = np.linalg.solve(inverse.sum(axis=0), np.einsum("kij,kj->i", inverse, moments[members]))
        return _chi2(moments - centre, errors) < _LOCUS_CHI2


def _grown(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Return the pixels that have a chosen one in the box of some odd width around them, (y, x) bool."""
    grown = torch.nn.functional.max_pool2d(chosen.float()[None, None], width, stride=1, padding=width // 2)
    return grown[0, 0] > 0.0


def _chi2(values: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return ``v^T C^-1 v`` of vectors (..., n) with covariances (..., n, n)."""
    return np.einsum("...i,...i->...", values, np.linalg.solve(covariance, values[..., None])[..., 0])


class _Equations(NamedTuple):
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


def _visit_equations(sky: _Sky, index: int) -> _Equations | None:
    """Make the equations of a visit, `None` if it has no good pixel."""
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
    return _Equations(*arrays)


def _solve(
    equations: Sequence[_Equations | None], total: np.ndarray, start: np.ndarray, anchored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Solve the equations of all visits, and learn the prior.

    Parameters
    ----------
    equations : `~collections.abc.Sequence` [`_Equations` or `None`]
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
    """
    n = len(start)
    used = [k for k, one in enumerate(equations) if one is not None]
    step, covariance = np.zeros((len(equations), n)), np.zeros((len(equations), n, n))
    present = [one for one in equations if one is not None]
    width = start.copy()
    held = start > 0.0
    known = np.ones(n, dtype=bool)
    for _ in range(_PRIOR_STEPS):
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
    return step, covariance


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
