# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The joint linear fit of many overlapping templates to a coadd whose PSF varies from cell to cell."""

from __future__ import annotations

__all__ = ("Coadd", "JointFit", "Stamp", "normal_equations", "render", "slope", "sum_stamps")

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg

from .psf import carry_kernel, convolve_full, fwhm, shift_stamp

_NEGLIGIBLE = 1e-7
"""Correlation of two templates below which they have nothing in common: what is left of a star of S/N 5000,
as bright as one can be without saturation, is less than a thousandth of the error of another source then."""

_LINKED = 0.01
"""Correlation of two templates above which their errors depend on each other."""

_LARGEST = 2000
"""Number of linked templates whose errors are found together: the work grows with its cube."""

_STEPS = 2
"""Links around some templates within which others are fitted with them for their errors."""

_FEEBLE = 1e-3
"""Part of the light of a source below which that in another cell is drawn with the PSF of its own."""


class Stamp(NamedTuple):
    """A piece of the patch: ``array[0, 0]`` is its pixel ``(y0, x0)``."""

    y0: int
    x0: int
    array: np.ndarray

    @property
    def slices(self) -> tuple[slice, slice]:
        """The part of the patch that the stamp covers."""
        height, width = self.array.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)

    def cropped(self, shape: tuple[int, int]) -> Stamp:
        """Return the part of the stamp that lies in a patch of some shape."""
        y, x = max(self.y0, 0), max(self.x0, 0)
        stop_y, stop_x = shape[0] - self.y0, shape[1] - self.x0
        return Stamp(y, x, self.array[y - self.y0 : max(stop_y, 0), x - self.x0 : max(stop_x, 0)])


def slope(stamp: Stamp, axis: int) -> Stamp:
    """Return the derivative of a stamp along an axis, to fourth order."""
    stencil = np.array([1.0, -8.0, 0.0, 8.0, -1.0]) / 12.0
    return stamp._replace(array=scipy.ndimage.correlate1d(stamp.array, stencil, axis=axis, mode="constant"))


def sum_stamps(stamps: Sequence[Stamp]) -> Stamp:
    """Add stamps on the smallest box that holds them all."""
    y0, x0 = min(s.y0 for s in stamps), min(s.x0 for s in stamps)
    height = max(s.slices[0].stop for s in stamps) - y0
    width = max(s.slices[1].stop for s in stamps) - x0
    total = np.zeros((height, width))
    for stamp in stamps:
        total[Stamp(stamp.y0 - y0, stamp.x0 - x0, stamp.array).slices] += stamp.array
    return Stamp(y0, x0, total)


class Coadd:
    """The plain coadd as model plus residual, with its noise and its PSF in each cell.

    Parameters
    ----------
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy, finite.
    target_sigma : `float`
        Sigma in pixels of the Gaussian PSF of ``model``.
    residual : `numpy.ndarray`, (y, x)
        Coadd of data minus model in nJy, NaN where there is no data.
    variance : `numpy.ndarray`, (y, x)
        Variance of ``residual`` in nJy^2; what is not positive is taken as no data.
    psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF of ``residual`` in each cell, odd size, unit sum; NaN in missing cells.
    noise_correlation : `numpy.ndarray`, (k, k), optional
        Correlation of the noise of ``residual`` by lag (see
        `~lsst.coadd.deepprior.noise_correlation.noise_correlation`); without it the noise is white.

    Attributes
    ----------
    image : `numpy.ndarray`, (y, x)
        The model carried to the coadd PSF plus the residual, in nJy; 0 where there is no data.
    good : `numpy.ndarray`, (y, x), bool
        Pixels with data.
    weight : `numpy.ndarray`, (y, x)
        One weight a cell, the inverse of its median variance; 0 where there is no data.
    matched : `numpy.ndarray`, (y, x)
        Sum of ``weight`` under the squared PSF at each pixel: what a matched filter is divided by.
    information : `numpy.ndarray`, (y, x)
        Inverse variance of the flux of a point source at each pixel, in nJy^-2, the correlation of the noise
        included.
    fwhm : `numpy.ndarray`, (cell_i, cell_j)
        FWHM of the PSF in pixels; in missing cells the median of the others.

    Raises
    ------
    ValueError
        Raised if the images have not one shape, or the cells of ``psf`` do not divide it.

    Notes
    -----
    Sources in missing cells cast light into others. They are drawn with the PSF of the nearest of these.
    """

    def __init__(
        self,
        model: np.ndarray,
        target_sigma: float,
        residual: np.ndarray,
        variance: np.ndarray,
        psf: np.ndarray,
        noise_correlation: np.ndarray | None = None,
    ) -> None:
        self.shape = model.shape
        self.noise_correlation = np.ones((1, 1)) if noise_correlation is None else noise_correlation
        self.psf = psf
        for name, image in (("residual", residual), ("variance", variance)):
            if image.shape != self.shape:
                raise ValueError(
                    f"The {name} is {image.shape} and the model {self.shape}; they must be equal."
                )
        n_i, n_j = psf.shape[:2]
        if self.shape[0] % n_i or self.shape[1] % n_j:
            raise ValueError(
                f"PSFs of {n_i}x{n_j} cells do not fit an image of {self.shape}: give one for each cell, all "
                "cells being equally large."
            )
        self.height, self.width = self.shape[0] // n_i, self.shape[1] // n_j
        self.fwhm = np.full((n_i, n_j), np.nan)
        self.kernels = np.full(psf.shape, np.nan)
        # The cell whose PSF draws what is in a cell: the first with an equal one, or that of the nearest.
        self._psf_cell: dict[tuple[int, int], tuple[int, int]] = {}
        done: dict[bytes, tuple[int, int]] = {}
        for i, j in np.ndindex(n_i, n_j):
            stamp = psf[i, j]
            if np.isfinite(stamp).all():
                first = done.setdefault(stamp.tobytes(), (i, j))  # constant PSFs are common
                self._psf_cell[i, j] = first
                if first == (i, j):
                    self.fwhm[i, j] = fwhm(stamp)
                    self.kernels[i, j] = carry_kernel(stamp, target_sigma)
                else:
                    self.fwhm[i, j], self.kernels[i, j] = self.fwhm[first], self.kernels[first]

        known = np.isfinite(self.fwhm)
        if known.any():
            _, nearest = scipy.ndimage.distance_transform_edt(~known, return_indices=True)
            for i, j in np.argwhere(~known).tolist():
                self._psf_cell[i, j] = self._psf_cell[tuple(nearest[:, i, j].tolist())]
            self.fwhm[~known] = np.nanmedian(self.fwhm)
        self.good = np.isfinite(residual) & np.isfinite(variance) & (variance > 0.0)
        self.variance = np.where(self.good, variance, 0.0)
        self.weight = np.zeros(self.shape)
        for i, j in np.ndindex(n_i, n_j):
            cell = np.s_[i * self.height : (i + 1) * self.height, j * self.width : (j + 1) * self.width]
            if (good := self.good[cell]).any():
                self.weight[cell] = good / np.median(variance[cell][good])
        self.image = np.where(self.good, self.carry(Stamp(0, 0, model)).array + residual, 0.0)
        self.matched = np.maximum(self.correlate(self.weight, power=2), 0.0)
        self.information = self._information()

    def correlated(self, noise_correlation: np.ndarray) -> Coadd:
        """Return the same coadd with another correlation of its noise.

        Parameters
        ----------
        noise_correlation : `numpy.ndarray`, (k, k)
            Correlation by lag.

        Returns
        -------
        coadd : `Coadd`
            The coadd, which shares its images with this one.
        """
        other = copy.copy(self)
        other.noise_correlation = noise_correlation
        other.information = other._information()
        return other

    def without(self, light: float | np.ndarray) -> Coadd:
        """Return the same coadd with a constant sky or an image, in nJy a pixel, subtracted."""
        other = copy.copy(self)
        other.image = np.where(self.good, self.image - light, 0.0)
        return other

    def _information(self) -> np.ndarray:
        """Return the inverse variance of point-source fluxes, (y, x)."""
        information = self.matched.copy()
        for i, j in np.ndindex(self.psf.shape[:2]):
            if np.isfinite(self.psf[i, j]).all():
                cell = np.s_[i * self.height : (i + 1) * self.height, j * self.width : (j + 1) * self.width]
                information[cell] /= self.noise_excess(self.psf[i, j])
        return information

    def noise_excess(self, weights: np.ndarray) -> float:
        """Return the variance of a weighted sum of pixels over that of white noise of the same variance.

        Parameters
        ----------
        weights : `numpy.ndarray`, (y, x)
            Weights of neighbouring pixels of equal variance.

        Returns
        -------
        excess : `float`
            The ratio, 1 for white noise.
        """
        if self.noise_correlation.size == 1:
            return 1.0
        smooth = convolve_full(weights, self.noise_correlation)
        half = self.noise_correlation.shape[0] // 2
        total = float((weights * smooth[half:-half, half:-half]).sum() / (weights**2).sum())
        return max(total, 1e-3)  # a measured correlation need not be positive definite

    def noise_products(self, templates: Sequence[Stamp]) -> scipy.sparse.csr_array:
        """Return ``T^T W C W T``, the covariance of the projections of the data on templates.

        Parameters
        ----------
        templates : `~collections.abc.Sequence` [`Stamp`]
            The templates T.

        Returns
        -------
        products : `scipy.sparse.csr_array`, (template, template)
            The covariance in nJy^-2, with C of the variance and the correlation of the coadd.
        """
        return _products(templates, self.weight * np.sqrt(self.variance), self.noise_correlation)

    def cell(self, y: float, x: float) -> tuple[int, int]:
        """Return the cell that holds a position in array coordinates."""
        return (
            min(max(round(y) // self.height, 0), self.psf.shape[0] - 1),
            min(max(round(x) // self.width, 0), self.psf.shape[1] - 1),
        )

    def convolve(self, stamp: Stamp, kernels: np.ndarray) -> Stamp:
        """Convolve a stamp; each pixel of the result uses the kernel of its own cell, and is 0 in missing
        cells.
        """
        half = kernels.shape[-1] // 2
        ys, xs = stamp.slices
        y0, y1 = max(ys.start - half, 0), min(ys.stop + half, self.shape[0])
        x0, x1 = max(xs.start - half, 0), min(xs.stop + half, self.shape[1])
        result = np.zeros((y1 - y0, x1 - x0))
        for i in range(y0 // self.height, (y1 - 1) // self.height + 1):
            for j in range(x0 // self.width, (x1 - 1) // self.width + 1):
                if not np.isfinite(kernels[i, j, 0, 0]):
                    continue
                oy0, oy1 = max(y0, i * self.height), min(y1, (i + 1) * self.height)
                ox0, ox1 = max(x0, j * self.width), min(x1, (j + 1) * self.width)
                iy0, iy1 = max(ys.start, oy0 - half), min(ys.stop, oy1 + half)
                ix0, ix1 = max(xs.start, ox0 - half), min(xs.stop, ox1 + half)
                source = stamp.array[iy0 - ys.start : iy1 - ys.start, ix0 - xs.start : ix1 - xs.start]
                full = convolve_full(source.astype(float), kernels[i, j])
                result[oy0 - y0 : oy1 - y0, ox0 - x0 : ox1 - x0] = full[
                    oy0 - iy0 + half : oy1 - iy0 + half, ox0 - ix0 + half : ox1 - ix0 + half
                ]
        return Stamp(y0, x0, result)

    def carry(self, stamp: Stamp) -> Stamp:
        """Carry a piece of the restored image to the coadd PSF."""
        return self.convolve(stamp, self.kernels)

    def correlate(self, image: np.ndarray, power: int) -> np.ndarray:
        """Sum an image under the PSF, to some power, centred on each pixel."""
        return self.convolve(Stamp(0, 0, image), self.psf[:, :, ::-1, ::-1] ** power).array

    def psf_at(self, y: float, x: float) -> np.ndarray:
        """Return the PSF (k, k) at a position; in missing cells it is that of the nearest other cell."""
        return self.psf[self._psf_cell[self.cell(y, x)]]

    def drawn(self, y: float, x: float, draw: Callable[[np.ndarray], Stamp]) -> Stamp:
        """Draw a source; each pixel of the result has the PSF of its own cell, as the data have.

        Parameters
        ----------
        y, x : `float`
            Position of the source in array coordinates.
        draw : `~collections.abc.Callable`
            Function of a PSF (k, k) that returns the source with that PSF, in the same box for all.

        Returns
        -------
        source : `Stamp`
            The part of the source in the patch.
        """
        own = self._psf_cell[self.cell(y, x)]
        whole = draw(self.psf[own]).cropped(self.shape)
        ys, xs = whole.slices
        result = whole.array.copy()
        for i in range(ys.start // self.height, (ys.stop - 1) // self.height + 1):
            for j in range(xs.start // self.width, (xs.stop - 1) // self.width + 1):
                part = (
                    slice(max(i * self.height - ys.start, 0), (i + 1) * self.height - ys.start),
                    slice(max(j * self.width - xs.start, 0), (j + 1) * self.width - xs.start),
                )
                enough = np.abs(whole.array[part]).sum() > _FEEBLE * np.abs(whole.array).sum()
                if enough and self._psf_cell[i, j] != own:
                    result[part] = draw(self.psf[self._psf_cell[i, j]]).cropped(self.shape).array[part]
        return whole._replace(array=result)

    def point(self, y: float, x: float) -> Stamp:
        """Return a point source of unit flux."""
        iy, ix, half = round(y), round(x), self.psf.shape[-1] // 2
        return self.drawn(y, x, lambda psf: Stamp(iy - half, ix - half, shift_stamp(psf, x - ix, y - iy)))


@dataclasses.dataclass(frozen=True, eq=False)
class JointFit:
    """Normal equations ``N f = b`` of a joint linear fit, and ``M``, the covariance of ``b``."""

    normal: scipy.sparse.csr_array
    right: np.ndarray
    noise: scipy.sparse.csr_array

    @classmethod
    def of(cls, templates: Sequence[Stamp], coadd: Coadd) -> JointFit:
        """Set up the fit of templates to a coadd.

        Parameters
        ----------
        templates : `~collections.abc.Sequence` [`Stamp`]
            Images of unit parameters.
        coadd : `Coadd`
            Data, weights and noise.

        Returns
        -------
        fit : `JointFit`
            Normal equations.
        """
        return dataclasses.replace(normal_equations(templates, coadd), noise=coadd.noise_products(templates))

    def combined(self, mixing: scipy.sparse.csr_array) -> JointFit:
        """Return the fit whose parameters are mixtures (old, new) of these."""
        return JointFit(
            (mixing.T @ self.normal @ mixing).tocsr(),
            mixing.T @ self.right,
            (mixing.T @ self.noise @ mixing).tocsr(),
        )

    def correlation(self) -> scipy.sparse.csr_array:
        """Return the correlations of the templates off the diagonal."""
        return _correlation(self.normal)

    def solution(self) -> np.ndarray:
        """Return the parameters that fit best."""
        ridge = scipy.sparse.diags_array(1e-10 * self.normal.diagonal())  # two templates may be the same
        # An ordering for symmetric matrices: with that for others, the factors of a patch of 3400 pixels took
        # more than 20 GB.
        factors = scipy.sparse.linalg.splu(
            (self.normal + ridge).tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.01,
            options={"SymmetricMode": True},
        )
        return factors.solve(self.right)

    def errors(self) -> np.ndarray:
        """Return standard errors, the root of the diagonal of ``N^-1 M N^-1``.

        Templates whose correlation is below `_LINKED` are taken as independent. Where more than `_LARGEST`
        are linked, the errors of some at a time are those in a fit of them and of what is within `_STEPS`
        links of them.
        """
        n, labels = scipy.sparse.csgraph.connected_components(
            abs(self.correlation()) > _LINKED, directed=False
        )
        variance = np.empty(len(labels))
        order = np.argsort(labels, kind="stable")
        normal, noise = self.normal[order][:, order], self.noise[order][:, order]
        ends = np.searchsorted(labels[order], np.arange(n), side="right")
        for members in map(slice, [0, *ends[:-1]], ends):
            variance[order[members]] = _variances(normal[members, members], noise[members, members])
        return np.sqrt(np.maximum(variance, 0.0))


def _correlation(normal: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return the correlations of templates with some normal matrix, 0 on the diagonal."""
    scale = scipy.sparse.diags_array(1.0 / np.sqrt(normal.diagonal()))
    result = (scale @ normal @ scale).tocsr()
    result.setdiag(0.0)
    return result


def _variances(normal: scipy.sparse.csr_array, noise: scipy.sparse.csr_array) -> np.ndarray:
    """Return the diagonal of ``N^-1 M N^-1`` of templates that are linked."""
    n = normal.shape[0]
    if n <= _LARGEST:
        inverse = np.linalg.pinv(normal.toarray(), hermitian=True)
        return np.einsum("ij,ji->i", inverse @ noise.toarray(), inverse)
    linked = abs(_correlation(normal)) > _LINKED
    order = scipy.sparse.csgraph.reverse_cuthill_mckee(linked, symmetric_mode=True)
    variance = np.empty(n)
    for own in np.array_split(order, math.ceil(4 * n / _LARGEST)):
        near = np.zeros(n, dtype=bool)
        near[own] = True
        for _ in range(_STEPS):
            near |= linked @ near
        among = np.flatnonzero(near)
        inverse = np.linalg.pinv(normal[among][:, among].toarray(), hermitian=True)
        inverse = inverse[np.searchsorted(among, own)]
        variance[own] = ((inverse @ noise[among][:, among].toarray()) * inverse).sum(axis=1)
    return variance


def normal_equations(templates: Sequence[Stamp], coadd: Coadd) -> JointFit:
    """Set up the fit of templates T to a coadd D with weights W as if its noise were white and of weight W.

    Parameters
    ----------
    templates : `~collections.abc.Sequence` [`Stamp`]
        Images of unit parameters.
    coadd : `Coadd`
        Data and weights.

    Returns
    -------
    fit : `JointFit`
        ``N = T^T W T``, ``b = T^T W D``, and N for the covariance of b.
    """
    normal = _products(templates, np.sqrt(coadd.weight), np.ones((1, 1)))
    weighted = coadd.weight * coadd.image
    right = np.array([(t.array * weighted[t.slices]).sum() for t in templates])
    return JointFit(normal, right, normal)


def _products(templates: Sequence[Stamp], scale: np.ndarray, smooth: np.ndarray) -> scipy.sparse.csr_array:
    """Return ``T^T S C S T`` of templates T, with S a factor of each pixel, (y, x), and C the convolution
    with ``smooth``, (k, k), which is its own mirror image.

    The templates of a box are taken together, one pair of overlapping boxes at a time. What is below
    `_NEGLIGIBLE` in units of the diagonal is taken as 0, so that the matrix stays sparse.
    """
    boxes: dict[tuple[int, int, int, int], list[int]] = {}
    for k, stamp in enumerate(templates):
        ys, xs = stamp.slices
        boxes.setdefault((ys.start, ys.stop, xs.start, xs.stop), []).append(k)
    groups = list(boxes.values())
    y0, y1, x0, x1 = np.array(list(boxes), dtype=int).reshape(-1, 4).T
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for n, group in enumerate(groups):
        smoothed = [_smoothed(templates[k], scale, smooth) for k in group]
        ys, xs = smoothed[0].slices
        own = np.stack([stamp.array for stamp in smoothed]) * scale[ys, xs]
        near = (y0[n:] < ys.stop) & (y1[n:] > ys.start) & (x0[n:] < xs.stop) & (x1[n:] > xs.start)
        for m in (n + np.flatnonzero(near)).tolist():
            top, bottom = max(ys.start, int(y0[m])), min(ys.stop, int(y1[m]))
            left, right = max(xs.start, int(x0[m])), min(xs.stop, int(x1[m]))
            first = own[:, top - ys.start : bottom - ys.start, left - xs.start : right - xs.start]
            second = np.stack(
                [
                    templates[k].array[top - y0[m] : bottom - y0[m], left - x0[m] : right - x0[m]]
                    for k in groups[m]
                ]
            )
            block = first.reshape(len(first), -1) @ second.reshape(len(second), -1).T
            row, column = (index.ravel() for index in np.meshgrid(group, groups[m], indexing="ij"))
            parts.append((block.ravel(), row, column))
            if m > n:
                parts.append((block.ravel(), column, row))
    if not parts:
        return scipy.sparse.csr_array((len(templates), len(templates)))
    values, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    norm = np.sqrt(np.bincount(rows, np.where(rows == columns, values, 0.0), len(templates)))
    kept = np.abs(values) > _NEGLIGIBLE * norm[rows] * norm[columns]
    shape = (len(templates), len(templates))
    return scipy.sparse.coo_array((values[kept], (rows[kept], columns[kept])), shape=shape).tocsr()


def _smoothed(stamp: Stamp, scale: np.ndarray, smooth: np.ndarray) -> Stamp:
    """Multiply a stamp with its part of an image, and convolve it with a kernel."""
    scaled = stamp.array * scale[stamp.slices]
    if smooth.size == 1:
        return stamp._replace(array=scaled)
    half = smooth.shape[0] // 2
    return Stamp(stamp.y0 - half, stamp.x0 - half, convolve_full(scaled, smooth)).cropped(scale.shape)


def render(templates: Sequence[Stamp], amplitudes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Add up templates times amplitudes on an image of some shape."""
    image = np.zeros(shape)
    for template, amplitude in zip(templates, amplitudes, strict=True):
        image[template.slices] += amplitude * template.array
    return image
