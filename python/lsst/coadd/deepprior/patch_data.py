# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The visits of a patch on their canvas, read one at a time, and the sums over them."""

from __future__ import annotations

__all__ = ("NothingToRestoreError", "PatchData")

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional

from .gaps import between_samples, filled_from_neighbours
from .groups import deal_groups, lower_median, median_of
from .observation import Observation
from .operators import CellConvolution, CellLayout, gram_kernels
from .parallel import by_rows, give_freed_memory_back
from .shared_spectra import AdjointSum, ModelSpectra
from .statistics import SetStatistics, StatisticsSums, VisitSets, VisitTensors
from .visit_kernels import VisitKernels

_FREED_IMAGES, _FREED_BYTES = 64, 2**28
"""Growth of the process, in images of the canvas and at least in bytes, from which freed memory is given back
between two visits: twice what the work on one needs."""


class NothingToRestoreError(ValueError):
    """Raised when there is no visit, or none with a good pixel in a cell with a PSF."""


def _scale(variance: torch.Tensor, prediction: torch.Tensor, error: float) -> torch.Tensor:
    """Return the standard deviation of pixels with a relative error of their prediction."""
    return torch.mul(prediction, error).square_().add_(variance).sqrt_()


class PatchData:
    """The visits of a patch on their canvas, read one at a time.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits; indexed one at a time, so a lazy sequence may read them from disk.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    sigma : `float` or `~collections.abc.Callable`
        Sigma of the target PSF in pixels, or a function of the FWHM of the visits in pixels, (visit,), those
        that have one, that returns it.
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
        sigma: float | Callable[[np.ndarray], float],
        *,
        margin: int = 16,
        huber_delta: float = 1.5,
        psf_error: float = 0.01,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout = layout
        self.margin = margin
        self.huber_delta = huber_delta
        self.psf_error = psf_error
        self.device = torch.device(device)
        self.dtype = dtype
        self.shape = layout.canvas_shape(margin)
        self.observations = observations
        """The visits, indexed one at a time."""
        self.names: list[str] = []
        """Names of the visits."""
        self._noise_of_gradient: tuple[torch.Tensor, torch.Tensor] | None = None
        self._statistics: SetStatistics | None = None
        self._median: torch.Tensor | None = None
        n_visits = len(observations)
        self.weight = np.zeros((n_visits, layout.n_i, layout.n_j))
        """Inverse sky variance of visit and cell, 0 without a good pixel ((visit, i, j), 1/nJy^2). On a finer
        grid it is shared between the pixels that a good one stands for."""
        self.good_fraction = np.zeros_like(self.weight)
        """Fraction of the pixels of the cell that are good, of those the visit can have ((visit, i, j))."""
        self.overlap = np.zeros_like(self.weight)
        """Fraction of the cell that the visit's box covers ((visit, i, j))."""
        self.sampling = observations[0].sampling if n_visits else 1
        """Step in pixels from one pixel that visits have to the next, 1 but on a grid finer than theirs."""
        self.seeing = np.full(n_visits, np.nan)
        """FWHM of the PSF of every visit in pixels, in the middle one of its cells."""
        for index, observation in enumerate(observations):
            self._add(index, observation)
        known = self.seeing[np.isfinite(self.seeing)]
        if len(known) == 0:
            raise NothingToRestoreError("No visit of the patch has a PSF in any cell.")
        self.sigma = sigma(known) if callable(sigma) else sigma
        self._kernels = VisitKernels(layout, margin, self.sigma, self.device, dtype)
        if not np.any(self.weight > 0.0):
            raise NothingToRestoreError("No visit of the patch has a good pixel in a cell with a PSF.")
        depth = (self.weight * self.good_fraction).sum(axis=(1, 2))
        self.group = deal_groups(depth, self.seeing)
        """Group of every visit, -1 for those without a good pixel ((visit,), int)."""
        self._group_gram = self._sum_gram()

    def __len__(self) -> int:
        return len(self.observations)

    def with_observations(self, observations: Sequence[Observation]) -> PatchData:
        """Return the same patch with other pixel values; masks, variances and PSFs must be the same."""
        if len(observations) != len(self):
            raise ValueError(f"{len(observations)} visits cannot stand in for {len(self)}.")
        other = copy.copy(self)
        other.observations = observations
        return other

    def with_statistics(self, statistics: SetStatistics, median: torch.Tensor) -> PatchData:
        """Return the same patch with the statistics of other pixel values, which are not read any more.

        Parameters
        ----------
        statistics : `SetStatistics`
            What `linearise` returns for all models.
        median : `torch.Tensor`, (set, y, x)
            What `lower_median` returns.
        """
        other = copy.copy(self)
        other._statistics, other._median = statistics, median
        return other

    def anew(self, observations: Sequence[Observation], layout: CellLayout | None = None) -> PatchData:
        """Return a patch of other visits, of other cells if they are given, with the same settings."""
        return PatchData(
            observations,
            self.layout if layout is None else layout,
            self.sigma,
            margin=self.margin,
            huber_delta=self.huber_delta,
            psf_error=self.psf_error,
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def n_groups(self) -> int:
        """Number of groups of visits (`int`)."""
        return int(self.group.max()) + 1

    def _add(self, index: int, observation: Observation) -> None:
        """Check a visit, and weigh it cell by cell."""
        layout = self.layout
        if observation.psf.shape[:2] != (layout.n_i, layout.n_j):
            raise ValueError(
                f"{observation.name} has PSFs for {observation.psf.shape[:2]} cells, but the patch has "
                f"({layout.n_i}, {layout.n_j})."
            )
        if observation.sampling != self.sampling:
            raise ValueError(f"{observation.name} has not the same pixels as {self.observations[0].name}.")
        y0, x0 = observation.origin
        ny, nx = observation.flux.shape
        if y0 < 0 or x0 < 0 or y0 + ny > layout.shape[0] or x0 + nx > layout.shape[1]:
            raise ValueError(f"{observation.name} reaches outside the patch of shape {layout.shape}.")
        self.names.append(observation.name)
        has_psf = observation.has_psf
        for i, j in itertools.product(range(layout.n_i), range(layout.n_j)):
            cell_y, cell_x = layout.cell_slice(i, j)
            ys = slice(max(cell_y.start - y0, 0), max(cell_y.stop - y0, 0))
            xs = slice(max(cell_x.start - x0, 0), max(cell_x.stop - x0, 0))
            good = observation.good[ys, xs]
            area = layout.height * layout.width
            self.overlap[index, i, j] = good.size / area
            if has_psf[i, j] and good.any():
                shared = self.sampling**2
                self.good_fraction[index, i, j] = shared * good.sum() / area
                median = float(np.median(observation.variance[ys, xs][good]))
                self.weight[index, i, j] = 1.0 / (shared * median)
        self.seeing[index] = observation.seeing()

    def kernel(self, index: int, observation: Observation) -> CellConvolution:
        """Make the operator of a visit, which is right where the visit has weight."""
        return self._kernels.operator(index, observation, self.weight[index] > 0.0)

    def _on_canvas(
        self, array: np.ndarray, origin: tuple[int, int], good: torch.Tensor, bad: float = 0.0
    ) -> torch.Tensor:
        """Place the array of a visit on the canvas, with a value for bad pixels, and 0 elsewhere."""
        canvas = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        y, x = origin[0] + self.margin, origin[1] + self.margin
        inside = canvas[y : y + array.shape[0], x : x + array.shape[1]]
        values = torch.as_tensor(np.ascontiguousarray(array), dtype=self.dtype, device=self.device)
        inside.copy_(torch.where(good, values, bad))
        return canvas

    @property
    def is_drawn(self) -> bool:
        """Whether its statistics are given, and its visits only say how noisy they are (`bool`)."""
        return self._statistics is not None

    def pixel_weight(self, cell_values: np.ndarray) -> np.ndarray:
        """Spread one value a cell over the pixels of the patch ((i, j) to (y, x))."""
        return np.repeat(np.repeat(cell_values, self.layout.height, axis=0), self.layout.width, axis=1)

    @property
    def sampled(self) -> tuple[slice, slice]:
        """Pixels of the canvas, (y, x), that stand for those of the visits in the patch."""
        ny, nx = self.layout.shape
        first = self.margin + (self.sampling - 1) // 2
        return slice(first, self.margin + ny, self.sampling), slice(first, self.margin + nx, self.sampling)

    def visit(self, index: int) -> VisitTensors:
        """Read one visit."""
        return self._tensors(index, self.observations[index])

    def _tensors(self, index: int, observation: Observation) -> VisitTensors:
        """Put a visit on the canvas."""
        origin, shape = observation.origin, observation.good.shape
        good = torch.as_tensor(np.ascontiguousarray(observation.good), device=self.device)
        weight = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        y, x = origin[0] + self.margin, origin[1] + self.margin
        weight[y : y + shape[0], x : x + shape[1]] = good
        cell_weight = torch.as_tensor(self.weight[index], dtype=self.dtype, device=self.device)
        self._cells_of(weight).mul_(self.sampling**2 * cell_weight[:, None, :, None])
        return VisitTensors(
            flux=self._on_canvas(observation.flux, origin, good),
            variance=self._on_canvas(observation.variance, origin, good, 1.0),
            weight=weight,
            kernel=self.kernel(index, observation),
        )

    def _cells_of(self, canvas: torch.Tensor) -> torch.Tensor:
        """Return a view (cell_i, y, cell_j, x) of the patch on a canvas."""
        ny, nx = self.layout.shape
        patch = canvas[self.margin : self.margin + ny, self.margin : self.margin + nx]
        return patch.unflatten(0, (self.layout.n_i, -1)).unflatten(2, (self.layout.n_j, -1))

    def visits(self) -> Iterator[tuple[int, VisitTensors]]:
        """Iterate over visits with at least one good pixel, one in memory at a time."""
        for index, _, visit in self.read():
            yield index, visit

    def read(self, indices: Sequence[int] | None = None) -> Iterator[tuple[int, Observation, VisitTensors]]:
        """Iterate over some visits, or those with at least one good pixel, one in memory at a time."""
        if indices is None:
            indices = np.flatnonzero(self.weight.any(axis=(1, 2))).tolist()
        images = _FREED_IMAGES * self.dtype.itemsize * self.shape[0] * self.shape[1]
        for index in indices:
            give_freed_memory_back(beyond=max(images, _FREED_BYTES))
            observation = self.observations[index]
            yield index, observation, self._tensors(index, observation)

    def scale(
        self, visit: VisitTensors, prediction: torch.Tensor, psf_error: float | None = None
    ) -> torch.Tensor:
        """Return the standard deviation s of a pixel: its noise and the error of its PSF (nJy)."""
        error = self.psf_error if psf_error is None else psf_error
        return _scale(visit.variance, prediction, error)

    def _sum_gram(self) -> torch.Tensor:
        """Add up the kernels of ``K^T w K`` of the visits of every group (group, i, j, k, k)."""
        total = torch.zeros((self.n_groups, self.layout.n_i, self.layout.n_j, 1, 1), dtype=self.dtype)
        total = total.to(self.device)
        for index in np.flatnonzero(self.group >= 0).tolist():
            kernels = self._kernels.kept(index)
            if kernels is None:
                kernels = self._kernels.kernels(index, self.observations[index])
            gram = gram_kernels(kernels)
            weight = torch.as_tensor(self.weight[index], dtype=self.dtype, device=self.device)
            gram = weight[:, :, None, None] * gram
            border = (total.shape[-1] - gram.shape[-1]) // 2
            total = torch.nn.functional.pad(total, (max(-border, 0),) * 4)
            total[self.group[index]] += torch.nn.functional.pad(gram, (max(border, 0),) * 4)
        return total

    def matched_noise(self) -> torch.Tensor:
        """Return the noise of the matched image M of all visits on the canvas ((y, x), 1/nJy).

        Its variance in a cell is the central value of the kernel of A.
        """
        half = self._group_gram.shape[-1] // 2
        central = self.gram_kernel()[..., half, half].sqrt()
        layout, border = self.layout, (self.margin,) * 4
        patch = central.repeat_interleave(layout.height, dim=0).repeat_interleave(layout.width, dim=1)
        return torch.nn.functional.pad(patch[None, None], border, mode="replicate")[0, 0]

    def gram_kernel(self) -> torch.Tensor:
        """Return the kernel of A of all visits in every cell ((i, j, k, k), 1/nJy^2)."""
        return self._group_gram.sum(dim=0)

    def noise_of_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Read the visits once for the noise that each pixel of the matched image really has.

        `matched_noise` is that of the sky where no pixel is masked. In stars there is more noise than the
        weights of the cell say.

        It is kept, since it does not depend on the pixel values.

        Returns
        -------
        variance : `torch.Tensor`, (y, x)
            Variance ``sum_t (K_t^2)^T w_t^2 m_t v_t`` of ``sum_t K_t^T w_t m_t y_t`` on the canvas, with
            K^2 the operator of the squared kernels (1/nJy^2).
        seen : `torch.Tensor`, (y, x)
            ``sum_t (K_t^2)^T w_t m_t``, the same if v were 1/w everywhere (1/nJy^2).
        """
        if self._noise_of_gradient is None:
            total = torch.zeros((2, *self.shape), dtype=self.dtype, device=self.device)
            for index, observation, visit in self.read():
                squared = self._kernels.kernels(index, observation).square()
                power = CellConvolution(squared, self.layout, self.margin, self.weight[index] > 0.0)
                noise = visit.variance.mul_(visit.weight).mul_(visit.weight)
                total += power.adjoint(torch.stack([noise, visit.weight]))
            self._noise_of_gradient = total[0], total[1]
        return self._noise_of_gradient

    def sets(self, members: torch.Tensor | None = None) -> VisitSets:
        """Read the visits once for what their masks, weights and PSFs say of sets of groups.

        Parameters
        ----------
        members : `torch.Tensor`, (set, group), bool, optional
            Which groups of visits belong to which set; the default is one set of all.

        Returns
        -------
        sets : `VisitSets`
            The sets.

        Raises
        ------
        ValueError
            Raised if ``members`` is for another number of groups.
        """
        if members is None:
            members = torch.ones(1, self.n_groups, dtype=torch.bool)
        if members.shape[-1] != self.n_groups:
            raise ValueError(
                f"The sets are made of {members.shape[-1]} groups, but the visits have {self.n_groups}."
            )
        gram = torch.stack([self._group_gram[m.nonzero()[:, 0].to(self.device)].sum(dim=0) for m in members])
        depth = torch.zeros((len(members), *self.shape), dtype=self.dtype, device=self.device)
        sensitivity = AdjointSum(depth)
        n_pixels = torch.zeros(len(members), dtype=self.dtype, device=self.device)
        for index, visit in self.visits():
            sets = self._sets_of(members, index)
            if len(sets):
                sensitivity.add(visit.kernel, sets, visit.weight.expand(len(sets), -1, -1))
                depth[sets] += visit.weight
                n_pixels[sets] += (visit.weight > 0).sum()
        return VisitSets(
            members, CellConvolution(gram, self.layout, self.margin), sensitivity.total(), depth, n_pixels
        )

    def _sets_of(self, members: torch.Tensor, visit: int) -> torch.Tensor:
        """Return the indices of the sets that a visit belongs to."""
        return members[:, int(self.group[visit])].nonzero()[:, 0].to(self.device)

    def linearise(
        self,
        sets: VisitSets,
        models: torch.Tensor,
        *,
        psf_error: float | None = None,
        coverage: torch.Tensor | None = None,
    ) -> SetStatistics:
        """Read the visits once and majorise the objective of every set at its own model.

        Parameters
        ----------
        sets : `VisitSets`
            The sets.
        models : `torch.Tensor`, (set, y, x)
            Model u_0 of every set on the canvas, in nJy.
        psf_error : `float`, optional
            Relative error of the PSF to use in place of the instance's.
        coverage : `torch.Tensor`, (set, y, x), optional
            Coverage of a model that differs little, to be taken over: a third of the work.

        Returns
        -------
        statistics : `SetStatistics`
            The statistics of the sets; those of a set depend on the data of its own visits only.
        """
        if self._statistics is not None:
            return self._statistics
        sums = StatisticsSums(models, with_coverage=coverage is None)
        error = self.psf_error if psf_error is None else psf_error

        def clip(
            prediction: torch.Tensor,
            flux: torch.Tensor,
            variance: torch.Tensor,
            residual: torch.Tensor,
            clipped: torch.Tensor,
        ) -> None:
            limit = _scale(variance, prediction, error).mul_(self.huber_delta)
            torch.sub(flux, prediction, out=residual)
            torch.clamp(residual, -limit, limit, out=clipped)

        every = ModelSpectra(models)
        for index, visit in self.visits():
            chosen = self._sets_of(sets.members, index)
            if len(chosen) == 0:
                continue
            if len(chosen) == len(models):
                prediction = every.seen_by(visit.kernel)
            else:
                prediction = visit.kernel.forward(models[chosen])
            residual, clipped = torch.empty_like(prediction), torch.empty_like(prediction)
            by_rows(clip, prediction, visit.flux, visit.variance, residual, clipped)
            sums.add(visit, chosen, prediction, clipped, residual)
        return self.without_gaps(sums.statistics(sets, models, coverage))

    def lower_median(self, sets: VisitSets) -> torch.Tensor:
        """Return the pixel-wise lower median of the good pixels of every set of visits.

        It is a start that positive outliers (cosmic rays, satellites) in fewer than half of the visits cannot
        reach: the median over the groups of the set, each the median of its visits. Pixels of the patch
        without a good visit, like saturated cores, take three quarters of their largest neighbour.

        Returns
        -------
        median : `torch.Tensor`, (set, y, x)
            nJy, 0 far from all good pixels of a set.
        """
        if self._median is not None:
            return self._median
        return self.median_of_groups(
            sets,
            [
                lower_median(
                    torch.where(visit.weight > 0, visit.flux, torch.nan)
                    for _, _, visit in self.read(np.flatnonzero(self.group == group).tolist())
                )
                for group in range(self.n_groups)
            ],
        )

    def median_of_groups(self, sets: VisitSets, of_groups: list[torch.Tensor]) -> torch.Tensor:
        """Return the `lower_median` of sets from that of every group, (y, x), which is NaN without data."""
        median = torch.stack(
            [
                median_of([image for image, member in zip(of_groups, members, strict=True) if member])
                for members in sets.members.tolist()
            ]
        )
        if self.sampling > 1:
            median = between_samples(median, self.sampling)
        ny, nx = self.layout.shape
        patch = median[:, self.margin : self.margin + ny, self.margin : self.margin + nx]
        patch[...] = filled_from_neighbours(patch, self.margin)
        return median.nan_to_num(0.0)

    def without_gaps(self, statistics: SetStatistics) -> SetStatistics:
        """Fill the coadds of sets between the pixels that visits have."""
        if self.sampling == 1:
            return statistics
        seen = torch.where(statistics.sets.depth > 0, statistics.coadd, torch.nan)
        return dataclasses.replace(statistics, coadd=between_samples(seen, self.sampling).nan_to_num(0.0))
