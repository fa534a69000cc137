# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Unresolved sources: what the data cannot tell from a point becomes a point.

Deconvolution amplifies noise most where there is most light, so that maximum likelihood makes up structure
inside the core of a bright star. A point has three parameters instead. As in Magain, Courbin & Sohy (1998,
ApJ 494, 472) the restored image is the sum of points and of the rest,

.. math:: x(q) = \sum_j F_j\, g(q - p_j) + (r * u_\mathrm{rest})(q).

In the latent image a point is a non-negative :math:`u_p` with :math:`r * u_p = g(\cdot - p)`, so nothing else
has to know of it.
"""

from __future__ import annotations

__all__ = ("PointSources", "point_sources")

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.sparse
import scipy.sparse.csgraph
import scipy.spatial
import torch

from .baselines import inner_smooth
from .patch_data import PatchData
from .point_templates import half_width, point_templates
from .psf import FWHM_PER_SIGMA, gaussian_stamp
from .statistics import SetStatistics, VisitSets

_MIN_SNR = 30.0
"""Signal to noise ratio above which a peak may be a point. Below it the data seldom tell a small galaxy from
a star; 15 and 50 gave the same fidelity within 0.2 dB on scenes that the benchmark does not report."""

_PEAK_SNR = 8.0
"""Signal to noise ratio above which a peak that is no point keeps the light around it."""

_MAX_CHI2 = 7.8
"""Largest significance of second moments, chi^2 of three degrees of freedom; a point exceeds it once in
twenty times, and is then left as it was."""

_MAX_DEVIATION = 4.0
"""Largest significance of what a point leaves in the matched image within one FWHM."""

_TEST_PSF_ERROR = 0.3
"""Relative error of the PSF at which residuals are clipped in the test: less would clip what tells a bright
galaxy from a star."""

_CORE = 4.0
"""Radius of the disc in which a point replaces the image, in sigma of the target."""

_RING = 4.0
"""Width in pixels of the ring around the disc that tells the light under a point."""

_UNDER = 0.25
"""Quantile of the ring that is taken as the light under a point: the ring may hold other sources."""

_LINK = 1.5
"""Points closer than this, in units of the median FWHM, are fitted together."""

_LARGEST = 40
"""Number of points that are at most fitted together, but for those around them: the work grows with its
cube. In the densest fields all points of a patch are linked."""

_AROUND = 3.0
"""Distance, in units of the median FWHM, of the points around those that are fitted with them: farther ones
hardly matter."""

_MAX_SHIFT = 1.5
"""Distance in pixels that a point may move from its peak."""

_PSF_ERRORS = (0.3, 0.3, 0.05, 0.0)
"""Least relative error of the PSF in the passes over the visits of the first round: with the flux of the
peaks a saturated star may be off by much, and clipping would keep it so. One wide pass can leave the flux of
a star with a neighbour wrong by a tenth. The other rounds, from which points were dropped, have one pass
without."""

_N_STEPS = 2
"""Gauss-Newton steps in a pass."""

_ROUNDS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class PointSources:
    """Result of `point_sources`.

    Parameters
    ----------
    latent : `torch.Tensor`, (y, x)
        Latent image u with the points in it, in nJy.
    y, x : `numpy.ndarray`, (point,)
        Positions on the canvas in pixels.
    flux : `numpy.ndarray`, (point,)
        Fluxes in nJy.
    n_candidates : `int`
        Number of peaks that were tried.
    """

    latent: torch.Tensor
    y: np.ndarray
    x: np.ndarray
    flux: np.ndarray
    n_candidates: int


_PARAMETERS = slice(0, 3)

_MOMENTS = slice(3, 6)


class _Canvas:
    """The data as points see it, and images of it that do not change with them."""

    def __init__(self, data: PatchData, sets: VisitSets, latent: torch.Tensor) -> None:
        self.data = data
        self.sets = sets
        self.latent = latent.cpu().numpy()
        self.image = inner_smooth(latent, data.sigma).cpu().numpy()
        self.peak = float(gaussian_stamp(data.sigma).max())
        self.seeing = float(np.median(data.seeing[data.group >= 0]))
        sky = data.matched_noise().cpu().numpy()
        noise, seen = (image.cpu().numpy() for image in data.noise_of_gradient())
        tiny = np.finfo(np.float32).tiny
        self.variance = np.maximum(noise, 0.0)
        self.excess = np.maximum(self.variance / np.maximum(seen, tiny), 1.0)
        self.snr = self.image / self.peak * np.sqrt(np.maximum(seen, 0.0)) * (sky > 0.0)
        # With room for the lags between the templates of points as far apart as the kernel reaches.
        lags = 4 * half_width(data.sigma)
        self.gram = np.pad(data.gram_kernel().cpu().numpy(), ((0, 0), (0, 0), (lags, lags), (lags, lags)))
        self.blind = np.ones(self.image.shape, dtype=bool)
        patch = tuple(slice(data.margin, data.margin + n) for n in data.layout.shape)
        self.blind[patch] = data.pixel_weight(data.weight.sum(axis=0)) == 0.0
        self._statistics: SetStatistics | None = None

    def peaks(self, width: int, snr: float) -> np.ndarray:
        """Return the local maxima in boxes of some width above some S/N, (peak, 2)."""
        highest = self.image == scipy.ndimage.maximum_filter(self.image, width)
        border = half_width(self.data.sigma) + math.ceil(_MAX_SHIFT) + 1
        inside = np.zeros_like(highest)
        inside[border:-border, border:-border] = True
        return np.argwhere(highest & inside & (self.snr > snr))

    def cells_of(self, points: np.ndarray) -> np.ndarray:
        """Return row and column of the cells of points, (point, 2)."""
        layout = self.data.layout
        pixels = np.rint(points[:, :0:-1]).astype(int) - self.data.margin
        return np.clip(pixels // (layout.height, layout.width), 0, (layout.n_i - 1, layout.n_j - 1))

    def excess_at(self, points: np.ndarray) -> np.ndarray:
        """Return the variance of the gradient at points over that of the sky, (point,)."""
        return self.excess[np.rint(points[:, 2]).astype(int), np.rint(points[:, 1]).astype(int)]

    def model(self, rest: np.ndarray, points: np.ndarray) -> torch.Tensor:
        """Return the latent image of the rest and of points (point, 3: flux, x, y)."""
        total = rest.copy()
        for template in point_templates(self.data.sigma, points):
            template.cut(total)[...] += template.images[0]
        return torch.as_tensor(total, dtype=self.data.dtype, device=self.data.device)

    def linearise(self, model: torch.Tensor, psf_error: float) -> None:
        """Read the visits once; the coverage is that of the first time."""
        coverage = None if self._statistics is None else self._statistics.coverage
        self._statistics = self.data.linearise(self.sets, model[None], psf_error=psf_error, coverage=coverage)

    def gradient(self, model: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the gradient N - c A u of a model, the part c that has data, and c A u."""
        if self._statistics is None:
            raise RuntimeError("The data must be linearised before their gradient is taken.")
        prediction = self.sets.gram.forward(model[None])[0].mul_(self._statistics.coverage[0])
        gradient = self._statistics.seen[0] - prediction
        return (
            gradient.cpu().numpy(),
            self._statistics.coverage[0].clamp(1e-3, 1.0).cpu().numpy(),
            prediction.cpu().numpy(),
        )


def point_sources(
    data: PatchData,
    sets: VisitSets,
    latent: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> PointSources:
    r"""Replace what the data cannot tell from points by points.

    Peaks of the image above `_MIN_SNR` are fitted as points over the rest of the image, all visits together,
    by Gauss-Newton steps on the robust objective, some in each pass over the visits: with the gradient
    :math:`D = N - c A u` of the matched image and the templates :math:`T = \partial u / \partial\theta` a
    step solves :math:`(T^T A T)\, \delta = T^T D`. A point stays if its second moments, by a score test on
    the same gradient that allows for the error of the PSF, and all that it leaves within one FWHM are
    insignificant. Where one does not stay, the
    image is as it was: galaxies, blends that nothing resolves, stars whose PSF is wrong by more than its
    error.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u, in nJy.
    progress : `~collections.abc.Callable`, optional
        Called with the number of rounds done and the largest one, after each.

    Returns
    -------
    points : `PointSources`
        The latent image with the points, and the points.
    """
    canvas = _Canvas(data, sets, latent)
    peaks = canvas.peaks(5, _MIN_SNR)
    n_candidates = len(peaks)
    points = _first_guess(canvas, peaks)
    for number in range(_ROUNDS):
        if len(points) == 0:
            break
        rest = _rest(canvas, points, peaks)
        groups = _groups(points, canvas.seeing)
        for least in _PSF_ERRORS if number == 0 else (0.0,):
            canvas.linearise(canvas.model(rest, points), max(least, data.psf_error))
            for _ in range(_N_STEPS):
                gradient, coverage, _ = canvas.gradient(canvas.model(rest, points))
                points = _moved(canvas, points, peaks, groups, gradient, coverage)
        stays = _insignificant(canvas, points, groups, canvas.model(rest, points))
        if progress is not None:
            progress(number + 1, _ROUNDS)
        if stays.all():
            break
        points, peaks = points[stays], peaks[stays]
    flux, x, y = points.T
    if len(points):
        latent = canvas.model(_rest(canvas, points, peaks), points)
    return PointSources(latent, y, x, flux, n_candidates)


def _first_guess(canvas: _Canvas, peaks: np.ndarray) -> np.ndarray:
    """Return flux, x and y of peaks, (peak, 3), as if each were the target Gaussian."""
    logarithm = np.log(np.maximum(canvas.image, 1e-3 * canvas.image.max()))
    rows, columns = peaks.T
    offsets = []
    for dy, dx in ((0, 1), (1, 0)):
        low, high = logarithm[rows - dy, columns - dx], logarithm[rows + dy, columns + dx]
        curvature = np.minimum(low - 2.0 * logarithm[rows, columns] + high, -1e-3)
        offsets.append(np.clip(0.5 * (low - high) / curvature, -0.7, 0.7))
    x, y = offsets
    flux = canvas.image[rows, columns] / canvas.peak * np.exp(0.5 * (x**2 + y**2) / canvas.data.sigma**2)
    return np.column_stack([flux, columns + x, rows + y])


def _rest(canvas: _Canvas, points: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Return the latent image without the light of points, (y, x).

    Pixels of the disc of a point, but for those that are nearer to a peak that is none, take the light of the
    ring around it, if that is less. A point may have left its peak, which is its own all the same. Where no
    visit has data the disc is as wide as the seeing, since nothing held the light of the point together.
    """
    centres = scipy.spatial.cKDTree(points[:, :0:-1])
    others = canvas.peaks(3, _PEAK_SNR).astype(float)
    others = others[scipy.spatial.cKDTree(peaks).query(others)[0] > 1.0] if len(others) else others
    core, reach = _CORE * canvas.data.sigma, math.ceil(_CORE * canvas.data.sigma + _RING)
    boxes = []
    discs = np.zeros(canvas.latent.shape, dtype=bool)
    for _, x, y in points:
        box = tuple(
            slice(max(round(c) - reach, 0), min(round(c) + reach + 1, n))
            for c, n in zip((y, x), canvas.latent.shape, strict=True)
        )
        rows, columns = np.mgrid[box]
        pixels = np.dstack([rows, columns])
        distance = np.hypot(rows - y, columns - x)
        disc = distance <= np.where(canvas.blind[box], max(core, canvas.seeing), core)
        if len(others):
            disc &= scipy.spatial.cKDTree(others).query(pixels)[0] >= centres.query(pixels)[0]
        ring = (distance > core) & (distance <= core + _RING)
        boxes.append((box, disc, ring))
        discs[box] |= disc
    rest = canvas.latent.copy()
    for box, disc, ring in boxes:
        free = canvas.latent[box][ring & ~discs[box]]
        under = np.quantile(free, _UNDER) if len(free) else 0.0
        rest[box][disc] = np.minimum(rest[box][disc], under)
    return rest


class _Group(NamedTuple):
    """Points that are fitted together: first ``n_own`` of its own, then those around them."""

    members: np.ndarray
    n_own: int


def _groups(points: np.ndarray, seeing: float) -> list[_Group]:
    """Divide points (point, 3) into groups linked by steps of at most `_LINK`; large ones are cut."""
    places = points[:, 1:]
    pairs = scipy.spatial.cKDTree(places).query_pairs(_LINK * seeing, output_type="ndarray")
    links = scipy.sparse.coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(points),) * 2)
    n_groups, labels = scipy.sparse.csgraph.connected_components(links, directed=False)
    order = np.argsort(labels, kind="stable")
    result = []
    for linked in np.split(order, np.searchsorted(labels[order], np.arange(1, n_groups))):
        tree = scipy.spatial.cKDTree(places[linked])
        for own in _cut(places, linked):
            near = tree.query_ball_point(places[own], _AROUND * seeing)
            around = linked[np.unique(np.concatenate(near)).astype(int)]
            result.append(_Group(np.concatenate([own, np.setdiff1d(around, own)]), len(own)))
    return result


def _cut(places: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """Halve a group along its longer axis until no part has more points than `_LARGEST`."""
    if len(members) <= _LARGEST:
        return [members]
    axis = int(np.ptp(places[members], axis=0).argmax())
    members = members[np.argsort(places[members, axis], kind="stable")]
    middle = len(members) // 2
    return _cut(places, members[:middle]) + _cut(places, members[middle:])


def _products(padded: np.ndarray, n: int, shift: tuple[int, int]) -> np.ndarray:
    """Return the values of a kernel, padded by twice n - 1, between the pixels of two stamps of width n."""
    y, x = (s + len(padded) // 2 - (n - 1) for s in shift)
    if not (0 <= min(y, x) and max(y, x) + 2 * n - 1 <= len(padded)):
        return np.zeros((n**2, n**2))
    # Element (i, j, k, l) of all windows is pixel (i + k, j + l); turned round, the lags are i - k and j - l.
    windows = np.lib.stride_tricks.sliding_window_view(padded[y : y + 2 * n - 1, x : x + 2 * n - 1], (n, n))
    return windows[:, :, ::-1, ::-1].reshape(n**2, n**2)


class _Equations:
    """Normal matrix T^T A T and right side T^T D of points, with A reduced to what has data on both sides."""

    def __init__(
        self, canvas: _Canvas, points: np.ndarray, gradient: np.ndarray, coverage: np.ndarray
    ) -> None:
        self._gram = canvas.gram
        self._cells = canvas.cells_of(points)
        self._templates = point_templates(canvas.data.sigma, points)
        self._n = self._templates[0].images.shape[-1]
        images = np.array([t.images for t in self._templates])
        data, seen = (np.array([t.cut(image) for t in self._templates]) for image in (gradient, coverage))
        self._right = np.einsum("pkyx,pyx->pk", images, data)
        self._reduced = (images * np.sqrt(seen)[:, None]).reshape(len(points), 6, -1)
        self._own = np.empty((len(points), 6, 6))
        cells, number = np.unique(self._cells, axis=0, return_inverse=True)
        for k, cell in enumerate(cells):
            some = self._reduced[number == k]
            self._own[number == k] = some @ _products(self._gram[*cell], self._n, (0, 0)) @ some.mT

    def of(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the matrix (point, 6, point, 6) and the right side (point, 6) of some points."""
        matrix = np.zeros((len(members), 6, len(members), 6))
        for a, one in enumerate(members):
            matrix[a, :, a] = self._own[one]
            for b, other in enumerate(members[:a]):
                first, second = self._templates[one], self._templates[other]
                shift = (first.y0 - second.y0, first.x0 - second.x0)
                gram = _products(self._gram[*self._cells[one]], self._n, shift)
                matrix[a, :, b] = self._reduced[one] @ gram @ self._reduced[other].T
                matrix[b, :, a] = matrix[a, :, b].T
        return matrix, self._right[members]


def _moment_variance(canvas: _Canvas) -> float:
    """Return the variance that errors of the PSF give the second moments of a star, in pixels^4.

    A FWHM that is wrong by a part e changes them by 2 e sigma^2.
    """
    return float((2.0 * canvas.data.psf_error * (canvas.seeing / FWHM_PER_SIGMA) ** 2) ** 2)


def _moved(
    canvas: _Canvas,
    points: np.ndarray,
    peaks: np.ndarray,
    groups: list[_Group],
    gradient: np.ndarray,
    coverage: np.ndarray,
) -> np.ndarray:
    """Take a Gauss-Newton step of all points, (point, 3), group by group.

    The second moments are fitted too, with the errors of the PSF as their prior, and then left out, so that
    the flux is not wrong where the PSF is too wide.
    """
    moved = points.copy()
    variance = _moment_variance(canvas)
    equations = _Equations(canvas, points, gradient, coverage)
    for members, n_own in groups:
        matrix, right = equations.of(members)
        for place, excess in enumerate(canvas.excess_at(points[members])):
            moments = np.arange(3, 6)
            # A little of the matrix itself where the PSF has no error.
            matrix[place, moments, place, moments] += excess / max(variance, 1e-12)
        size = 6 * len(members)
        step = np.linalg.pinv(matrix.reshape(size, size), hermitian=True) @ right.ravel()
        own, step = members[:n_own], step.reshape(-1, 6)[:n_own, _PARAMETERS]
        moved[own, 0] *= 1.0 + np.clip(step[:, 0], -0.5, 1.0)
        moved[own, 1:] += np.clip(step[:, 1:], -0.5, 0.5)
    moved[:, 1:] = peaks[:, ::-1] + np.clip(moved[:, 1:] - peaks[:, ::-1], -_MAX_SHIFT, _MAX_SHIFT)
    return moved


def _insignificant(
    canvas: _Canvas, points: np.ndarray, groups: list[_Group], model: torch.Tensor
) -> np.ndarray:
    """Tell which points leave nothing significant in the data, (point,) bool."""
    data = canvas.data
    canvas.linearise(model, _TEST_PSF_ERROR)
    gradient, coverage, prediction = canvas.gradient(model)
    tiny = float(np.finfo(np.float32).tiny)
    deviation = np.abs(gradient) / np.sqrt(canvas.variance + (data.psf_error * prediction) ** 2 + tiny)
    moment_error = _moment_variance(canvas) * np.eye(3)
    reach = math.ceil(canvas.seeing)
    stays = np.zeros(len(points), dtype=bool)
    equations = _Equations(canvas, points, gradient, coverage)
    for members, n_own in groups:
        matrix, right = equations.of(members)
        k = 3 * len(members)
        inverse = np.linalg.pinv(matrix[:, _PARAMETERS][..., _PARAMETERS].reshape(k, k), hermitian=True)
        for place, (member, excess) in enumerate(
            zip(members[:n_own], canvas.excess_at(points[members[:n_own]]), strict=True)
        ):
            _, x, y = points[member]
            cross = matrix[place, _MOMENTS][..., _PARAMETERS].reshape(3, k) @ inverse
            information = matrix[place, _MOMENTS, place, _MOMENTS] - cross @ matrix[
                :, _PARAMETERS, place, _MOMENTS
            ].reshape(k, 3)
            covariance = np.linalg.pinv(information, hermitian=True)
            moments = covariance @ (right[place, _MOMENTS] - cross @ right[:, _PARAMETERS].ravel())
            chi2 = moments @ np.linalg.solve(covariance * excess + moment_error, moments)
            ys, xs = (slice(max(round(c) - reach, 0), round(c) + reach + 1) for c in (y, x))
            around = deviation[ys, xs]
            rows, columns = np.indices(around.shape)
            near = np.hypot(rows + ys.start - y, columns + xs.start - x) <= canvas.seeing
            stays[member] = chi2 < _MAX_CHI2 and around[near].max() < _MAX_DEVIATION
    return stays
