# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Fluxes and positions of the sources of a patch: one fit of points and galaxies to the data."""

from __future__ import annotations

__all__ = ("SYSTEMATIC_FLOOR", "SourceFit", "fit_sources")

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.sparse

from .confusion import confusion_error, unseen_light
from .fitted_source import MAX_WIDTH, POSITION_STEP, Source
from .galaxy_profiles import GalaxyShape
from .joint_fit import JointFit, normal_equations, sky_responses
from .pairs import fit_pair
from .plain_coadd import Coadd
from .psf import FWHM_PER_SIGMA
from .stamps import Stamp, render, slope

SYSTEMATIC_FLOOR = 0.005
"""Relative error of fluxes from the flux scale and the PSF models, which no simulation of ours has: half of
what Rubin requires of the flux scale (LSST Science Requirements Document, LPM-17, 10 mmag)."""

_EXTENDED = 3.0
"""Significance of the width beyond that of the PSF from which a source is extended."""

_PSF_WIDTH_ERROR = 0.02
"""Relative error of the width of the PSF up to which a source is not called extended, however significant:
a star would get the wings of a galaxy."""

_SHAPE_SNR = 20.0
"""S/N from which the shape of an extended source is fitted, and not only its width."""

_WIDTH_SNR = 60.0
"""S/N below which the width of a source is fitted also where it is not significant: a galaxy that is taken
for a point loses light, twice its error at the limit of significance."""

_PASSES = 15
_SETTLED = 0.02
"""Passes of the fit end when no parameter moves by more than this part of its largest step."""

_SHARED = 0.01
"""Correlation of two sources from which one is fitted again when the other has changed."""

_STIFF = 1e8
"""Precision of a parameter that is held at its limit, in units of that from the data."""

_TINY = 1e-30

_FOOTPRINT = 0.02
"""Brightness, as part of the peak, down to which pixels tell whether the model of a galaxy fits."""

_MISFIT = 3.0
"""Standard deviations of a reduced chi-square above 1 from which a model does not fit."""


@dataclasses.dataclass(frozen=True, eq=False)
class SourceFit:
    """Result of `fit_sources`; arrays have the shape (source,), with pairs counted as two sources.

    Parameters
    ----------
    flux, error : `numpy.ndarray`
        Fluxes in nJy and their standard errors.
    shape_error : `numpy.ndarray`
        The part of the errors that comes from widths and shapes of the source and its neighbours: what is
        not known of them, and for galaxies whose model leaves more than noise (a galaxy need not be an
        ellipse) what scales the error by the root of the reduced chi-square (as Particle Data Group 2024,
        section 5.2.2).
    confusion_error : `numpy.ndarray`
        The part of the errors that comes from sources too faint to be found (see
        `~lsst.coadd.deepprior.confusion`).
    y, x, y_err, x_err : `numpy.ndarray`
        Positions in the array of the patch and their standard errors, in pixels.
    extended : `numpy.ndarray`, bool
        Whether the source is wider than the PSF.
    parent : `numpy.ndarray`, int
        Index of the position that was given; those of pairs occur twice.
    stamps : `list` [`~lsst.coadd.deepprior.stamps.Stamp`]
        The sources as they were fitted, of unit flux.
    states : `list`
        Their parameters, for a fit that goes on from this one.
    sky, sky_error : `float`
        Mean of what is no source, in nJy a pixel: sources too faint to be found, and what the sky subtraction
        left; and its standard error. The fluxes are above it.
    other_flux, other_error : `numpy.ndarray`, (other,)
        Fluxes of the sources without data under their PSF, in nJy, and their standard errors.
    """

    flux: np.ndarray
    error: np.ndarray
    shape_error: np.ndarray
    confusion_error: np.ndarray
    y: np.ndarray
    x: np.ndarray
    y_err: np.ndarray
    x_err: np.ndarray
    extended: np.ndarray
    parent: np.ndarray
    stamps: list[Stamp]
    states: list[Source]
    sky: float
    sky_error: float
    other_flux: np.ndarray
    other_error: np.ndarray


def fit_sources(
    y: np.ndarray,
    x: np.ndarray,
    others: Sequence[Stamp],
    coadd: Coadd,
    known: SourceFit | None = None,
    extent: np.ndarray | None = None,
) -> SourceFit:
    r"""Fit all sources of a patch together.

    The model of the data is :math:`\sum_k f_k T(y_k, x_k, s_k)`, and the templates T are

    - the PSF, for what is not wider than it and bright enough that one can tell,
    - the PSF convolved with a round Sérsic profile whose width and index are fitted, where the width or its
      absence is not certain and for all that is faint,
    - the PSF convolved with an elliptical Sérsic profile whose radius, axis ratio, angle and index are
      fitted, for what is wider and bright.

    Gauss-Newton steps take sources, their neighbours and their parameters at once; those that have settled
    are left alone while others move. A prior of the population of shapes decides what the data leave open.
    What two points fit better than one galaxy (`~lsst.coadd.deepprior.pairs.fit_pair`) becomes two sources,
    and what shares light with them is fitted once more. At the end all parameters are solved for together,
    so that the errors of fluxes hold what is not known of positions and shapes. Ellipticities at their
    limits, and radii and indices at their upper ones, stay there: a solution that went on in a straight line
    would be that of no profile. Their errors are as if they were free.

    Parameters
    ----------
    y, x : `numpy.ndarray`, (source,)
        Positions to start from, in the array of the patch.
    others : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.stamps.Stamp`]
        Sources without data under their PSF, as they are, of unit flux; only their fluxes are fitted.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Data and noise.
    known : `SourceFit`, optional
        Fit of the first of the positions. What shares light with none of the others goes on from there.
    extent : `numpy.ndarray`, (source,), optional
        Radii in pixels of the regions in which the sources are brighter than the noise, grown by a FWHM,
        which limit their sizes; without limit by default.

    Returns
    -------
    fit : `SourceFit`
        Fluxes, positions, and their errors.

    Raises
    ------
    ValueError
        Raised if there is not one x for each y.
    """
    if len(y) != len(x):
        raise ValueError(f"There are {len(y)} positions y and {len(x)} positions x; give one each.")
    extent = np.full(len(y), np.inf) if extent is None else extent
    sources = [Source(float(a), float(b), extent=float(c)) for a, b, c in zip(y, x, extent, strict=True)]
    if not sources:
        none, nothing = np.zeros(0), np.zeros(0, dtype=int)
        flux, errors, sky, sky_error = none, none, 0.0, 0.0
        if len(others):
            fit = JointFit.of(others, coadd)
            flux, sky, sky_error, response = _above_sky(fit, others, coadd)
            errors = np.hypot(fit.errors(), response * sky_error)
        return SourceFit(
            *(none,) * 8, nothing > 0, nothing, [], [], sky, sky_error, other_flux=flux, other_error=errors
        )
    points = [s.stamp(coadd) for s in sources]
    extended, flux = _classify(sources, points, others, coadd)
    parent, fresh = np.arange(len(sources)), np.ones(len(sources), dtype=bool)
    if known is not None:
        fresh = parent > known.parent.max(initial=-1)
        fresh |= _sharing(points, coadd) @ fresh
        old, new = ~fresh[known.parent], np.flatnonzero(fresh)
        parent = np.concatenate([known.parent[old], new])
        sources = [known.states[k] for k in np.flatnonzero(old)] + [sources[k] for k in new]
        extended = np.concatenate([known.extended[old], extended[new]])
        flux = np.concatenate([known.flux[old], flux[new]])
        fresh = np.arange(len(sources)) >= old.sum()
    model = _Model(sources, flux, others, coadd)
    model.settle(fresh)
    parts = model.parts(fresh)
    split = np.array([len(own) for own, _ in parts])
    if split.max() > 1:
        parent, extended, fresh = (np.repeat(a, split) for a in (parent, extended & (split == 1), split > 1))
        flux = np.concatenate([own_flux for _, own_flux in parts])
        model = _Model([one for own, _ in parts for one in own], flux, others, coadd)
        model.settle(fresh)
    return model.result(extended, parent)


def _sharing(stamps: Sequence[Stamp], coadd: Coadd) -> scipy.sparse.csr_array:
    """Return which of some stamps share light, (stamp, stamp), bool."""
    return abs(normal_equations(stamps, coadd).correlation()) > _SHARED


@dataclasses.dataclass
class _Model:
    """All sources of a patch, their templates, and what their parameters change."""

    sources: list[Source]
    amount: np.ndarray
    """Fluxes in nJy, of either sign."""
    others: Sequence[Stamp]
    coadd: Coadd

    def __post_init__(self) -> None:
        self._start = self._positions()
        self._limit = 0.5 * self.coadd.fwhm_at(*self._start)
        self._own = [s.stamp(self.coadd) for s in self.sources]
        self._slopes = [s.derivatives(self.coadd, t) for s, t in zip(self.sources, self._own, strict=True)]
        self._changes = [np.zeros(len(group)) for group in self._slopes]

    @property
    def flux(self) -> np.ndarray:
        """Scale of the changes of the sources, in nJy, positive."""
        return np.maximum(np.abs(self.amount), _TINY)

    def _positions(self) -> np.ndarray:
        """Return the positions y and x of the sources, (2, source)."""
        return np.array([[s.y for s in self.sources], [s.x for s in self.sources]])

    def _flux_weights(self, k: int, normal: np.ndarray) -> np.ndarray:
        """Return the weights of the pixels of a source in its flux, with the normal matrix of its parameters,
        flux first.
        """
        own = self._own[k]
        mixture = np.linalg.pinv(normal, hermitian=True)[0]
        template = np.tensordot(mixture, [own.array, *(change.array for change in self._slopes[k])], 1)
        return self.coadd.weight[own.slices] * template

    def _templates(self, chosen: Sequence[int] | np.ndarray) -> tuple[list[Stamp], np.ndarray]:
        """Return the templates of some sources, first those of all fluxes, and, of every source, the place of
        its first parameter besides the flux.
        """
        groups = [self._slopes[k] for k in chosen]
        first = len(chosen) + np.cumsum([0] + [len(group) for group in groups])
        slopes = [template for group in groups for template in group]
        return [*(self._own[k] for k in chosen), *slopes, *self.others], first

    def settle(self, moving: np.ndarray) -> None:
        """Take Gauss-Newton steps until no parameter moves.

        A step takes the sources that moved in the one before and those that share light with them, while all
        others stay as they were fitted last.

        Parameters
        ----------
        moving : `numpy.ndarray`, (source,), bool
            Sources that the first step takes, besides those that share light with them.
        """
        sharing = _sharing(self._own, self.coadd)
        for _ in range(_PASSES):
            chosen = np.flatnonzero(moving | (sharing @ moving))
            if len(chosen) == 0:
                break
            moving = np.zeros(len(self.sources), dtype=bool)
            moving[chosen] = self._step(chosen)

    def _step(self, chosen: np.ndarray) -> np.ndarray:
        """Take one step of some sources, and return which of them have moved."""
        coadd = self._without(np.setdiff1d(np.arange(len(self.sources)), chosen))
        templates, first = self._templates(chosen)
        sources = [self.sources[k] for k in chosen]
        fit = _with_prior(normal_equations(templates, coadd), sources, self.flux[chosen], first)
        solution = self._solved(fit, templates, chosen, first, coadd).solution
        self.amount[chosen] = solution[: len(chosen)]
        flux = self.flux[chosen]
        moved = np.zeros(len(chosen), dtype=bool)
        for n, (k, source) in enumerate(zip(chosen, sources, strict=True)):
            change = solution[first[n] : first[n + 1]]
            new, distance = source.moved(change / flux[n], self._start[:, k], self._limit[k])
            moved[n] = distance > _SETTLED
            if moved[n]:
                self.sources[k], self._own[k] = new, new.stamp(self.coadd)
                self._slopes[k] = new.derivatives(self.coadd, self._own[k])
                change = np.zeros(len(change))
            self._changes[k] = change
        return moved

    def _solved(
        self, fit: JointFit, templates: Sequence[Stamp], chosen: np.ndarray, first: np.ndarray, coadd: Coadd
    ) -> _AboveSky:
        """Return the parameters that fit best, and the sky; what is at its limit does not go on."""
        best = _above_sky(fit, templates, coadd)
        solution = best.solution
        stuck = []
        flux = self.flux
        for n, k in enumerate(chosen):
            change = solution[first[n] + 2 : first[n + 1]] / flux[k]
            stuck += (first[n] + 2 + np.flatnonzero(self.sources[k].stuck(change, self._limit[k]))).tolist()
        if stuck:
            stiff = np.zeros(len(solution))
            stiff[stuck] = _STIFF * fit.normal.diagonal()[stuck]
            held = (fit.normal + scipy.sparse.diags_array(stiff)).tocsr()
            best = _above_sky(dataclasses.replace(fit, normal=held), templates, coadd)
        return best

    def _without(self, settled: np.ndarray) -> Coadd:
        """Return the coadd without some sources."""
        templates = [self._own[k] for k in settled] + [t for k in settled for t in self._slopes[k]]
        amounts = np.concatenate([self.amount[settled], *(self._changes[k] for k in settled)])
        return self.coadd.without(render(templates, amounts, self.coadd.shape))

    def parts(self, fresh: np.ndarray) -> list[tuple[list[Source], np.ndarray]]:
        """Return, of every source, itself or the two points that fit better than a galaxy, and the fluxes.

        Parameters
        ----------
        fresh : `numpy.ndarray`, (source,), bool
            Sources that may be two points.
        """
        templates, first = self._templates(range(len(self.sources)))
        fit = _with_prior(normal_equations(templates, self.coadd), self.sources, self.flux, first)
        solution, sky, *_ = self._solved(fit, templates, np.arange(len(self.sources)), first, self.coadd)
        left = self.coadd.image - sky - render(templates, solution, self.coadd.shape)
        result = []
        for k, (source, own) in enumerate(zip(self.sources, self._own, strict=True)):
            pair = None
            if fresh[k] and source.shape is not None:
                alone = left[own.slices] + solution[k] * own.array
                for change, amount in zip(self._slopes[k], solution[first[k] :], strict=False):
                    alone += amount * change.array
                pair = fit_pair(alone, left[own.slices], own, GalaxyShape(*source.shape), self.coadd)
            result.append(
                ([source], self.amount[k : k + 1])
                if pair is None
                else ([Source(*place) for place in pair.positions.tolist()], pair.flux)
            )
        return result

    def result(self, extended: np.ndarray, parent: np.ndarray) -> SourceFit:
        """Return the fit with its errors."""
        coadd, sources, n = self.coadd, self.sources, len(self.sources)
        templates, first = self._templates(range(n))
        full = _with_prior(JointFit.of(templates, coadd), sources, self.flux, first)
        solution, sky, sky_error, response = self._solved(full, templates, np.arange(n), first, coadd)
        errors = full.errors()
        of_sky = response * sky_error
        certain = np.concatenate([np.arange(n), *(first[k] + np.arange(2) for k in range(n))])
        certain = np.concatenate([certain, np.arange(first[-1], len(templates))])
        pick = scipy.sparse.csr_array(
            (np.ones(len(certain)), (certain, np.arange(len(certain)))), shape=(len(templates), len(certain))
        )
        fixed = full.combined(pick).errors()[:n]
        shape_error = np.sqrt(np.maximum(errors[:n] ** 2 - fixed**2, 0.0))
        flux = solution[:n]
        left = coadd.image - sky - render(templates, solution, coadd.shape)
        confusion = np.zeros(n)
        y, x = self._positions()
        light = unseen_light(left, y, x, coadd)
        for k, source in enumerate(sources):
            if source.shape is not None:
                shape_error[k] = math.hypot(shape_error[k], _misfit(self._own[k], left, coadd) * errors[k])
            if light > 0.0:
                own = [k, *range(first[k], first[k + 1])]
                weights = self._flux_weights(k, full.normal[own][:, own].toarray())
                confusion[k] = confusion_error(weights, coadd.psf_at(source.y, source.x), light)
        with np.errstate(divide="ignore", invalid="ignore"):
            y_err, x_err = errors[first[:-1]] / np.abs(flux), errors[first[:-1] + 1] / np.abs(flux)
            last = np.array([solution[first[:-1]], solution[first[:-1] + 1]]) / flux
        y, x = np.stack([y, x]) - np.clip(np.nan_to_num(last), -POSITION_STEP, POSITION_STEP)
        return SourceFit(
            flux=flux,
            error=np.sqrt(fixed**2 + shape_error**2 + confusion**2 + of_sky[:n] ** 2),
            shape_error=shape_error,
            confusion_error=confusion,
            y=y,
            x=x,
            y_err=y_err,
            x_err=x_err,
            extended=extended,
            parent=parent,
            stamps=self._own,
            states=sources,
            sky=sky,
            sky_error=sky_error,
            other_flux=solution[first[-1] :],
            other_error=np.hypot(errors, of_sky)[first[-1] :],
        )


def _classify(
    sources: list[Source], points: Sequence[Stamp], others: Sequence[Stamp], coadd: Coadd
) -> tuple[np.ndarray, np.ndarray]:
    """Decide which parameters of the sources are fitted, and give them first values.

    Returns
    -------
    extended : `numpy.ndarray`, (source,), bool
        Whether a source is wider than the PSF.
    flux : `numpy.ndarray`, (source,)
        First values of the fluxes in nJy.
    """
    n = len(sources)
    widened = [t._replace(array=scipy.ndimage.laplace(t.array, mode="constant")) for t in points]
    shifted = [slope(t, axis) for axis in (0, 1) for t in points]
    test = JointFit.of([*points, *widened, *shifted, *others], coadd)
    solution, errors = test.solution(), test.errors()
    snr = solution[:n] / errors[:n]
    extended = solution[n : 2 * n] > _EXTENDED * errors[n : 2 * n]
    for k, source in enumerate(sources):
        fwhm = float(coadd.fwhm[coadd.cell(source.y, source.x)])
        width = MAX_WIDTH * fwhm
        ratio = 2.0 * solution[n + k] / solution[k] if solution[k] > 0.0 else 0.0
        extended[k] &= ratio > 2.0 * _PSF_WIDTH_ERROR * (fwhm / FWHM_PER_SIGMA) ** 2
        if extended[k] and snr[k] >= _SHAPE_SNR:
            variance = min(max(ratio, 0.2), width**2)
            sources[k] = source.shaped(variance)
        elif extended[k] or snr[k] < _WIDTH_SNR:
            source.variance = min(max(ratio, 0.0), width**2)
    return extended, solution[:n]


class _AboveSky(NamedTuple):
    """Parameters that fit best together with a constant sky.

    Parameters
    ----------
    solution : `numpy.ndarray`, (parameter,)
        The parameters.
    sky, sky_error : `float`
        The sky and its standard error, in nJy a pixel.
    response : `numpy.ndarray`, (parameter,)
        What a unit of the sky takes off the parameters.
    """

    solution: np.ndarray
    sky: float
    sky_error: float
    response: np.ndarray


def _above_sky(fit: JointFit, templates: Sequence[Stamp], coadd: Coadd) -> _AboveSky:
    """Return the parameters that fit best together with a constant sky, and that sky.

    With ``h = T^T W 1`` and ``c = N^-1 h``, the sky that is left by parameters ``a = N^-1 b`` is
    ``(1^T W D - h a) / (1^T W 1 - h c)``, and takes ``c`` times itself off the parameters. What there is of
    it is of the order of the noise of a pixel at most, which decides where next to no pixel is free of
    sources.
    """
    alone = fit.solution()
    under, response = sky_responses(fit, templates, coadd)
    seen = coadd.weight[coadd.weight > 0.0]
    total = float(seen.sum() - under @ response + (np.median(seen) if len(seen) else 1.0))
    sky = float((coadd.weight * coadd.image).sum() - under @ alone) / total
    error = math.sqrt(max(float(coadd.noise_correlation.sum()), 0.0) / total)
    return _AboveSky(alone - sky * response, sky, error, response)


def _with_prior(fit: JointFit, sources: list[Source], flux: np.ndarray, first: np.ndarray) -> JointFit:
    """Add the prior of the shapes to a fit, whose parameters are changes of the shapes times fluxes."""
    precision, pull = np.zeros(len(fit.right)), np.zeros(len(fit.right))
    for k, source in enumerate(sources):
        own = slice(first[k] + 2, first[k + 1])
        below, precisions = source.prior()
        precision[own] = precisions / flux[k] ** 2
        pull[own] = below * flux[k]
    prior = scipy.sparse.diags_array(precision)
    return JointFit((fit.normal + prior).tocsr(), fit.right + precision * pull, (fit.noise + prior).tocsr())


def _misfit(own: Stamp, left: np.ndarray, coadd: Coadd) -> float:
    """Return what is added, in quadrature, to the error of a galaxy, in units of it, where its model does not
    fit.
    """
    inside = (own.array > _FOOTPRINT * own.array.max(initial=0.0)) & coadd.good[own.slices]
    n = int(inside.sum())
    if n == 0:
        return 0.0
    reduced = float(np.mean(left[own.slices][inside] ** 2 / coadd.variance[own.slices][inside]))
    # The squares of correlated noise are correlated like the squares of its correlations.
    excess = float((coadd.noise_correlation**2).sum())
    return math.sqrt(reduced - 1.0) if reduced > 1.0 + _MISFIT * math.sqrt(2.0 * excess / n) else 0.0
