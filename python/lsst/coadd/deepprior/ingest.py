# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Ingest of warp files into a Butler repository."""

from __future__ import annotations

__all__ = (
    "DATASET_TYPE",
    "DEFAULT_RUN",
    "DEFAULT_SKYMAP",
    "IngestError",
    "IngestReport",
    "ingest_warp_files",
)

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy.exc
from astropy.wcs import WCS

from lsst.daf.butler import (
    Butler,
    DatasetRef,
    DatasetType,
    EmptyQueryResultError,
    MissingCollectionError,
    MissingDatasetTypeError,
)
from lsst.daf.butler.registry import CollectionTypeError, ConflictingDefinitionError
from lsst.images import YX, Box, Interval, SkyProjection, TractFrame
from lsst.images.cells import CellGrid, PatchDefinition
from lsst.resources import ResourcePath

from .cells import cover_with_cells
from .dimension_records import check_records, insert_patch, insert_visits, records
from .repositories import (
    RepositoryError,
    check_run_name,
    is_repository_uri,
    open_repository,
    unwrapped_errors,
)
from .warp_file_header import MAX_SKYMAP_LENGTH, WarpFileHeader
from .warp_files import InvalidWarpFileError, read_warp_file
from .warps import Warp

DATASET_TYPE = "deep_prior_warp"
"""Name of the dataset type of warps (`str`)."""

DEFAULT_RUN = "deepprior/warps"
"""Collection that warps are written to unless another is named (`str`)."""

DEFAULT_SKYMAP = "deepprior"
"""Skymap of files without ``SKYMAP`` (`str`)."""

_DIMENSIONS = ("instrument", "visit", "skymap", "tract", "patch")

_DEFAULT_CELL = 150
"""Size in pixels of the cells of patches whose files declare none."""

_LARGEST_PATCH = 10_000
"""Side of a patch in pixels above which one of its files, if none declares cells, must fill half of it."""

_GRID_TOLERANCE = 1e-3
"""Largest distance in pixels between the same position on two grids that count as one."""

type Progress = Callable[[str, int, int], None]
type PatchKey = tuple[str, int, int]


class IngestError(RuntimeError):
    """Raised if warp files cannot be ingested into a repository; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Parameters
    ----------
    run : `str`
        Collection of the warps.
    n_ingested : `int`
        Number of files that were written to the repository.
    n_skipped : `int`
        Number of files whose content was there already.
    n_patches : `int`
        Number of patches of all files.
    """

    run: str
    n_ingested: int
    n_skipped: int
    n_patches: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tile:
    """A patch, the projection of its tract, and the files that lie on it."""

    patch: PatchDefinition
    sky_projection: SkyProjection[TractFrame]
    headers: tuple[WarpFileHeader, ...]

    @property
    def data_id(self) -> dict[str, str | int]:
        frame = self.sky_projection.pixel_frame
        return {"skymap": frame.skymap, "tract": frame.tract, "patch": self.patch.id}

    def read(self, header: WarpFileHeader) -> Warp:
        return read_warp_file(header.path).to_warp(self.patch, self.sky_projection)


def ingest_warp_files(
    repo: str | Path,
    files: Iterable[str | Path],
    *,
    run: str = DEFAULT_RUN,
    skymap: str = DEFAULT_SKYMAP,
    progress: Progress | None = None,
) -> IngestReport:
    """Ingest warp files into a Butler repository.

    The repository, the collection and all dimension records are made if absent.  All files are checked before
    the first is written, and one bad file refuses the whole call.  A file that is in the collection already
    is skipped.

    Parameters
    ----------
    repo : `str` or `~pathlib.Path`
        Root directory of the repository, or URI or alias of one that is there.
    files : `~collections.abc.Iterable` [`str` or `~pathlib.Path`]
        The warp files, of any number of patches, bands and visits.
    run : `str`, optional
        Collection to write to.
    skymap : `str`, optional
        Skymap of the files without ``SKYMAP``; their default tract and patch are 0.
    progress : `~collections.abc.Callable`, optional
        Called with the name of the phase, the number of files done and the number of files.

    Returns
    -------
    report : `IngestReport`
        What was done.

    Raises
    ------
    InvalidWarpFileError
        Raised if a file is not a valid warp file, or does not agree with the other files or the repository.
    IngestError
        Raised if the repository cannot be read or written, or the skymap or collection cannot be so called.

    Notes
    -----
    One file's pixels are in memory at a time.
    """
    if not 0 < len(skymap.strip()) <= MAX_SKYMAP_LENGTH:
        raise IngestError(
            f"{skymap!r} is no name of a skymap; name one with at most {MAX_SKYMAP_LENGTH} characters."
        )
    paths = [Path(file) for file in files]
    report = progress if progress is not None else (lambda phase, n_done, n_files: None)
    try:
        check_run_name(run)
        butler = _open(repo)
    except RepositoryError as err:
        raise IngestError(str(err)) from err
    with contextlib.ExitStack() as stack:
        if butler is not None:
            stack.enter_context(butler)
        headers = []
        for n_done, path in enumerate(paths, start=1):
            headers.append(_with_patch(read_warp_file(path).header, skymap))
            report("checking", n_done, len(paths))
        _check_visits(headers)
        try:
            if butler is not None:
                check_records(butler, headers)
            tiles = _make_tiles(headers, butler)
            new_tiles = _drop_stored(butler, tiles, run, report) if butler is not None else tiles
            n_new = sum(len(tile.headers) for tile in new_tiles)
            if butler is None:
                Butler.makeRepo(str(repo))
                butler = stack.enter_context(Butler.from_config(str(repo), writeable=True))
            _write(butler, new_tiles, run, report)
        except (ConflictingDefinitionError, CollectionTypeError) as err:
            raise IngestError(f"The repository {repo} cannot take warps in {run}: {err}") from err
        except (OSError, sqlalchemy.exc.SQLAlchemyError) as err:
            reason = str(getattr(err, "orig", err)).rstrip(".")
            raise IngestError(f"The repository {repo} cannot be read and written: {reason}.") from err
    return IngestReport(run=run, n_ingested=n_new, n_skipped=len(paths) - n_new, n_patches=len(tiles))


def _open(repo: str | Path) -> Butler | None:
    """Open a repository if there is one, and refuse a path at which there is something else."""
    path = Path(repo)
    try:
        is_there = is_repository_uri(repo) or (path / "butler.yaml").exists()
        occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except Exception as err:  # a damaged index of repositories can raise anything
        raise IngestError(f"{repo} cannot be opened as a Butler repository: {err}.") from err
    if is_there:
        return open_repository(repo, writeable=True)
    place = ResourcePath(str(repo), forceDirectory=True).ospath
    if place != os.path.join(os.path.abspath(repo), ""):
        raise IngestError(
            f"{repo} would be made as {place}, since the Butler takes it for a URI; name a path without "
            "# and %."
        )
    if occupied:
        raise IngestError(
            f"{repo} exists but is not a Butler repository; name one, an empty directory or a new directory."
        )
    return None


def _with_patch(header: WarpFileHeader, skymap: str) -> WarpFileHeader:
    """Fill in skymap, tract and patch where the file does not name them."""
    return dataclasses.replace(
        header, skymap=header.skymap or skymap, tract=header.tract or 0, patch=header.patch or 0
    )


def _patch_key(header: WarpFileHeader) -> PatchKey:
    assert header.skymap is not None
    assert header.tract is not None
    assert header.patch is not None
    return header.skymap, header.tract, header.patch


def _check_visits(headers: Sequence[WarpFileHeader]) -> None:
    """Refuse files that say the same thing twice or contradict each other about a visit or a filter."""
    files: dict[tuple[object, ...], WarpFileHeader] = {}
    visits: dict[tuple[str, int], WarpFileHeader] = {}
    filters: dict[tuple[str, str], WarpFileHeader] = {}
    for header in headers:
        other = files.setdefault((header.instrument, header.visit, _patch_key(header)), header)
        if other is not header:
            raise InvalidWarpFileError(
                header.path, f"it has the same visit ({header.label}) and patch as {other.path}"
            )
        other = visits.setdefault((header.instrument, header.visit), header)
        if other.physical_filter != header.physical_filter or other.day_obs != header.day_obs:
            raise InvalidWarpFileError(
                header.path,
                f"it gives {header.label} the filter {header.physical_filter!r} and the night "
                f"{header.day_obs}, {other.path} gives it {other.physical_filter!r} and {other.day_obs}",
            )
        other = filters.setdefault((header.instrument, header.physical_filter), header)
        if other.band != header.band:
            raise InvalidWarpFileError(
                header.path,
                f"it gives the filter {header.physical_filter!r} the band {header.band!r}, {other.path} "
                f"gives it {other.band!r}",
            )


def _make_tiles(headers: Sequence[WarpFileHeader], butler: Butler | None) -> list[_Tile]:
    """Sort the files by patch, and check that each patch and tract has one pixel grid."""
    tract_wcs: dict[tuple[str, int], WCS] = {}
    tiles = []
    for key, group in itertools.groupby(sorted(headers, key=_patch_key), key=_patch_key):
        skymap, tract, patch_id = key
        tile_headers = tuple(group)
        stored = _stored_grid(butler, skymap=skymap, tract=tract, patch=patch_id)
        if stored is not None:
            grid, sky_projection = stored
        else:
            grid = _cell_grid(tile_headers)
            if (wcs := tract_wcs.get((skymap, tract))) is None:
                other = _stored_grid(butler, skymap=skymap, tract=tract)
                wcs = tile_headers[0].wcs if other is None else _tract_wcs(other[1])
                tract_wcs[skymap, tract] = wcs
            sky_projection = SkyProjection.from_fits_wcs(
                wcs, TractFrame(skymap=skymap, tract=tract, bbox=grid.bbox), pixel_bounds=grid.bbox
            )
        for header in tile_headers:
            _check_grid(header, grid, sky_projection)
        index = _patch_index(butler, key, grid)
        patch = PatchDefinition(id=patch_id, index=index, inner_bbox=grid.bbox, cells=grid)
        tiles.append(_Tile(patch, sky_projection, tile_headers))
    return tiles


def _stored_grid(
    butler: Butler | None, **data_id: str | int
) -> tuple[CellGrid, SkyProjection[TractFrame]] | None:
    """Return the cell grid and the projection of some warp of a tract or patch that is in the repository."""
    if butler is None:
        return None
    try:
        refs = butler.query_datasets(DATASET_TYPE, "*", find_first=False, data_id=data_id, limit=1)
    except (EmptyQueryResultError, MissingDatasetTypeError):
        return None
    psf, sky_projection = (
        _read(butler, refs[0].makeComponentRef(name)) for name in ("psf", "sky_projection")
    )
    return psf.grid, sky_projection


def _read(butler: Butler, ref: DatasetRef) -> Any:
    """Read a stored warp, or a component of it."""
    try:
        return butler.get(ref)
    except (MemoryError, OSError, sqlalchemy.exc.SQLAlchemyError):
        raise
    except Exception as err:  # a damaged file can raise anything
        reason = str(err).split("\n")[0].rstrip(".")
        raise IngestError(
            f"A warp that {ref.run} holds cannot be read; remove it and ingest it again ({reason})."
        ) from err


def _tract_wcs(sky_projection: SkyProjection[TractFrame]) -> WCS | None:
    """Return the WCS of a tract, with pixel positions that are tract pixels."""
    return sky_projection.as_fits_wcs(Box.from_shape((1, 1)), allow_approximation=True)


def _cell_grid(headers: Sequence[WarpFileHeader]) -> CellGrid:
    """Return the cell grid that the files of a patch declare, or else the default one on their common box."""
    declared = [header for header in headers if header.cells is not None]
    for header in declared:
        if header.cells != declared[0].cells:
            raise InvalidWarpFileError(
                header.path,
                f"it declares the cell grid {header.cells}, {declared[0].path} {declared[0].cells}",
            )
    if declared:
        assert declared[0].cells is not None
        return declared[0].cells
    y = _common_interval(headers, lambda header: header.bbox.y)
    x = _common_interval(headers, lambda header: header.bbox.x)
    return cover_with_cells(Box(y=y, x=x), YX(y=_DEFAULT_CELL, x=_DEFAULT_CELL))


def _common_interval(
    headers: Sequence[WarpFileHeader], interval_of: Callable[[WarpFileHeader], Interval]
) -> Interval:
    """Return the rows or columns that hold those of all files; refuse files that lie too far apart."""
    hull = Interval.hull(*map(interval_of, headers))
    if hull.size > max(_LARGEST_PATCH, 2 * max(interval_of(header).size for header in headers)):
        first = min(headers, key=lambda header: interval_of(header).start)
        last = max(headers, key=lambda header: interval_of(header).stop)
        raise InvalidWarpFileError(
            last.path,
            f"it lies so far from {first.path} that their patch would be {hull.size} pixels long; give files "
            "of different patches different PATCH",
        )
    return hull


def _check_grid(header: WarpFileHeader, grid: CellGrid, sky_projection: SkyProjection[TractFrame]) -> None:
    """Refuse a file that does not lie on the pixel and cell grid of its patch."""
    owner = f"patch {header.patch} of tract {header.tract} in skymap {header.skymap}"
    if header.cells is not None and header.cells != grid:
        raise InvalidWarpFileError(
            header.path, f"its cell grid {header.cells} is not that of {owner}, {grid}"
        )
    corners = np.array([(corner.x, corner.y) for corner in header.bbox.boundary()], dtype=float)
    found = sky_projection.sky_to_pixel(header.wcs.pixel_to_world(corners[:, 0], corners[:, 1]))
    distance = np.abs([found.x - corners[:, 0], found.y - corners[:, 1]]).max()
    if not distance < _GRID_TOLERANCE:
        where = f"{distance:.3g} pixels away" if distance < 1e6 else "far away"
        raise InvalidWarpFileError(
            header.path,
            f"its pixel grid is not that of {owner}, the same position lies {where}; files of another grid "
            "need another SKYMAP or TRACT",
        )
    if not grid.bbox.contains(header.bbox):
        raise InvalidWarpFileError(header.path, f"its pixels {header.bbox} leave {owner}, {grid.bbox}")
    size = grid.grid_size.as_tuple()
    if header.psf_cells is not None and header.psf_cells != size:
        raise InvalidWarpFileError(
            header.path, f"it has PSF stamps for {header.psf_cells} cells (i, j), {owner} has {size}"
        )


def _patch_index(butler: Butler | None, key: PatchKey, grid: CellGrid) -> YX[int]:
    """Return the row and column of a patch in its tract, from the repository or else from its position."""
    if butler is not None:
        for record in records(butler, "patch", skymap=key[0], tract=key[1], patch=key[2]):
            return YX(y=record.cell_y, x=record.cell_x)
    bbox = grid.bbox
    return YX(y=bbox.y.start // bbox.y.size, x=bbox.x.start // bbox.x.size)


def _stored_visits(butler: Butler, tile: _Tile, run: str) -> dict[tuple[object, object], DatasetRef]:
    """Return the warps of a patch that are in a collection, by instrument and visit."""
    try:
        refs = butler.query_datasets(DATASET_TYPE, run, data_id=tile.data_id, limit=None, explain=False)
    except (MissingCollectionError, MissingDatasetTypeError):
        return {}
    return {(ref.dataId["instrument"], ref.dataId["visit"]): ref for ref in refs}


def _is_same(warp: Warp, other: Warp) -> bool:
    """Return whether two warps have the same content."""
    planes = warp.mask.schema.names
    return (
        (warp.physical_filter, warp.band, warp.day_obs) == (other.physical_filter, other.band, other.day_obs)
        and warp.bbox == other.bbox
        and np.array_equal(warp.image, other.image, equal_nan=True)
        and np.array_equal(warp.variance, other.variance, equal_nan=True)
        and planes == other.mask.schema.names
        and all(np.array_equal(warp.mask.get(plane), other.mask.get(plane)) for plane in planes)
        and warp.psf_stamps.shape == other.psf_stamps.shape
        and np.allclose(warp.psf_stamps, other.psf_stamps, rtol=1e-9, atol=0.0, equal_nan=True)
        and len(warp.noise) == len(other.noise)
        and all(map(partial(np.array_equal, equal_nan=True), warp.noise, other.noise))
    )


def _drop_stored(butler: Butler, tiles: Sequence[_Tile], run: str, progress: Progress) -> list[_Tile]:
    """Leave out the files whose content is in the collection already, and refuse those that differ."""
    stored = [_stored_visits(butler, tile, run) for tile in tiles]
    n_stored = sum(
        (h.instrument, h.visit) in refs
        for tile, refs in zip(tiles, stored, strict=True)
        for h in tile.headers
    )
    n_done = 0
    result = []
    for tile, refs in zip(tiles, stored, strict=True):
        new = []
        for header in tile.headers:
            ref = refs.get((header.instrument, header.visit))
            if ref is None:
                new.append(header)
                continue
            if not _is_same(tile.read(header), Warp.from_cell_coadd(_read(butler, ref))):
                raise InvalidWarpFileError(
                    header.path,
                    f"the collection {run} holds another warp of {header.label} for this patch; ingest into "
                    "another collection or remove that warp first",
                )
            n_done += 1
            progress("comparing", n_done, n_stored)
        result.append(dataclasses.replace(tile, headers=tuple(new)))
    return result


def _write(butler: Butler, tiles: Sequence[_Tile], run: str, progress: Progress) -> None:
    """Write all files to a collection."""
    butler.registry.registerDatasetType(
        DatasetType(DATASET_TYPE, _DIMENSIONS, "CellCoadd", universe=butler.dimensions)
    )
    butler.collections.register(run)
    with butler.transaction():
        for tile in tiles:
            insert_visits(butler, tile.headers)
            insert_patch(butler, tile.patch, tile.sky_projection)
    queue = [(tile, header) for tile in tiles for header in tile.headers]
    for n_done, (tile, header) in enumerate(queue, start=1):
        data_id = tile.data_id | {"instrument": header.instrument, "visit": header.visit}
        with unwrapped_errors():
            butler.put(tile.read(header).to_cell_coadd(), DATASET_TYPE, data_id, run=run)
        progress("writing", n_done, len(queue))
