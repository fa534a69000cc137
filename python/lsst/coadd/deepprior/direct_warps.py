# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps of a full Science Pipelines installation: ``direct_warp`` (an afw ``ExposureF``) and its companions.

Only `warp_from_exposure` and `patch_from_skymap` touch afw and skymap objects, and only those that they are
given; all else works on arrays.
"""

from __future__ import annotations

__all__ = (
    "MaskBits",
    "PatchGeometry",
    "assemble_warp",
    "cells_of_patch",
    "patch_from_skymap",
    "stack_stamps",
    "warp_from_exposure",
)

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import astropy.units as u
import numpy as np

from lsst.images import (
    YX,
    Box,
    Image,
    Mask,
    MaskPlane,
    MaskSchema,
    NoOverlapError,
    Polygon,
    SkyProjection,
    TractFrame,
)
from lsst.images.cells import CellGrid, CellGridBounds, PatchDefinition

from .cells import cut_into_cells, make_cell_psf
from .stack_imports import import_from_stack
from .warps import InvalidWarpError, Warp

MASKED_FRACTION_PLANE = "BAD"
"""Plane of pixels into which too many masked pixels were resampled."""


@dataclasses.dataclass(frozen=True, eq=False)
class PatchGeometry:
    """Where a patch lies, as the sky map says.

    Parameters
    ----------
    patch : `lsst.images.cells.PatchDefinition`
        Identifiers and cell grid of the patch.
    sky_projection : `lsst.images.SkyProjection`
        Projection of the tract.
    """

    patch: PatchDefinition
    sky_projection: SkyProjection[TractFrame]


@dataclasses.dataclass(frozen=True, eq=False)
class MaskBits:
    """A mask as afw stores it.

    Parameters
    ----------
    bits : `numpy.ndarray`, (y, x), int32
        Bits of the pixels.
    planes : `~collections.abc.Mapping` [`str`, `int`]
        Number of the bit of each plane.
    bbox : `lsst.images.Box`
        Box of ``bits`` in tract pixels.
    """

    bits: np.ndarray
    planes: Mapping[str, int]
    bbox: Box

    def pixels(self, bbox: Box) -> Iterable[tuple[str, np.ndarray]]:
        """Yield the planes that are set somewhere in a box, each with its pixels there, (y, x) bool."""
        try:
            common = self.bbox.intersection(bbox)
        except NoOverlapError:
            return
        bits = self.bits[common.slice_within(self.bbox)].astype(np.uint32)
        used = int(np.bitwise_or.reduce(bits, axis=None))
        for name, number in self.planes.items():
            if used >> number & 1:
                pixels = np.zeros(tuple(bbox.shape), dtype=bool)
                pixels[common.slice_within(bbox)] = bits >> np.uint32(number) & 1
                yield name, pixels


def cells_of_patch(outer_bbox: Box, cell_shape: YX[int], border: int) -> CellGrid:
    """Return the cells of a patch of a cell-based sky map.

    Parameters
    ----------
    outer_bbox : `lsst.images.Box`
        Outer box of the patch, with the border of its outermost cells.
    cell_shape : `lsst.images.YX` [`int`]
        Height and width of a cell without border in pixels.
    border : `int`
        Width in pixels of the border by which cells overlap their neighbours.

    Returns
    -------
    grid : `lsst.images.cells.CellGrid`
        Cells without border, as Rubin's cell coadds have them.

    Raises
    ------
    ValueError
        Raised if the patch is not a whole number of cells.
    """
    bbox = outer_bbox.dilated_by(-border)
    if bbox.y.size % cell_shape.y or bbox.x.size % cell_shape.x:
        raise ValueError(
            f"The patch {outer_bbox} of the sky map, less a border of {border} pixels, is not a whole number "
            f"of cells of {cell_shape.x}x{cell_shape.y} pixels."
        )
    return CellGrid(bbox=bbox, cell_shape=cell_shape)


def patch_from_skymap(sky_map: Any, skymap: str, tract: int, patch: int, cell_size: int) -> PatchGeometry:
    """Read where a patch lies from a sky map.

    Parameters
    ----------
    sky_map : `lsst.skymap.BaseSkyMap`
        The sky map, with cells or without.
    skymap : `str`
        Its name.
    tract, patch : `int`
        IDs of the tract and the patch.
    cell_size : `int`
        Largest height and width in pixels of the cells that a patch of a sky map without cells is cut into
        (see `~lsst.coadd.deepprior.cells.cut_into_cells`).

    Returns
    -------
    geometry : `PatchGeometry`
        Where the patch lies.
    """
    tract_info = sky_map[tract]
    patch_info = tract_info[patch]
    outer_bbox = Box.from_legacy(patch_info.getOuterBBox())
    if len(patch_info) == 0:  # a sky map without cells
        cells = cut_into_cells(outer_bbox, cell_size)
    else:
        width, height = patch_info.getCellInnerDimensions()
        cells = cells_of_patch(outer_bbox, YX(y=height, x=width), patch_info.getCellBorder())
    index = patch_info.getIndex()
    tract_bbox = Box.from_legacy(tract_info.getBBox())
    return PatchGeometry(
        patch=PatchDefinition(
            id=patch,
            index=YX(y=index.y, x=index.x),
            inner_bbox=Box.from_legacy(patch_info.getInnerBBox()),
            cells=cells,
        ),
        sky_projection=SkyProjection.from_legacy(
            tract_info.getWcs(), TractFrame(skymap=skymap, tract=tract, bbox=tract_bbox), tract_bbox
        ),
    )


def stack_stamps(stamps: Sequence[tuple[np.ndarray, Box] | None], grid: CellGrid) -> np.ndarray:
    """Put PSF stamps of different sizes into one array.

    Parameters
    ----------
    stamps : `~collections.abc.Sequence`
        For each cell in row-major order the stamp (y, x) and its box, in which the PSF is centred on the
        pixel (0, 0), or `None` where there is no PSF.
    grid : `lsst.images.cells.CellGrid`
        The cells.

    Returns
    -------
    stack : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Stamps with the smallest odd k that holds all of them, 0 outside of each. Those that are missing, not
        finite, or of a sum that is not positive are NaN.
    """
    valid = {
        n: stamp
        for n, stamp in enumerate(stamps)
        if stamp is not None and np.isfinite(stamp[0]).all() and stamp[0].sum() > 0.0
    }
    reach = max((max(-min(box.min), *box.max) for _, box in valid.values()), default=0)
    whole = Box.from_shape((2 * reach + 1, 2 * reach + 1), start=(-reach, -reach))
    stack = np.full((len(stamps), *whole.shape), np.nan)
    for n, (stamp, box) in valid.items():
        stack[n] = 0.0
        stack[n][box.slice_within(whole)] = stamp
    return stack.reshape(*grid.grid_size.as_tuple(), *whole.shape)


def assemble_warp(
    data_id: Any,
    geometry: PatchGeometry,
    *,
    image: Image,
    variance: Image,
    masks: Sequence[MaskBits],
    psf: np.ndarray,
    masked_fraction: Image | None = None,
    max_masked_fraction: float = 1.0,
    noise: Sequence[Image] = (),
    detectors: Mapping[int, Polygon] | None = None,
    aperture_corrections: Mapping[str, np.ndarray] | None = None,
) -> Warp:
    """Make a warp of the parts of an exposure, whatever lies beyond the patch being cut off.

    Parameters
    ----------
    data_id : `~lsst.daf.butler.DataCoordinate` or `~collections.abc.Mapping`
        Values of ``instrument``, ``visit``, ``physical_filter``, ``band`` and ``day_obs``.
    geometry : `PatchGeometry`
        Where the patch lies.
    image, variance : `lsst.images.Image`
        Flux in nJy and its variance in nJy^2.
    masks : `~collections.abc.Sequence` [`MaskBits`]
        Masks, of which each plane is set where any of them sets it.
    psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF stamps, NaN in cells without PSF.
    masked_fraction : `lsst.images.Image`, optional
        Fraction of masked pixels among those that each pixel was resampled from.
    max_masked_fraction : `float`, optional
        Largest such fraction; the plane ``BAD`` is set where it is larger or not known.
    noise : `~collections.abc.Sequence` [`lsst.images.Image`], optional
        Images of noise alone in nJy.
    detectors, aperture_corrections : `~collections.abc.Mapping`, optional
        As for `~lsst.coadd.deepprior.warps.Warp`.

    Returns
    -------
    warp : `~lsst.coadd.deepprior.warps.Warp`
        The warp.

    Raises
    ------
    InvalidWarpError
        Raised if the exposure and the patch have no pixel in common, a companion image does not cover the
        pixels that they have in common, or the data ID is incomplete.
    """
    grid = geometry.patch.cells
    try:
        identity = {
            name: data_id[name] for name in ("instrument", "visit", "physical_filter", "band", "day_obs")
        }
    except KeyError as err:
        raise InvalidWarpError(f"The data ID {data_id} does not say the {err.args[0]} of the warp.") from None
    label = f"{identity['instrument']} visit {identity['visit']}"
    try:
        bbox = image.bbox.intersection(grid.bbox)
    except NoOverlapError:
        raise InvalidWarpError(
            f"{label}: its box {image.bbox} has no pixel in common with patch {geometry.patch.id}, "
            f"{grid.bbox}."
        ) from None

    def cut(plane: Image, name: str) -> np.ndarray:
        if not plane.bbox.contains(bbox):
            raise InvalidWarpError(f"{label}: the {name} covers {plane.bbox} only, the image {bbox}.")
        return plane[bbox].array.copy()  # a view would keep the border of the exposure in memory

    planes: dict[str, np.ndarray] = {}
    for bits in masks:
        for name, pixels in bits.pixels(bbox):
            planes[name] = planes[name] | pixels if name in planes else pixels
    if masked_fraction is not None:
        bad = ~(cut(masked_fraction, "masked fraction") <= max_masked_fraction)
        planes[MASKED_FRACTION_PLANE] = planes.get(MASKED_FRACTION_PLANE, False) | bad
    schema = MaskSchema([MaskPlane(name, f"Plane {name} of the direct warp.") for name in planes])
    mask = Mask(schema=schema, bbox=bbox)
    for name, pixels in planes.items():
        mask.set(name, pixels)
    return Warp(
        **identity,
        image=cut(image, "image"),
        variance=cut(variance, "variance"),
        mask=mask,
        bbox=bbox,
        psf=make_cell_psf(psf, grid),
        sky_projection=geometry.sky_projection,
        patch=geometry.patch,
        noise=tuple(cut(plane, f"noise image {n}") for n, plane in enumerate(noise)),
        detectors=detectors or {},
        aperture_corrections=aperture_corrections or {},
    )


def warp_from_exposure(
    exposure: Any,
    data_id: Any,
    geometry: PatchGeometry,
    *,
    artifact_mask: Any = None,
    masked_fraction: Any = None,
    max_masked_fraction: float = 1.0,
    noise: Sequence[Any] = (),
) -> Warp:
    """Read a warp from an exposure.

    Parameters
    ----------
    exposure : `lsst.afw.image.ExposureF`
        Visit on the pixel grid of the tract. Its ``PhotoCalib`` carries it to nJy, and is 1 if it is in nJy
        already. Its PSF is evaluated at the centres of the cells; where it is not defined there, the visit
        has no PSF in the cell.
    data_id : `~lsst.daf.butler.DataCoordinate` or `~collections.abc.Mapping`
        Values of ``instrument``, ``visit``, ``physical_filter``, ``band`` and ``day_obs``.
    geometry : `PatchGeometry`
        Where the patch lies.
    artifact_mask : `lsst.afw.image.Mask`, optional
        Mask of artifacts that were found by comparing visits; its planes are added to those of the exposure.
    masked_fraction : `lsst.afw.image.ImageF`, optional
        Fraction of masked pixels among those that each pixel was resampled from.
    max_masked_fraction : `float`, optional
        Largest such fraction.
    noise : `~collections.abc.Sequence` [`lsst.afw.image.MaskedImageF`], optional
        Images of noise alone, in the units of the exposure.

    Returns
    -------
    warp : `~lsst.coadd.deepprior.warps.Warp`
        The warp.

    Raises
    ------
    InvalidWarpError
        Raised if the exposure has no PSF or no photometric calibration to nJy, or its parts do not fit
        together.
    ImportError
        Raised without a Science Pipelines installation.
    """
    label = f"{data_id['instrument']} visit {data_id['visit']}"
    if (photo_calib := exposure.getPhotoCalib()) is None:
        raise InvalidWarpError(f"{label}: it has no photometric calibration, so its units are not known.")
    unit = exposure.getMetadata().get("BUNIT", "nJy")
    if photo_calib.getCalibrationMean() == 1.0 and unit != "nJy":
        raise InvalidWarpError(f"{label}: its pixels are in {unit}, and no calibration carries them to nJy.")
    if exposure.getPsf() is None:
        raise InvalidWarpError(f"{label}: it has no PSF.")
    grid = geometry.patch.cells
    masked_image = photo_calib.calibrateImage(exposure.getMaskedImage())
    masks = [masked_image.mask] if artifact_mask is None else [masked_image.mask, artifact_mask]
    psf = stack_stamps(_psf_stamps(exposure.getPsf(), grid), grid)
    return assemble_warp(
        data_id,
        geometry,
        image=Image.from_legacy(masked_image.image, unit=u.nJy),
        variance=Image.from_legacy(masked_image.variance, unit=u.nJy**2),
        masks=[
            MaskBits(mask.array, dict(mask.getMaskPlaneDict()), Box.from_legacy(mask.getBBox()))
            for mask in masks
        ],
        psf=psf,
        masked_fraction=None if masked_fraction is None else Image.from_legacy(masked_fraction),
        max_masked_fraction=max_masked_fraction,
        noise=[Image.from_legacy(photo_calib.calibrateImage(one).image, unit=u.nJy) for one in noise],
        detectors=_detectors(exposure),
        aperture_corrections=_aperture_corrections(exposure, grid, np.isfinite(psf[:, :, 0, 0])),
    )


def _centers(grid: CellGrid) -> list[tuple[float, float]]:
    """Return the centres (x, y) of all cells in row-major order, in tract pixels."""
    boxes = [grid.bbox_of(cell) for cell in CellGridBounds(grid=grid, bbox=grid.bbox).cell_indices()]
    return [(box.x.center, box.y.center) for box in boxes]


def _psf_stamps(psf: Any, grid: CellGrid) -> list[tuple[np.ndarray, Box] | None]:
    """Evaluate an afw PSF at the centres of the cells, `None` where it is not defined."""
    geom = import_from_stack("lsst.geom")
    exceptions = import_from_stack("lsst.pex.exceptions")
    stamps: list[tuple[np.ndarray, Box] | None] = []
    for x, y in _centers(grid):
        stamp = None
        # InvalidPsfError, a kind of InvalidParameterError, where no detector is; RangeError far from one.
        with contextlib.suppress(exceptions.InvalidParameterError, exceptions.RangeError):
            kernel = psf.computeKernelImage(geom.Point2D(x, y))
            stamp = kernel.array.copy(), Box.from_legacy(kernel.getBBox())
        stamps.append(stamp)
    return stamps


def _detectors(exposure: Any) -> dict[int, Polygon]:
    """Return the outlines of the detectors of a warp in tract pixels, none if it does not know its inputs."""
    if (inputs := exposure.getInfo().getCoaddInputs()) is None:
        return {}
    afw_geom = import_from_stack("lsst.afw.geom")
    geom = import_from_stack("lsst.geom")
    outlines = {}
    for record in inputs.ccds:
        if record.getWcs() is None:
            continue
        outline = record.getValidPolygon() or afw_geom.Polygon(geom.Box2D(record.getBBox()))
        to_tract = afw_geom.makeWcsPairTransform(record.getWcs(), exposure.getWcs())
        outlines[int(record["ccd"])] = Polygon.from_legacy(outline.transform(to_tract))
    return outlines


def _aperture_corrections(exposure: Any, grid: CellGrid, has_psf: np.ndarray) -> dict[str, np.ndarray]:
    """Evaluate the aperture corrections of a warp at the centres of the cells, NaN where not defined."""
    if (corrections := exposure.getInfo().getApCorrMap()) is None:
        return {}
    geom = import_from_stack("lsst.geom")
    exceptions = import_from_stack("lsst.pex.exceptions")
    result = {}
    for name, field in corrections.items():
        factors = np.full(has_psf.size, np.nan)
        for n, (x, y) in enumerate(_centers(grid)):
            if has_psf.flat[n]:
                with contextlib.suppress(exceptions.DomainError):
                    factors[n] = field.evaluate(geom.Point2D(x, y))
        result[name] = factors.reshape(has_psf.shape)
    return result
