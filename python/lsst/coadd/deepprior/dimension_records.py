# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Dimension records of warps in a Butler repository."""

from __future__ import annotations

__all__ = ("check_records", "copy_patches", "insert_patch", "insert_visits", "records")

import hashlib
from collections.abc import Iterable, Mapping

from astropy.wcs import WCS

from lsst.daf.butler import Butler, DimensionRecord
from lsst.images import Box, SkyProjection, SkyProjectionAstropyView, TractFrame
from lsst.images.cells import PatchDefinition
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

from .warp_file_header import WarpFileHeader
from .warp_files import InvalidWarpFileError


def records(butler: Butler, element: str, **data_id: str | int) -> list[DimensionRecord]:
    """Return the records of a dimension element that a repository holds.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository.
    element : `str`
        Name of the element.
    **data_id : `str` or `int`
        Dimensions that the records must have.

    Returns
    -------
    records : `list` [`lsst.daf.butler.DimensionRecord`]
        The records, none if the repository does not know the dimensions.
    """
    return butler.query_dimension_records(element, data_id=data_id, limit=None, explain=False)


def check_records(butler: Butler, headers: Iterable[WarpFileHeader]) -> None:
    """Refuse files that contradict what the repository knows about their visit or filter.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository.
    headers : `~collections.abc.Iterable` [`WarpFileHeader`]
        Headers of the files.

    Raises
    ------
    InvalidWarpFileError
        Raised if a file contradicts the repository.
    """
    for header in headers:
        of_filter = {"instrument": header.instrument, "physical_filter": header.physical_filter}
        for record in records(butler, "physical_filter", **of_filter):
            if record.band != header.band:
                raise InvalidWarpFileError(
                    header.path,
                    f"it gives the filter {header.physical_filter!r} the band {header.band!r}, "
                    f"the repository gives it {record.band!r}",
                )
        for record in records(butler, "visit", instrument=header.instrument, visit=header.visit):
            if (record.physical_filter, record.day_obs) != (header.physical_filter, header.day_obs):
                raise InvalidWarpFileError(
                    header.path,
                    f"it gives {header.label} the filter {header.physical_filter!r} and the night "
                    f"{header.day_obs}, the repository gives it {record.physical_filter!r} and "
                    f"{record.day_obs}",
                )


def insert_visits(butler: Butler, headers: Iterable[WarpFileHeader]) -> None:
    """Insert the records of visits, with their instrument, filter and night, where they are absent.

    The region of a visit that was inserted in this way grows with its files; that of any other stays.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository.
    headers : `~collections.abc.Iterable` [`WarpFileHeader`]
        Headers of the files of the visits.
    """
    for header in headers:
        instrument = header.instrument
        region = ConvexPolygon.convexHull(_sky_vertices(header.bbox, header.wcs))
        _insert(butler, "instrument", {"name": instrument})
        _insert(
            butler,
            "physical_filter",
            {"instrument": instrument, "name": header.physical_filter, "band": header.band},
        )
        _insert(butler, "day_obs", {"instrument": instrument, "id": header.day_obs})
        row = {
            "instrument": instrument,
            "id": header.visit,
            "name": str(header.visit),
            "physical_filter": header.physical_filter,
            "day_obs": header.day_obs,
            "exposure_time": header.exposure_time,
            "timespan": header.timespan,
            "region": region,
        }
        _insert(butler, "visit", row)
        (record,) = records(butler, "visit", instrument=instrument, visit=header.visit)
        known = {name for name, value in record.toDict().items() if value is not None}
        # Visits that were defined from raw data know more, their target for instance, and have other names.
        if record.name == row["name"] and known <= row.keys():
            _grow_region(butler, "visit", record, region)


def insert_patch(butler: Butler, patch: PatchDefinition, sky_projection: SkyProjection[TractFrame]) -> None:
    """Insert the records of a patch, its tract and its skymap, where they are absent.

    The region of a tract grows with its patches if its skymap was inserted in this way.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository.
    patch : `lsst.images.cells.PatchDefinition`
        Definition of the patch.
    sky_projection : `lsst.images.SkyProjection`
        Projection of the tract.
    """
    skymap, tract = sky_projection.pixel_frame.skymap, sky_projection.pixel_frame.tract
    region = ConvexPolygon.convexHull(_sky_vertices(patch.outer_bbox, sky_projection.as_astropy()))
    # Graph building accepts no NULL for the hash and for cell_x and cell_y.
    _insert(butler, "skymap", {"name": skymap, "hash": _hash_of(skymap)})
    _insert(butler, "tract", {"skymap": skymap, "id": tract, "region": region})
    if _has_hash_of_name(butler, skymap):
        (record,) = records(butler, "tract", skymap=skymap, tract=tract)
        _grow_region(butler, "tract", record, region)
    _insert(
        butler,
        "patch",
        {
            "skymap": skymap,
            "tract": tract,
            "id": patch.id,
            "cell_x": patch.index.x,
            "cell_y": patch.index.y,
            "region": region,
        },
    )


def copy_patches(butler: Butler, skymap: str, name: str) -> int:
    """Insert the records of another skymap with the tracts and patches of one, where they are absent.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository.
    skymap : `str`
        Name of the skymap whose tracts and patches are copied.
    name : `str`
        Name of the other skymap.

    Returns
    -------
    n_patches : `int`
        Number of its patches.
    """
    for record in records(butler, "skymap", skymap=skymap):
        _insert(butler, "skymap", record.toDict() | {"name": name, "hash": _hash_of(name)})
    tracts, patches = (records(butler, element, skymap=skymap) for element in ("tract", "patch"))
    _insert(butler, "tract", *(record.toDict() | {"skymap": name} for record in tracts))
    if _has_hash_of_name(butler, name):
        copies = {record.id: record for record in records(butler, "tract", skymap=name)}
        for record in tracts:
            if isinstance(record.region, ConvexPolygon):
                _grow_region(butler, "tract", copies[record.id], record.region)
    _insert(butler, "patch", *(record.toDict() | {"skymap": name} for record in patches))
    return len(patches)


def _insert(butler: Butler, element: str, *rows: Mapping[str, object]) -> None:
    butler.registry.insertDimensionData(element, *rows, skip_existing=True)


def _hash_of(skymap: str) -> bytes:
    """Return the hash of a skymap of which only the name is known."""
    return hashlib.sha1(skymap.encode()).digest()


def _has_hash_of_name(butler: Butler, skymap: str) -> bool:
    """Return whether a skymap was inserted by this module; others have the hash of their definition."""
    return any(record.hash == _hash_of(skymap) for record in records(butler, "skymap", skymap=skymap))


def _grow_region(butler: Butler, element: str, record: DimensionRecord, region: ConvexPolygon) -> None:
    """Make the region of a record cover another region, as more of a visit or tract becomes known."""
    if isinstance(record.region, ConvexPolygon) and not record.region.contains(region):
        hull = ConvexPolygon.convexHull([*record.region.getVertices(), *region.getVertices()])
        butler.registry.syncDimensionData(element, record.toDict() | {"region": hull}, update=True)


def _sky_vertices(bbox: Box, wcs: WCS | SkyProjectionAstropyView) -> list[UnitVector3d]:
    """Return the corners of a box of pixels on the sky."""
    polygon = bbox.to_polygon()
    sky = wcs.pixel_to_world(polygon.x_vertices, polygon.y_vertices)
    return [UnitVector3d(LonLat.fromRadians(*radec)) for radec in zip(sky.ra.rad, sky.dec.rad, strict=True)]
