# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""From the arrays of a restoration to the coadds that are published."""

from __future__ import annotations

__all__ = ("MASK_SCHEMA", "InputPlanes", "make_coadds", "mask_shares")

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import astropy.units as u
import numpy as np

from lsst.images import Image, Mask, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images.cells import CellCoadd, CellGrid, PatchDefinition

from .aperture_corrections import average_corrections, restored_corrections
from .cells import fill_cells, make_cell_field, make_cell_psf
from .provenance import make_provenance
from .warps import Warp, WarpInfo

if TYPE_CHECKING:
    from .restore import Restoration

MASK_SCHEMA = MaskSchema(
    [
        MaskPlane("NO_DATA", "No input visit has a good pixel here."),
        MaskPlane("SAT", "At least one input visit was saturated here."),
        MaskPlane("CR", "A cosmic ray was found here in at least one input visit."),
        MaskPlane("INTRP", "At least one input visit was interpolated here."),
        MaskPlane(
            "CLIPPED",
            "At least one input visit was rejected here as an outlier. CLIPPED always implies REJECTED.",
        ),
        MaskPlane(
            "REJECTED",
            "At least one input visit was left out here, since it was masked or an outlier. "
            "REJECTED always implies INEXACT_PSF.",
        ),
        MaskPlane(
            "INEXACT_PSF",
            "The visits that contribute here to the residual coadd are not all that contribute to its PSF.",
        ),
        MaskPlane(
            "SENSOR_EDGE",
            "An input visit is not in the residual coadd of this cell, since its border lies in the cell.",
        ),
        MaskPlane(
            "FEW_VISITS",
            "Fewer visits have a good pixel in this cell than the configuration asks for.",
        ),
        MaskPlane("DETECTED", "Pixel is part of a detected source; the restoration itself never sets it."),
        MaskPlane(
            "PRIOR_CARRIED",
            "The prior, and not the data, carries the structure of the restored image here: no visit has a "
            "good pixel, or what light the data has is too faint to say where it belongs, and brighter than "
            "the variance plane answers for.",
        ),
    ]
)
"""Mask planes of ``deep_prior_coadd`` and ``deep_prior_residual`` (`lsst.images.MaskSchema`)."""

_INPUT_PLANES = {
    "SAT": ("SAT", "SATURATED"),
    "CR": ("CR", "COSMIC_RAY"),
    "INTRP": ("INTRP", "INTERPOLATED"),
}
"""Planes that are taken over from the warps, and the names they have there."""


class InputPlanes:
    """What the masks of the warps say about the pixels of a patch, gathered one warp at a time.

    Parameters
    ----------
    patch : `lsst.images.cells.PatchDefinition`
        Definition of the patch.
    """

    def __init__(self, patch: PatchDefinition) -> None:
        shape = tuple(patch.cells.bbox.shape)
        self.patch = patch
        self._n_flagged = {name: np.zeros(shape, dtype=np.uint16) for name in _INPUT_PLANES}
        self._n_expected = np.zeros(shape, dtype=np.uint16)
        self._n_rejected = np.zeros(shape, dtype=np.uint16)

    def add(self, warp: Warp, bad_planes: Iterable[str]) -> None:
        """Add a warp that goes into the coadd.

        Parameters
        ----------
        warp : `Warp`
            The warp.
        bad_planes : `~collections.abc.Iterable` [`str`]
            Mask planes that make a pixel unusable.
        """
        region = warp.bbox.slice_within(self.patch.cells.bbox)
        expected = warp.in_psf_cell
        for name, aliases in _INPUT_PLANES.items():
            self._n_flagged[name][region] += expected & warp.flagged(aliases)
        self._n_expected[region] += expected
        self._n_rejected[region] += expected & warp.unusable(bad_planes)

    @property
    def planes(self) -> Mapping[str, np.ndarray]:
        """Pixels with the planes SAT, CR, INTRP and REJECTED, each (y, x) bool."""
        counts = self._n_flagged | {"REJECTED": self._n_rejected}
        return {name: count > 0 for name, count in counts.items()}

    @property
    def fractions(self) -> Mapping[str, np.ndarray]:
        """Fraction of the visits with pixel and PSF that have each of these planes, (y, x) float32.

        The names are in lower case; ``rejected`` counts the visits in which the pixel is unusable. It is NaN
        where there is no such visit.
        """
        counts = self._n_flagged | {"REJECTED": self._n_rejected}
        with np.errstate(invalid="ignore"):
            return {
                name.lower(): count.astype(np.float32) / self._n_expected for name, count in counts.items()
            }


def make_coadds(
    restoration: Restoration,
    warps: Sequence[WarpInfo],
    input_planes: InputPlanes,
    *,
    sky_projection: SkyProjection[TractFrame],
    band: str,
    min_visits: int = 1,
    metadata: Mapping[str, str | int | float] | None = None,
) -> tuple[CellCoadd, CellCoadd]:
    """Make the restored coadd and the residual coadd of a patch.

    Parameters
    ----------
    restoration : `~lsst.coadd.deepprior.restore.Restoration`
        Arrays of the whole patch.
    warps : `~collections.abc.Sequence` [`WarpInfo`]
        The visits, in the order of the arrays of ``restoration``.
    input_planes : `InputPlanes`
        What the masks of these visits say.
    sky_projection : `lsst.images.SkyProjection`
        Projection of the tract.
    band : `str`
        Name of the band.
    min_visits : `int`, optional
        Cells in which fewer visits have a good pixel get the plane ``FEW_VISITS``.
    metadata : `~collections.abc.Mapping`, optional
        Versions and settings to be stored with both coadds.

    Returns
    -------
    coadd : `lsst.images.cells.CellCoadd`
        The restored image, at the target PSF.  Cells in which no visit has a good pixel are missing.
        Elsewhere, pixels without a good visit carry the model's value, the planes ``NO_DATA`` and
        ``PRIOR_CARRIED``, and the variance NaN.
    residual : `lsst.images.cells.CellCoadd`
        Coadd of data minus model, at the PSF of the plain coadd.  Cells that no visit enters are missing;
        pixels without a good visit are NaN, and have the plane ``NO_DATA``.

    Raises
    ------
    ValueError
        Raised if the restoration is not that of these visits and this patch.
    """
    patch = input_planes.patch
    grid = patch.cells
    _check_shapes(restoration, len(warps), grid)
    planes = _planes(restoration, input_planes, min_visits)

    def assemble(
        image: np.ndarray,
        variance: np.ndarray,
        psf: np.ndarray,
        no_data: np.ndarray,
        contributes: np.ndarray,
        corrections: Mapping[str, np.ndarray],
        noise: Sequence[np.ndarray] = (),
    ) -> CellCoadd:
        cell_psf = make_cell_psf(psf, grid)
        missing = fill_cells(~np.isfinite(psf).all(axis=(2, 3)), grid)
        mask = Mask(schema=MASK_SCHEMA, bbox=grid.bbox)
        for name, pixels in (planes | {"NO_DATA": no_data | missing}).items():
            mask.set(name, pixels)
        coadd = CellCoadd(
            _image(np.where(missing, np.nan, image), patch, u.nJy),
            mask=mask,
            variance=_image(np.where(missing | no_data, np.nan, variance), patch, u.nJy**2),
            noise_realizations=[_image(np.where(missing, np.nan, n), patch) for n in noise],
            mask_fractions={name: _image(share, patch) for name, share in input_planes.fractions.items()},
            sky_projection=sky_projection,
            band=band,
            psf=cell_psf,
            aperture_corrections={
                name: make_cell_field(factors, cell_psf.bounds) for name, factors in corrections.items()
            },
            patch=patch,
            provenance=make_provenance(
                warps,
                patch,
                contributes=contributes,
                weight=restoration.cell_weight,
                overlap_fraction=restoration.cell_overlap,
                unmasked_fraction=restoration.cell_good_fraction,
            ),
        )
        coadd.metadata.update(metadata or {})
        return coadd

    corrections = [warp.aperture_corrections for warp in warps]
    enters = restoration.cell_weight > 0.0
    seen_weight = np.where(enters.any(axis=0), restoration.cell_weight, restoration.cell_good_fraction)
    seen = restoration.n_good > 0
    (n_i, n_j), cell = grid.grid_size.as_tuple(), grid.cell_shape
    any_seen = seen.reshape(n_i, cell.y, n_j, cell.x).any(axis=(1, 3))
    coadd = assemble(
        restoration.image,
        restoration.variance,
        np.where(any_seen[:, :, np.newaxis, np.newaxis], restoration.target_psf, np.nan),
        ~seen,
        restoration.cell_good_fraction > 0.0,
        restored_corrections(corrections, seen_weight),
        restoration.noise_realizations,
    )
    residual = assemble(
        restoration.residual,
        restoration.residual_variance,
        restoration.residual_psf,
        ~np.isfinite(restoration.residual),
        enters,
        average_corrections(corrections, restoration.cell_weight),
        restoration.residual_noise_realizations,
    )
    return coadd, residual


def _check_shapes(restoration: Restoration, n_visits: int, grid: CellGrid) -> None:
    """Refuse a restoration of another patch or of other visits."""
    if restoration.image.shape != tuple(grid.bbox.shape):
        raise ValueError(
            f"The restored image has the shape {restoration.image.shape}, its patch {tuple(grid.bbox.shape)}."
        )
    n_cells = grid.grid_size.as_tuple()
    if restoration.cell_weight.shape != (n_visits, *n_cells):
        raise ValueError(
            f"The cell weights have the shape {restoration.cell_weight.shape}, there are {n_visits} visits "
            f"and {n_cells} cells."
        )


def _planes(restoration: Restoration, input_planes: InputPlanes, min_visits: int) -> dict[str, np.ndarray]:
    """Return the mask planes, each (y, x) bool, that both coadds share."""
    grid = input_planes.patch.cells
    reached = restoration.cell_good_fraction > 0.0
    planes = input_planes.planes
    rejected = planes["REJECTED"] | restoration.clipped
    return {
        **planes,
        "CLIPPED": restoration.clipped,
        "REJECTED": rejected,
        "INEXACT_PSF": restoration.masked | rejected,
        "SENSOR_EDGE": fill_cells(np.any(reached & (restoration.cell_weight == 0.0), axis=0), grid),
        "FEW_VISITS": fill_cells(reached.sum(axis=0) < min_visits, grid),
        "PRIOR_CARRIED": restoration.prior_carried | (restoration.n_good == 0),
    }


def mask_shares(coadd: CellCoadd) -> dict[str, float]:
    """Return the share of the pixels of a coadd that have each of its mask planes, by name."""
    return {name: float(coadd.mask.get(name).mean()) for name in sorted(coadd.mask.schema.names)}


def _image(array: np.ndarray, patch: PatchDefinition, unit: u.UnitBase | None = None) -> Image:
    return Image(array.astype(np.float32, copy=False), bbox=patch.cells.bbox, unit=unit)
