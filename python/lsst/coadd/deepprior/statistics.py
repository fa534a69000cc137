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

A visit is read once for all sets it belongs to, and dropped.
"""

from __future__ import annotations

__all__ = ("NothingToRestoreError", "PatchData", "SetStatistics", "VisitTensors", "deal_splits")

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional

from .observation import Observation
from .operators import CellConvolution, CellLayout, gram_kernels
from .psf import data_kernel


class NothingToRestoreError(ValueError):
    """Raised when no visit has a good pixel in a cell with a PSF."""


@dataclasses.dataclass(frozen=True)
class VisitTensors:
    """One visit on the canvas: pixels, weights and the operator that predicts it."""

    flux: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    """Weight of the cell where the pixel is good, else 0 (1/nJy^2)."""
    kernel: CellConvolution


@dataclasses.dataclass(frozen=True)
class SetStatistics:
    """What the numerics keep of several sets of visits; the leading dimension of all images is the set.

    Parameters
    ----------
    gram : `~lsst.coadd.deepprior.operators.CellConvolution`
        The operator A.
    matched : `torch.Tensor`, (set, y, x)
        The image M on the canvas, in 1/nJy.
    seen : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t y^_t`` with y^ the clipped data: M without what stands in for masked pixels, in
        1/nJy.
    coverage : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t K_t u_0`` over ``A u_0``: the part of the prediction of A that has data, 0 to 1.
    sensitivity : `torch.Tensor`, (set, y, x)
        ``sum_t K_t^T w_t m_t``: the inverse variance with which the set sees a pixel of the canvas (1/nJy^2).
    depth : `torch.Tensor`, (set, y, x)
        ``sum_t w_t m_t`` of the pixel itself (1/nJy^2).
    coadd : `torch.Tensor`, (set, y, x)
        Weighted mean of the clipped visits, 0 where no visit is good (nJy).
    objective : `torch.Tensor`, (set,)
        Robust objective L at the model of the linearisation, divided by the number of good pixels.
    """

    gram: CellConvolution
    matched: torch.Tensor
    seen: torch.Tensor
    coverage: torch.Tensor
    sensitivity: torch.Tensor
    depth: torch.Tensor
    coadd: torch.Tensor
    objective: torch.Tensor


class PatchData:
    """The visits of a patch on their canvas, read one at a time.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits; indexed one at a time, so a lazy sequence may read them from disk.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    sigma : `float`
        Sigma of the target PSF in pixels.
    margin : `int`
        Width of the canvas around the patch in pixels.
    huber_delta : `float`
        Clipping threshold of the residuals in standard deviations.
    psf_error : `float`
        Relative error of the PSF model, as a part of the predicted flux of a pixel.
    device, dtype
        Where and how to compute.

    Raises
    ------
    NothingToRestoreError
        Raised if no visit has a good pixel.
    ValueError
        Raised if a visit is not on the layout.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        layout: CellLayout,
        sigma: float,
        *,
        margin: int = 16,
        huber_delta: float = 1.5,
        psf_error: float = 0.01,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout = layout
        self.sigma = sigma
        self.margin = margin
        self.huber_delta = huber_delta
        self.psf_error = psf_error
        self.device = torch.device(device)
        self.dtype = dtype
        self.shape = layout.canvas_shape(margin)
        self._observations = observations
        self._kernels: list[torch.Tensor] = []
        n_visits = len(observations)
        self.weight = np.zeros((n_visits, layout.n_i, layout.n_j))
        """Inverse sky variance of visit and cell, 0 without a good pixel ((visit, i, j), 1/nJy^2)."""
        self.good_fraction = np.zeros_like(self.weight)
        """Fraction of the pixels of the cell that are good ((visit, i, j))."""
        self.overlap = np.zeros_like(self.weight)
        """Fraction of the cell that the visit's box covers ((visit, i, j))."""
        for index, observation in enumerate(observations):
            self._add(index, observation)
        if not np.any(self.weight > 0.0):
            raise NothingToRestoreError("No visit of the patch has a good pixel in a cell with a PSF.")

    def __len__(self) -> int:
        return len(self._observations)

    def with_observations(self, observations: Sequence[Observation]) -> PatchData:
        """Return the same patch with other pixel values; masks, variances and PSFs must be the same."""
        if len(observations) != len(self):
            raise ValueError(f"{len(observations)} visits cannot stand in for {len(self)}.")
        other = copy.copy(self)
        other._observations = observations
        return other

    def _add(self, index: int, observation: Observation) -> None:
        """Weigh a visit cell by cell and make its kernels."""
        layout = self.layout
        if observation.psf.shape[:2] != (layout.n_i, layout.n_j):
            raise ValueError(
                f"{observation.name} has PSFs for {observation.psf.shape[:2]} cells, but the patch has "
                f"({layout.n_i}, {layout.n_j})."
            )
        y0, x0 = observation.origin
        ny, nx = observation.flux.shape
        if y0 < 0 or x0 < 0 or y0 + ny > layout.shape[0] or x0 + nx > layout.shape[1]:
            raise ValueError(f"{observation.name} reaches outside the patch of shape {layout.shape}.")
        has_psf = observation.has_psf
        for i, j in itertools.product(range(layout.n_i), range(layout.n_j)):
            cell_y, cell_x = layout.cell_slice(i, j)
            ys = slice(max(cell_y.start - y0, 0), max(cell_y.stop - y0, 0))
            xs = slice(max(cell_x.start - x0, 0), max(cell_x.stop - x0, 0))
            good = observation.good[ys, xs]
            area = layout.height * layout.width
            self.overlap[index, i, j] = good.size / area
            if has_psf[i, j] and good.any():
                self.good_fraction[index, i, j] = good.sum() / area
                self.weight[index, i, j] = 1.0 / float(np.median(observation.variance[ys, xs][good]))
        self._kernels.append(self._fill_and_divide(observation.psf, has_psf))

    def _fill_and_divide(self, psf: np.ndarray, has_psf: np.ndarray) -> torch.Tensor:
        """Make the data kernels; a cell without a PSF, of weight 0, borrows that of the nearest cell."""
        if not has_psf.any():
            return torch.ones((*psf.shape[:2], 1, 1), dtype=self.dtype, device=self.device)
        filled = psf.copy()
        have = np.argwhere(has_psf)
        for i, j in np.argwhere(~has_psf):
            nearest = have[np.argmin(((have - (i, j)) ** 2).sum(axis=1))]
            filled[i, j] = psf[nearest[0], nearest[1]]
        first = data_kernel(filled[0, 0], self.sigma)
        kernels = np.array(
            [
                [
                    first if np.array_equal(stamp, filled[0, 0]) else data_kernel(stamp, self.sigma)
                    for stamp in row
                ]
                for row in filled
            ]
        )
        return torch.as_tensor(kernels, dtype=self.dtype, device=self.device)

    def _on_canvas(self, array: np.ndarray, origin: tuple[int, int]) -> torch.Tensor:
        """Place the array of a visit on the canvas, 0 elsewhere."""
        canvas = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        y, x = origin[0] + self.margin, origin[1] + self.margin
        canvas[y : y + array.shape[0], x : x + array.shape[1]] = torch.as_tensor(
            np.ascontiguousarray(array), dtype=self.dtype, device=self.device
        )
        return canvas

    def pixel_weight(self, cell_values: np.ndarray) -> np.ndarray:
        """Spread one value a cell over the pixels of the patch ((i, j) to (y, x))."""
        return np.repeat(np.repeat(cell_values, self.layout.height, axis=0), self.layout.width, axis=1)

    def visit(self, index: int) -> VisitTensors:
        """Read one visit."""
        observation = self._observations[index]
        good = observation.good
        y0, x0 = observation.origin
        ny, nx = good.shape
        cell_weight = self.pixel_weight(self.weight[index])[y0 : y0 + ny, x0 : x0 + nx]
        return VisitTensors(
            flux=self._on_canvas(np.where(good, observation.flux, 0.0), observation.origin),
            variance=self._on_canvas(np.where(good, observation.variance, 1.0), observation.origin),
            weight=self._on_canvas(np.where(good, cell_weight, 0.0), observation.origin),
            kernel=CellConvolution(self._kernels[index], self.layout, self.margin),
        )

    def visits(self) -> Iterator[tuple[int, VisitTensors]]:
        """Iterate over visits with at least one good pixel, one in memory at a time."""
        for index in range(len(self)):
            if self.weight[index].any():
                yield index, self.visit(index)

    def scale(
        self, visit: VisitTensors, prediction: torch.Tensor, psf_error: float | None = None
    ) -> torch.Tensor:
        """Return the standard deviation s of a pixel: its noise and the error of its PSF (nJy)."""
        error = self.psf_error if psf_error is None else psf_error
        return torch.sqrt(visit.variance + (error * prediction).square())

    def gram(self, members: torch.Tensor) -> CellConvolution:
        """Build the operator A of sets of visits.

        Parameters
        ----------
        members : `torch.Tensor`, (set, visit), bool
            Which visits belong to which set.

        Returns
        -------
        gram : `~lsst.coadd.deepprior.operators.CellConvolution`
            One operator a set.
        """
        size = 2 * max(k.shape[-1] for k in self._kernels) - 1
        total = torch.zeros(
            (members.shape[0], self.layout.n_i, self.layout.n_j, size, size),
            dtype=self.dtype,
            device=self.device,
        )
        for index, kernels in enumerate(self._kernels):
            sets = members[:, index].nonzero()[:, 0]
            if len(sets) == 0 or not self.weight[index].any():
                continue
            gram = gram_kernels(kernels)
            border = (size - gram.shape[-1]) // 2
            gram = torch.nn.functional.pad(gram, (border,) * 4)
            weight = torch.as_tensor(self.weight[index], dtype=self.dtype, device=self.device)
            total[sets] += weight[:, :, None, None] * gram
        return CellConvolution(total, self.layout, self.margin)

    def linearise(
        self,
        members: torch.Tensor,
        models: torch.Tensor,
        *,
        gram: CellConvolution | None = None,
        psf_error: float | None = None,
    ) -> SetStatistics:
        """Read the visits once and majorise the objective of every set at its own model.

        Parameters
        ----------
        members : `torch.Tensor`, (set, visit), bool
            Which visits belong to which set.
        models : `torch.Tensor`, (set, y, x)
            Model u_0 of every set on the canvas, in nJy.
        gram : `~lsst.coadd.deepprior.operators.CellConvolution`, optional
            The operator A of these sets if it has been built before.
        psf_error : `float`, optional
            Relative error of the PSF to use in place of the instance's.

        Returns
        -------
        statistics : `SetStatistics`
            The statistics of the sets; those of a set depend on the data of its own visits only.
        """
        gram = self.gram(members) if gram is None else gram
        gradient = torch.zeros_like(models)
        predicted = torch.zeros_like(models)
        sensitivity = torch.zeros_like(models)
        depth = torch.zeros_like(models)
        weighted = torch.zeros_like(models)
        objective = torch.zeros(models.shape[0], dtype=self.dtype, device=self.device)
        count = torch.zeros_like(objective)
        delta = self.huber_delta
        for index, visit in self.visits():
            sets = members[:, index].nonzero()[:, 0]
            if len(sets) == 0:
                continue
            prediction = visit.kernel.forward(models[sets])
            residual = visit.flux - prediction
            scale = self.scale(visit, prediction, psf_error)
            clipped = torch.clamp(residual, -delta * scale, delta * scale)
            gradient[sets] += visit.kernel.adjoint(visit.weight * clipped)
            predicted[sets] += visit.kernel.adjoint(visit.weight * prediction)
            sensitivity[sets] += visit.kernel.adjoint(visit.weight)
            depth[sets] += visit.weight
            weighted[sets] += visit.weight * (prediction + clipped)
            huber = (residual - 0.5 * clipped) * clipped
            objective[sets] += (visit.weight * huber).sum(dim=(-2, -1))
            count[sets] += (visit.weight > 0).sum()
        tiny = torch.finfo(self.dtype).tiny
        everywhere = gram.forward(models)
        return SetStatistics(
            gram=gram,
            matched=everywhere + gradient,
            seen=predicted + gradient,
            coverage=(predicted / everywhere.clamp_min(tiny)).clamp(0.0, 1.0),
            sensitivity=sensitivity,
            depth=depth,
            coadd=torch.where(depth > 0, weighted / depth.clamp_min(tiny), 0.0),
            objective=objective / count.clamp_min(1.0),
        )

    def lower_median(self, members: torch.Tensor) -> torch.Tensor:
        """Return the pixel-wise lower median of the good pixels of every set of visits.

        It is a start that positive outliers (cosmic rays, satellites) in fewer than half of the visits cannot
        reach. Pixels of the patch without a good visit, like saturated cores, take three quarters of their
        largest neighbour.

        Returns
        -------
        median : `torch.Tensor`, (set, y, x)
            nJy, 0 far from all good pixels of a set.
        """
        stack = torch.full((len(self), *self.shape), torch.nan, dtype=self.dtype, device=self.device)
        for index, visit in self.visits():
            stack[index] = torch.where(visit.weight > 0, visit.flux, torch.nan)
        # torch's nanmedian is the lower of the two middle values.
        median = torch.stack([stack[m].nanmedian(dim=0).values for m in members])
        ny, nx = self.layout.shape
        patch = median[:, self.margin : self.margin + ny, self.margin : self.margin + nx]
        for _ in range(self.margin):
            filled = torch.nn.functional.max_pool2d(patch.nan_to_num(-torch.inf), 3, stride=1, padding=1)
            patch[...] = torch.where(patch.isnan() & filled.isfinite(), 0.75 * filled, patch)
        return median.nan_to_num(0.0)


def deal_splits(
    n_visits: int, n_splits: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal visits to the two sides of several splits, one for the encoder and one for the loss.

    Every third visit is left out for the loss (at least one), such that all visits are left out equally
    often; two to four visits give every leave-one-out split.

    Parameters
    ----------
    n_visits : `int`
        Number of visits, at least 2.
    n_splits : `int`
        Number of splits wanted.
    generator : `torch.Generator`
        Source of random numbers.

    Returns
    -------
    encoder, loss : `torch.Tensor`, (split, visit), bool
        The two sides of every split; they share no visit.
    """
    if n_visits < 2:
        raise ValueError("A split needs at least two visits.")
    n_loss = 1 if n_visits < 5 else max(1, round(n_visits / 3))
    if n_visits < 5:
        n_splits = n_visits
    loss = torch.zeros(n_splits, n_visits, dtype=torch.bool)
    times = torch.zeros(n_visits)
    for split in range(n_splits):
        order = torch.argsort(times + 0.5 * torch.rand(n_visits, generator=generator))
        loss[split, order[:n_loss]] = True
        times += loss[split]
    return ~loss, loss
