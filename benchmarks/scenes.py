# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Scenes of the benchmark as arrays: what methods read. It imports nothing that they do not need."""

from __future__ import annotations

__all__ = ("CUTOUT", "MARGIN", "TARGET_SIGMA", "BenchScene")

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout

if TYPE_CHECKING:
    from astropy.table import Table

TARGET_SIGMA = 0.8
"""Sigma in pixels of the Gaussian PSF at which all methods are compared."""

CUTOUT = (slice(64, 192), slice(64, 192))
"""Rows and columns of the cutout for methods that cannot take the whole patch."""

MARGIN = 24
"""Width in pixels of the truth around the patch; PSF stamps reach 20 pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class BenchScene:
    """Visits of a patch and the sky they saw.

    Parameters
    ----------
    observations : `list` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    start : `tuple` [`int`, `int`]
        Tract pixel (y, x) of the first pixel.
    pixel_scale : `float`
        Size of a pixel in arcsec.
    catalogue : `astropy.table.Table`
        True objects, also those up to 4 arcsec outside (`lsst.coadd.deepprior.simulate.Scene.catalogue`).
    wide_truth : `numpy.ndarray`, (y, x)
        Noiseless sky at the target PSF in nJy, with a margin of `MARGIN` pixels around the patch.
    artifacts : `numpy.ndarray`, (visit, y, x), bool
        Pixels that an unmasked trail or cosmic ray touches.
    """

    observations: Sequence[Observation]
    layout: CellLayout
    start: tuple[int, int]
    pixel_scale: float
    catalogue: Table
    wide_truth: np.ndarray
    artifacts: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """Noiseless sky of the patch at the target PSF in nJy (`numpy.ndarray`, (y, x))."""
        return self.wide_truth[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def save(self, path: Path) -> None:
        """Write the scene to a file."""
        text = io.StringIO()
        self.catalogue.write(text, format="ascii.ecsv")
        layout = self.layout
        visits = {
            f"{name}_{index}": getattr(visit, name)
            for index, visit in enumerate(self.observations)
            for name in ("flux", "variance", "good", "psf", "origin", "name")
        }
        np.savez(
            path,
            n_visits=len(self.observations),
            layout=(layout.n_i, layout.n_j, layout.height, layout.width),
            start=self.start,
            pixel_scale=self.pixel_scale,
            catalogue=text.getvalue(),
            wide_truth=self.wide_truth,
            artifacts=self.artifacts,
            **visits,
        )

    @classmethod
    def load(cls, path: Path) -> BenchScene:
        """Read a scene from a file."""
        from astropy.table import Table

        with np.load(path) as file:
            visits = [
                Observation(
                    flux=file[f"flux_{n}"],
                    variance=file[f"variance_{n}"],
                    good=file[f"good_{n}"],
                    psf=file[f"psf_{n}"],
                    origin=_pair(file[f"origin_{n}"]),
                    name=str(file[f"name_{n}"]),
                )
                for n in range(int(file["n_visits"]))
            ]
            return cls(
                observations=visits,
                layout=CellLayout(*(int(value) for value in file["layout"])),
                start=_pair(file["start"]),
                pixel_scale=float(file["pixel_scale"]),
                catalogue=Table.read(str(file["catalogue"]), format="ascii.ecsv"),
                wide_truth=file["wide_truth"],
                artifacts=file["artifacts"],
            )


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
