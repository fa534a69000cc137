# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The joint linear fit of many overlapping templates to a coadd."""

from __future__ import annotations

__all__ = ("JointFit", "normal_equations", "sky_responses")

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg

from .plain_coadd import Coadd
from .psf import convolve_full
from .stamps import Stamp

_NEGLIGIBLE = 1e-7
"""Correlation of two templates below which they have nothing in common: what is left of a star of S/N 5000,
as bright as one can be without saturation, is less than a thousandth of the error of another source then."""

_LINKED = 0.01
"""Correlation of two templates above which their errors depend on each other."""

_LARGEST = 2000
"""Number of linked templates whose errors are found together: the work grows with its cube."""

_STEPS = 2
"""Links around some templates within which others are fitted with them for their errors."""


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
        return dataclasses.replace(
            normal_equations(templates, coadd), noise=_noise_products(templates, coadd)
        )

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


def sky_responses(fit: JointFit, templates: Sequence[Stamp], coadd: Coadd) -> tuple[np.ndarray, np.ndarray]:
    """Return what a unit of a constant sky adds to the right sides of a fit, and to its parameters.

    Parameters
    ----------
    fit : `JointFit`
        The fit.
    templates : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.stamps.Stamp`]
        Its templates.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Weights.

    Returns
    -------
    under, response : `numpy.ndarray`, (template,)
        Both.
    """
    under = np.array([(coadd.weight[t.slices] * t.array).sum() for t in templates])
    return under, dataclasses.replace(fit, right=under).solution()


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


def _noise_products(templates: Sequence[Stamp], coadd: Coadd) -> scipy.sparse.csr_array:
    """Return ``T^T W C W T`` in nJy^-2, the covariance of the projections of the data on templates T, with C
    of the variance and the correlation of the noise of the coadd.
    """
    return _products(templates, coadd.weight * np.sqrt(coadd.variance), coadd.noise_correlation)


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
    groups = [np.array(group) for group in boxes.values()]
    arrays = [np.stack([templates[k].array for k in group]) for group in groups]
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
            second = arrays[m][:, top - y0[m] : bottom - y0[m], left - x0[m] : right - x0[m]]
            block = (first.reshape(len(first), -1) @ second.reshape(len(second), -1).T).ravel()
            row, column = np.repeat(group, len(second)), np.tile(groups[m], len(first))
            parts.append((block, row, column))
            if m > n:
                parts.append((block, column, row))
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
