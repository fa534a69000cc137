# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Data kernels and operators of the visits, of which some are kept between passes."""

from __future__ import annotations

__all__ = ("VisitKernels",)

import numpy as np
import torch

from .observation import Observation
from .operators import CellConvolution, CellLayout
from .psf import data_kernel

_KERNEL_CACHE_BYTES = 256 * 2**20
"""Memory that kernels of visits may take; others are made anew each time."""

_OPERATOR_CACHE_BYTES = 128 * 2**20
"""The same for their transfer functions, which take more."""


class VisitKernels:
    """Makes the kernels of the visits of a patch, and keeps as many as there is memory for.

    Parameters
    ----------
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    margin : `int`
        Width of the canvas around the patch in pixels.
    sigma : `float`
        Sigma of the target PSF in pixels.
    device, dtype
        Where and how to compute.
    """

    def __init__(
        self, layout: CellLayout, margin: int, sigma: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layout = layout
        self._margin = margin
        self._sigma = sigma
        self._device = device
        self._dtype = dtype
        self._kept_kernels: dict[int, torch.Tensor] = {}
        self._kept_operators: dict[int, CellConvolution] = {}

    def kept(self, index: int) -> torch.Tensor | None:
        """Return the data kernels of a visit, (i, j, k, k), `None` if they are not kept."""
        return self._kept_kernels.get(index)

    def kernels(self, index: int, observation: Observation) -> torch.Tensor:
        """Return the data kernels of a visit; a cell without a PSF borrows that of the nearest cell.

        Parameters
        ----------
        index : `int`
            Number of the visit.
        observation : `~lsst.coadd.deepprior.observation.Observation`
            The visit.

        Returns
        -------
        kernels : `torch.Tensor`, (i, j, k, k)
            The kernels.
        """
        if index in self._kept_kernels:
            return self._kept_kernels[index]
        filled, has_psf = observation.psf.copy(), observation.has_psf
        have = np.argwhere(has_psf)
        for i, j in np.argwhere(~has_psf):
            nearest = have[np.argmin(((have - (i, j)) ** 2).sum(axis=1))]
            filled[i, j] = filled[nearest[0], nearest[1]]
        constant = bool((filled == filled[:1, :1]).all())
        kernels = data_kernel(filled[:1, :1] if constant else filled, self._sigma)
        result = torch.as_tensor(kernels, dtype=self._dtype, device=self._device).expand(filled.shape)
        kept = sum(other.untyped_storage().nbytes() for other in self._kept_kernels.values())
        if kept + result.untyped_storage().nbytes() <= _KERNEL_CACHE_BYTES:
            self._kept_kernels[index] = result
        return result

    def operator(self, index: int, observation: Observation, used: np.ndarray) -> CellConvolution:
        """Return the operator of a visit.

        Parameters
        ----------
        index : `int`
            Number of the visit.
        observation : `~lsst.coadd.deepprior.observation.Observation`
            The visit.
        used : `numpy.ndarray`, (i, j), bool
            Cells in which the operator must be right.

        Returns
        -------
        operator : `~lsst.coadd.deepprior.operators.CellConvolution`
            The operator.
        """
        if index in self._kept_operators:
            return self._kept_operators[index]
        operator = CellConvolution(self.kernels(index, observation), self._layout, self._margin, used)
        kept = sum(other.nbytes for other in self._kept_operators.values())
        if kept + operator.nbytes <= _OPERATOR_CACHE_BYTES:
            self._kept_operators[index] = operator
        return operator
