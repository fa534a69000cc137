# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""One visit as the numerics see it: plain arrays, no file format, no units library."""

from __future__ import annotations

__all__ = ("Observation",)

import dataclasses
import math

import numpy as np

from .psf import fwhm


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """One visit of a patch: pixels, which of them are good, and PSFs.

    Parameters
    ----------
    flux : `numpy.ndarray`, (y, x), float32
        Background-subtracted flux in nJy.
    variance : `numpy.ndarray`, (y, x), float32
        Variance in nJy^2; read only where ``good``.
    good : `numpy.ndarray`, (y, x), bool
        Pixels that may be used.
    psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF stamps of all cells of the patch, centred on the central pixel of an odd-sized stamp, unit sum;
        NaN in cells where the visit has no PSF.
    origin : `tuple` [`int`, `int`]
        Position ``(y0, x0)`` of ``flux[0, 0]`` in the array of the patch.
    name : `str`
        What messages call the visit.
    noise : `numpy.ndarray`, (y, x), float32, optional
        Image of noise alone in nJy, resampled like ``flux``.
    sampling : `int`, optional
        Step in pixels, along both axes, from one pixel that the visit has to the next; those in between are
        never good. It is 1 but on a grid finer than the visit's own (`~lsst.coadd.deepprior.finer`).

    Raises
    ------
    ValueError
        Raised if the shapes do not fit together, or if a good pixel has no finite flux or no positive
        variance.
    """

    flux: np.ndarray
    variance: np.ndarray
    good: np.ndarray
    psf: np.ndarray
    origin: tuple[int, int]
    name: str
    noise: np.ndarray | None = None
    sampling: int = 1

    def __post_init__(self) -> None:
        if (
            self.flux.ndim != 2
            or self.variance.shape != self.flux.shape
            or self.good.shape != self.flux.shape
        ):
            raise ValueError(
                f"{self.name}: flux {self.flux.shape}, variance {self.variance.shape} and good "
                f"{self.good.shape} must be images of one shape."
            )
        if self.noise is not None and self.noise.shape != self.flux.shape:
            raise ValueError(
                f"{self.name}: the noise image is {self.noise.shape} and the flux {self.flux.shape}; they "
                "must be equal."
            )
        if self.psf.ndim != 4 or self.psf.shape[2] != self.psf.shape[3] or self.psf.shape[2] % 2 == 0:
            raise ValueError(
                f"{self.name}: PSF stamps must have the shape (cell_i, cell_j, k, k) with odd k, "
                f"not {self.psf.shape}."
            )
        if not np.all(np.isfinite(self.flux[self.good])):
            raise ValueError(f"{self.name}: a pixel that is called good has a flux that is not finite.")
        if not np.all(self.variance[self.good] > 0.0):
            raise ValueError(f"{self.name}: a pixel that is called good has a variance that is not positive.")

    @property
    def has_psf(self) -> np.ndarray:
        """Cells in which the visit has a PSF (`numpy.ndarray`, (cell_i, cell_j), bool)."""
        return np.isfinite(self.psf).all(axis=(2, 3))

    def seeing(self) -> float:
        """Return the FWHM of the PSF in the middle one of its cells in pixels, NaN without any.

        Raises
        ------
        ValueError
            Raised if the PSF is flat.
        """
        cells = np.argwhere(self.has_psf)
        try:
            return fwhm(self.psf[tuple(cells[len(cells) // 2])]) if len(cells) else math.nan
        except ValueError as err:
            raise ValueError(f"{self.name}: {err}") from err
