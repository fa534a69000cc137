# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""From PSFs that were learned to the datasets in which they are published."""

from __future__ import annotations

__all__ = ("refined_visits",)

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import astropy.units as u
import numpy as np

from lsst.images import Image, Mask, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images.cells import CellCoadd, PatchDefinition

from .cells import make_cell_psf
from .provenance import make_provenance
from .warps import WarpInfo, psf_shapes

if TYPE_CHECKING:
    from .psf_refinement import PsfRefinement

_SCHEMA = MaskSchema([MaskPlane("NO_DATA", "No data: this dataset has no pixels.")])


def refined_visits(
    warps: Sequence[WarpInfo],
    refinement: PsfRefinement,
    patch: PatchDefinition,
    sky_projection: SkyProjection[TractFrame],
    metadata: Mapping[str, str | int | float],
) -> tuple[list[WarpInfo], list[CellCoadd]]:
    """Make the datasets of the PSFs of the visits of a patch.

    Parameters
    ----------
    warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.WarpInfo`]
        The visits.
    refinement : `~lsst.coadd.deepprior.psf_refinement.PsfRefinement`
        What was learned of them.
    patch : `lsst.images.cells.PatchDefinition`
        Definition of the patch.
    sky_projection : `lsst.images.SkyProjection`
        Projection of the tract.
    metadata : `~collections.abc.Mapping`
        Versions and settings to be stored with all of them.

    Returns
    -------
    warps : `list` [`~lsst.coadd.deepprior.warps.WarpInfo`]
        The visits, with the shapes of the new PSFs.
    psfs : `list` [`lsst.images.cells.CellCoadd`]
        One-visit cell coadds of the whole patch whose pixels are NaN; what they are for are their PSF, their
        provenance and their metadata: the flags (``psf_not_anchored`` and so on, 0 or 1), the errors, and
        flux scale, shift and background of the visit.

    Raises
    ------
    ValueError
        Raised if the PSFs are those of another number of visits.
    """
    if len(warps) != len(refinement.stamps):
        raise ValueError(f"The PSFs of {len(refinement.stamps)} visits are not those of {len(warps)}.")
    shape = tuple(patch.cells.bbox.shape)
    # One pixel that is seen as many: a hundred visits without pixels need no memory.
    nothing = np.broadcast_to(np.float32(np.nan), shape)
    mask = Mask(schema=_SCHEMA, bbox=patch.cells.bbox)
    mask.set("NO_DATA", np.ones(shape, dtype=bool))
    infos, psfs = [], []
    for index, (warp, stamps) in enumerate(zip(warps, refinement.stamps, strict=True)):
        info = dataclasses.replace(warp, psf_shapes=psf_shapes(stamps))
        has_psf = np.isfinite(stamps).all(axis=(2, 3))[None]
        psf = CellCoadd(
            Image(nothing, bbox=patch.cells.bbox, unit=u.nJy, sky_projection=sky_projection),
            mask=mask,
            variance=Image(nothing, bbox=patch.cells.bbox, unit=u.nJy**2),
            band=warp.band,
            psf=make_cell_psf(stamps, patch.cells),
            patch=patch,
            provenance=make_provenance(
                [info],
                patch,
                contributes=has_psf,
                weight=has_psf.astype(float),
                overlap_fraction=has_psf.astype(float),
                unmasked_fraction=has_psf.astype(float),
            ),
        )
        psf.metadata.update(
            {
                **metadata,
                "psf_n_stars": len(refinement.stars),
                **{f"psf_{name}": int(flag) for name, flag in refinement.flags(index).items()},
                **_known(
                    psf_fwhm_relative_error=refinement.fwhm_error[index],
                    psf_ellipticity_error=refinement.ellipticity_error[index],
                ),
                "flux_scale": float(refinement.flux_scale[index]),
                "shift_x_pixels": float(refinement.shift[index, 0]),
                "shift_y_pixels": float(refinement.shift[index, 1]),
                "background_nJy": float(refinement.background[index]),
            }
        )
        infos.append(info)
        psfs.append(psf)
    return infos, psfs


def _known(**values: float) -> dict[str, float]:
    """Return the values that are not NaN, which metadata cannot hold."""
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}
