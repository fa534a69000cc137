# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps and their patch on finer pixels (see `~lsst.coadd.deepprior.finer`), and what their skymap is called.

Each fine pixel of a warp has its share of the pixel that it lies in; boxes, cells, outlines and the
projection of the tract are the same on the sky.
"""

from __future__ import annotations

__all__ = (
    "FinerWarp",
    "FinerWarps",
    "coarser_geometry",
    "finer_box",
    "finer_patch",
    "finer_projection",
    "finer_skymap",
    "finer_warp",
    "normal_skymap",
)

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lsst.images import YX, Box, Mask, Polygon, SkyProjection, TractFrame, Transform
from lsst.images.cells import CellGrid, PatchDefinition

from .cells import make_cell_psf
from .direct_warps import PatchGeometry
from .finer import check_oversampling, finer_observation, finer_psf, repeated, spread_psf
from .observation import Observation
from .warps import Warp

_NAME = re.compile(r"(?P<skymap>.+)_x(?P<oversampling>[23])")


def finer_skymap(skymap: str, oversampling: int) -> str:
    """Name the skymap with the same tracts and patches and finer pixels.

    Parameters
    ----------
    skymap : `str`
        Name of a skymap.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.

    Returns
    -------
    name : `str`
        The name with ``_x2`` or ``_x3`` behind it.

    Raises
    ------
    ValueError
        Raised if the factor is not 2 or 3, or the skymap has finer pixels itself.
    """
    check_oversampling(oversampling)
    if _NAME.fullmatch(skymap):
        raise ValueError(f"The skymap {skymap} has finer pixels already.")
    return f"{skymap}_x{oversampling}"


def normal_skymap(skymap: str, oversampling: int) -> str | None:
    """Return the name of the skymap that one with finer pixels belongs to.

    Parameters
    ----------
    skymap : `str`
        Name of a skymap.
    oversampling : `int`
        How many fine pixels a pixel has along an axis.

    Returns
    -------
    name : `str` or `None`
        The inverse of `finer_skymap`; `None` for any other skymap.
    """
    found = _NAME.fullmatch(skymap)
    return found["skymap"] if found and int(found["oversampling"]) == oversampling else None


def finer_box(bbox: Box, oversampling: int) -> Box:
    """Return a box in fine pixels."""
    return Box.from_shape(
        YX(y=oversampling * bbox.y.size, x=oversampling * bbox.x.size),
        start=YX(y=oversampling * bbox.y.start, x=oversampling * bbox.x.start),
    )


def _coarser_box(bbox: Box, oversampling: int) -> Box:
    """Return a box of fine pixels in pixels that are larger again."""
    edges = np.array([bbox.y.start, bbox.x.start, bbox.y.size, bbox.x.size])
    if np.any(edges % oversampling):
        raise ValueError(f"The box {bbox} is not a whole number of pixels {oversampling} times larger.")
    y, x, height, width = (edges // oversampling).tolist()
    return Box.from_shape(YX(y=height, x=width), start=YX(y=y, x=x))


def finer_patch(patch: PatchDefinition, oversampling: int) -> PatchDefinition:
    """Return the definition of a patch in fine pixels; see `finer_projection` for the parameters."""
    cells = patch.cells
    return PatchDefinition(
        id=patch.id,
        index=patch.index,
        inner_bbox=finer_box(patch.inner_bbox, oversampling),
        cells=CellGrid(
            bbox=finer_box(cells.bbox, oversampling),
            cell_shape=YX(y=oversampling * cells.cell_shape.y, x=oversampling * cells.cell_shape.x),
        ),
    )


def _in_pixels(
    projection: SkyProjection[TractFrame], frame: TractFrame, scale: float, offset: float
) -> SkyProjection[TractFrame]:
    """Return a projection in other pixels, of which ``scale * x + offset`` are the present ones.

    One that FITS can describe, as those of tracts are, stays a FITS projection: afw reads no other.
    """
    matrix = np.array([[scale, 0.0, offset], [0.0, scale, offset], [0.0, 0.0, 1.0]])
    step = Transform.affine(frame, projection.pixel_frame, matrix)
    approximation = projection.fits_approximation
    transform = step.then(projection.pixel_to_sky_transform, remember_components=False)
    if (wcs := transform.as_fits_wcs(frame.bbox)) is not None:
        y0, x0 = frame.bbox.start
        transform = Transform.from_fits_wcs(wcs, frame, projection.sky_frame, x0=x0, y0=y0)
    return SkyProjection(
        transform, None if approximation is None else step.then(approximation.pixel_to_sky_transform)
    )


def finer_projection(
    projection: SkyProjection[TractFrame], oversampling: int, skymap: str | None = None
) -> SkyProjection[TractFrame]:
    """Return the projection of a tract in fine pixels.

    Parameters
    ----------
    projection : `lsst.images.SkyProjection`
        Projection of the tract.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.
    skymap : `str`, optional
        Name of the skymap with these pixels, by default that of `finer_skymap`.

    Returns
    -------
    finer : `lsst.images.SkyProjection`
        The same projection of ``k x + (k - 1) / 2``, which is where the point x is in fine pixels.
    """
    check_oversampling(oversampling)
    frame = projection.pixel_frame
    name = finer_skymap(frame.skymap, oversampling) if skymap is None else skymap
    finer = TractFrame(skymap=name, tract=frame.tract, bbox=finer_box(frame.bbox, oversampling))
    return _in_pixels(projection, finer, 1.0 / oversampling, 0.5 * (1.0 / oversampling - 1.0))


def coarser_geometry(
    patch: PatchDefinition, projection: SkyProjection[TractFrame], oversampling: int
) -> PatchGeometry:
    """Return where a patch lies in the pixels that it was made finer from.

    Parameters
    ----------
    patch : `lsst.images.cells.PatchDefinition`
        Definition of the patch in fine pixels.
    projection : `lsst.images.SkyProjection`
        Its projection.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.

    Returns
    -------
    geometry : `~lsst.coadd.deepprior.direct_warps.PatchGeometry`
        The inverse of `finer_patch` and `finer_projection`.

    Raises
    ------
    ValueError
        Raised if the patch is not one in such pixels.
    """
    frame = projection.pixel_frame
    skymap = normal_skymap(frame.skymap, oversampling)
    if skymap is None:
        raise ValueError(f"The pixels of the skymap {frame.skymap} are not {oversampling} times finer.")
    cells = patch.cells
    coarser = TractFrame(skymap=skymap, tract=frame.tract, bbox=_coarser_box(frame.bbox, oversampling))
    return PatchGeometry(
        patch=PatchDefinition(
            id=patch.id,
            index=patch.index,
            inner_bbox=_coarser_box(patch.inner_bbox, oversampling),
            cells=CellGrid(
                bbox=_coarser_box(cells.bbox, oversampling),
                cell_shape=YX(y=cells.cell_shape.y // oversampling, x=cells.cell_shape.x // oversampling),
            ),
        ),
        sky_projection=_in_pixels(projection, coarser, float(oversampling), 0.5 * (oversampling - 1.0)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class FinerWarp(Warp):
    """One visit on finer pixels, each with its share of the pixel of the visit that it lies in.

    Parameters
    ----------
    normal : `~lsst.coadd.deepprior.warps.Warp`
        The visit on its own pixels.
    finer_stamps : `numpy.ndarray`, (cell_i, cell_j, K, K)
        Its PSF at the fine pixels that stand for its own (see `~lsst.coadd.deepprior.finer.finer_psf`);
        ``psf`` is that of the image of repeated pixels.

    Notes
    -----
    The other parameters are those of `~lsst.coadd.deepprior.warps.Warp`.
    """

    normal: Warp = dataclasses.field(kw_only=True)
    finer_stamps: np.ndarray = dataclasses.field(kw_only=True)

    def observation(self, bad_planes: Iterable[str]) -> Observation:
        """Return the visit as plain arrays, in which one fine pixel stands for each of its own.

        Parameters
        ----------
        bad_planes : `~collections.abc.Iterable` [`str`]
            Mask planes that make a pixel unusable.

        Returns
        -------
        observation : `~lsst.coadd.deepprior.observation.Observation`
            See `~lsst.coadd.deepprior.finer.finer_observation`.
        """
        oversampling = self.bbox.y.size // self.normal.bbox.y.size
        return finer_observation(self.normal.observation(bad_planes), oversampling, self.finer_stamps)


def finer_warp(warp: Warp, oversampling: int) -> FinerWarp:
    """Put a warp on finer pixels.

    Parameters
    ----------
    warp : `~lsst.coadd.deepprior.warps.Warp`
        The warp.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.

    Returns
    -------
    finer : `FinerWarp`
        The same visit in the pixels of the finer skymap.
    """
    check_oversampling(oversampling)
    k = oversampling
    patch = finer_patch(warp.patch, k)
    bbox = finer_box(warp.bbox, k)
    mask = Mask(schema=warp.mask.schema, bbox=bbox)
    for name in warp.mask.schema.names:
        mask.set(name, repeated(warp.mask.get(name), k))
    stamps = finer_psf(warp.psf_stamps, k)

    def share(image: np.ndarray, part: float) -> np.ndarray:
        return repeated(image * image.dtype.type(part), k)

    return FinerWarp(
        instrument=warp.instrument,
        visit=warp.visit,
        physical_filter=warp.physical_filter,
        band=warp.band,
        day_obs=warp.day_obs,
        image=share(warp.image, 1.0 / k**2),
        variance=share(warp.variance, 1.0 / k**4),
        mask=mask,
        bbox=bbox,
        psf=make_cell_psf(spread_psf(stamps, k), patch.cells),
        sky_projection=finer_projection(warp.sky_projection, k),
        patch=patch,
        noise=tuple(share(noise, 1.0 / k**2) for noise in warp.noise),
        detectors={
            number: Polygon(
                x_vertices=k * outline.x_vertices + 0.5 * (k - 1),
                y_vertices=k * outline.y_vertices + 0.5 * (k - 1),
            )
            for number, outline in warp.detectors.items()
        },
        aperture_corrections=warp.aperture_corrections,
        normal=warp,
        finer_stamps=stamps,
    )


class FinerWarps(Sequence[Warp]):
    """Warps on finer pixels, each made when it is asked for.

    Parameters
    ----------
    warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.Warp`]
        The warps.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.
    """

    def __init__(self, warps: Sequence[Warp], oversampling: int) -> None:
        check_oversampling(oversampling)
        self._warps = warps
        self._oversampling = oversampling

    def __len__(self) -> int:
        return len(self._warps)

    def __getitem__(self, index: int) -> Warp:  # type: ignore[override]
        return finer_warp(self._warps[index], self._oversampling)
