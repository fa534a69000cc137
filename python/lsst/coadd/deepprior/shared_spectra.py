# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Fourier transforms that the visits of a pass share: that of the model, and that of the sum of adjoints."""

from __future__ import annotations

__all__ = ("AdjointSum", "ModelSpectra")

import torch

from .operators import CellConvolution


class ModelSpectra:
    """A model as visits see it, whose transform is made once for all visits of equal tiles.

    Parameters
    ----------
    model : `torch.Tensor`, (..., y, x)
        The model on the canvas. Only the transform of a single image is kept, since those of many take more
        memory than it saves time.
    """

    def __init__(self, model: torch.Tensor) -> None:
        self._model = model
        self._shared = model[..., 0, 0].numel() == 1
        self._tiling: tuple[object, ...] | None = None
        self._spectra: torch.Tensor | None = None

    def seen_by(self, kernel: CellConvolution) -> torch.Tensor:
        """Return the image K u that an operator makes of the model, (..., y, x)."""
        if not self._shared:
            return kernel.forward(self._model)
        if self._tiling != kernel.tiling:
            self._spectra, self._tiling = None, kernel.tiling
            self._spectra = kernel.spectra(self._model)
        return kernel.forward(self._model, self._spectra)


class AdjointSum:
    """The sum of the adjoints of visits, ``sum_t K_t^T y_t``, which is transformed back once.

    Parameters
    ----------
    like : `torch.Tensor`, (set, y, x)
        A tensor of the shape of the sum. Spectra are added up for a single set only, for the sake of memory.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._sum = torch.zeros_like(like)
        self._shared = len(like) == 1
        self._kernel: CellConvolution | None = None
        self._spectra: torch.Tensor | None = None

    def add(self, kernel: CellConvolution, chosen: torch.Tensor, image: torch.Tensor) -> None:
        """Add ``K^T y`` to some sets.

        Parameters
        ----------
        kernel : `~lsst.coadd.deepprior.operators.CellConvolution`
            The operator K.
        chosen : `torch.Tensor`, (chosen,), int
            The sets.
        image : `torch.Tensor`, (chosen, y, x)
            The images y.
        """
        if not self._shared:
            self._sum[chosen] += kernel.adjoint(image)
            return
        if self._spectra is None or self._kernel is None or self._kernel.tiling != kernel.tiling:
            self._transform_back()
            self._kernel, self._spectra = kernel, kernel.no_spectra(image)
        kernel.add_adjoint(image, self._spectra)

    def total(self) -> torch.Tensor:
        """Return the sum, (set, y, x)."""
        self._transform_back()
        return self._sum

    def _transform_back(self) -> None:
        """Move what was added up in spectra to the sum."""
        if self._kernel is not None and self._spectra is not None:
            self._sum += self._kernel.adjoint_of(self._spectra, self._sum)
        self._kernel = self._spectra = None
