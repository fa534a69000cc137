# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Keywords of warp files."""

from __future__ import annotations

__all__ = ("MAX_SKYMAP_LENGTH", "RefusalError", "WarpFileHeader", "night_of", "read_warp_file_header")

import dataclasses
import math
import re
import warnings
from pathlib import Path

from astropy.io import fits
from astropy.time import Time, TimeDelta
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS, FITSFixedWarning, WcsError
from astropy.wcs.utils import wcs_to_celestial_frame

from lsst.daf.butler import Timespan
from lsst.images import YX, Box
from lsst.images.cells import CellGrid

from .cells import cover_with_cells

MAX_SKYMAP_LENGTH = 64
"""Number of characters that a Butler has for the name of a skymap (`int`)."""

_NO_NIGHT = 19700101
"""Night (YYYYMMDD) of visits whose time is not known."""

_GRID_KEYWORDS = ("CELLSZ", "PATX0", "PATY0", "PATNX", "PATNY")


_WCS_NUMBERS = re.compile(r"(CRVAL|CDELT|CROTA)\d|(CD|PC)\d_\d")
"""Keywords of a WCS that wcslib takes for absent where they are texts."""

_LARGEST_INTEGER = 2**63 - 1
"""Largest integer that the database of a repository holds."""

_FIRST_MJD, _LAST_MJD = 41000.0, 88000.0
"""MJD in the years 1971 and 2099: a repository holds the time from 1970 to the end of 2099."""

_LONGEST_EXPOSURE = 1e7
"""Longest exposure in seconds, 116 days; half of it is less than what `_FIRST_MJD` and `_LAST_MJD` leave."""


class RefusalError(Exception):
    """Raised with the reason why a file is no valid warp file."""


@dataclasses.dataclass(frozen=True, eq=False)
class WarpFileHeader:
    """What a warp file says besides its pixels.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file.
    instrument, band, physical_filter : `str`
        Keywords ``INSTRUME``, ``BAND`` and ``FILTER``.
    visit : `int`
        Keyword ``VISIT``.
    exposure_time, mjd : `float` or `None`
        Keywords ``EXPTIME`` in seconds and ``MJD``, the middle of the exposure in TAI.
    skymap, tract, patch : `str` or `int` or `None`
        Keywords ``SKYMAP``, ``TRACT`` and ``PATCH``.
    cells : `lsst.images.cells.CellGrid` or `None`
        Cell grid of the patch from the keywords ``CELLSZ``, ``PATX0``, ``PATY0``, ``PATNX`` and ``PATNY``,
        enlarged at its upper and right border to a whole number of cells; `None` without these keywords.
    bbox : `lsst.images.Box`
        Box of the pixels in tract pixels.
    wcs : `astropy.wcs.WCS`
        WCS of the tract, with pixel positions that are tract pixels (0-based).
    psf_cells : `tuple` [`int`, `int`] or `None`
        Number of cells (i, j) for which the file holds PSF stamps; `None` for one stamp for the whole warp.
    """

    path: Path
    instrument: str
    visit: int
    band: str
    physical_filter: str
    exposure_time: float | None
    mjd: float | None
    skymap: str | None
    tract: int | None
    patch: int | None
    cells: CellGrid | None
    bbox: Box
    wcs: WCS
    psf_cells: tuple[int, int] | None

    @property
    def label(self) -> str:
        """What messages call the visit (`str`)."""
        return f"{self.instrument} visit {self.visit}"

    @property
    def day_obs(self) -> int:
        """Night of the observation, which ends at noon TAI, as YYYYMMDD; 19700101 where not known (`int`)."""
        return _NO_NIGHT if self.mjd is None else night_of(self.mjd)

    @property
    def timespan(self) -> Timespan | None:
        """Time of the exposure, `None` where not known (`lsst.daf.butler.Timespan`)."""
        if self.mjd is None or self.exposure_time is None:
            return None
        middle = Time(self.mjd, format="mjd", scale="tai")
        half = TimeDelta(self.exposure_time / 2.0, format="sec", scale="tai")
        return Timespan(middle - half, middle + half)


def night_of(mjd: float) -> int:
    """Return the night in which an exposure was taken.

    Parameters
    ----------
    mjd : `float`
        Time of the exposure as MJD in TAI.

    Returns
    -------
    day_obs : `int`
        Date on which the night began, as YYYYMMDD; it changes at noon TAI.
    """
    return int(Time(mjd - 0.5, format="mjd", scale="tai").strftime("%Y%m%d"))


def read_warp_file_header(
    path: Path, primary: fits.Header, image: fits.Header, shape: tuple[int, ...], psf_shape: tuple[int, ...]
) -> WarpFileHeader:
    """Read and check the keywords of a warp file.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file.
    primary, image : `astropy.io.fits.Header`
        Headers of the primary HDU and of ``IMAGE``.
    shape, psf_shape : `tuple` [`int`, ...]
        Shapes of ``IMAGE`` and ``PSF``.

    Returns
    -------
    header : `WarpFileHeader`
        What the keywords say.

    Raises
    ------
    RefusalError
        Raised if a keyword is missing or has no valid value.
    """
    shifts = [_number(image if name in image else primary, name) or 0.0 for name in ("LTV2", "LTV1")]
    if any(shift != round(shift) for shift in shifts):
        raise RefusalError(f"LTV2, LTV1 = {shifts} are not whole numbers of pixels")
    start = YX(*(-round(shift) for shift in shifts))
    return WarpFileHeader(
        path=path,
        instrument=_required("INSTRUME", _text(primary, "INSTRUME", 32)),
        visit=_required("VISIT", _integer(primary, "VISIT", minimum=0)),
        band=_required("BAND", _text(primary, "BAND", 32)),
        physical_filter=_required("FILTER", _text(primary, "FILTER", 32)),
        exposure_time=_number(primary, "EXPTIME", 0.0, _LONGEST_EXPOSURE),
        mjd=_number(primary, "MJD", _FIRST_MJD, _LAST_MJD),
        skymap=_text(primary, "SKYMAP", MAX_SKYMAP_LENGTH),
        tract=_integer(primary, "TRACT", minimum=0),
        patch=_integer(primary, "PATCH", minimum=0),
        cells=_read_cells(primary),
        bbox=Box.from_shape(shape, start=start),
        wcs=_read_wcs(image, start),
        psf_cells=(psf_shape[0], psf_shape[1]) if len(psf_shape) == 4 else None,
    )


def _value(header: fits.Header, name: str) -> str | int | float | None:
    """Return the value of a keyword, `None` where it is absent or blank."""
    value = header.get(name)
    return None if isinstance(value, fits.card.Undefined) or value == "" else value


def _required[T](name: str, value: T | None) -> T:
    if value is None:
        raise RefusalError(f"the keyword {name} is missing from the primary header")
    return value


def _text(header: fits.Header, name: str, max_length: int) -> str | None:
    value = _value(header, name)
    if value is not None and (not isinstance(value, str) or len(value) > max_length):
        raise RefusalError(f"{name} = {value!r} is not a text of at most {max_length} characters")
    return value


def _integer(header: fits.Header, name: str, minimum: int = -(2**31)) -> int | None:
    value = _value(header, name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
        raise RefusalError(f"{name} = {value!r} is not an integer of at least {minimum}")
    if value is not None and value > _LARGEST_INTEGER:
        raise RefusalError(f"{name} = {value} is larger than {_LARGEST_INTEGER}")
    return value


def _number(
    header: fits.Header, name: str, minimum: float = -math.inf, maximum: float = math.inf
) -> float | None:
    value = _value(header, name)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RefusalError(f"{name} = {value!r} is not a number")
    if not minimum <= value <= maximum:
        raise RefusalError(f"{name} = {value!r} is not between {minimum:g} and {maximum:g}")
    return float(value)


def _read_cells(header: fits.Header) -> CellGrid | None:
    """Return the cell grid that the primary header declares, if it does."""
    if not any(name in header for name in _GRID_KEYWORDS):
        return None
    cell, nx, ny = (_required(name, _integer(header, name, 1)) for name in ("CELLSZ", "PATNX", "PATNY"))
    x0, y0 = (_required(name, _integer(header, name)) for name in ("PATX0", "PATY0"))
    return cover_with_cells(Box.from_shape(YX(y=ny, x=nx), start=YX(y=y0, x=x0)), YX(y=cell, x=cell))


def _read_wcs(header: fits.Header, start: YX[int]) -> WCS:
    """Return the WCS of the tract from that of an array whose first pixel lies at ``start``."""
    for name in filter(_WCS_NUMBERS.fullmatch, header):
        _number(header, name)
    if missing := [name for name in ("CRVAL1", "CRVAL2") if _value(header, name) is None]:
        raise RefusalError(f"the WCS of IMAGE has no {missing[0]}")
    header = header.copy()
    header["CRPIX1"] = (_number(header, "CRPIX1") or 0.0) + start.x
    header["CRPIX2"] = (_number(header, "CRPIX2") or 0.0) + start.y
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (FITSFixedWarning, AstropyUserWarning))
            wcs = WCS(header, naxis=2)
            frame = wcs_to_celestial_frame(wcs).name if wcs.has_celestial else None
    except (WcsError, ValueError, TypeError, KeyError) as err:
        raise RefusalError(f"the WCS of IMAGE cannot be read ({' '.join(str(err).split())})") from err
    if frame is None:
        raise RefusalError("the header of IMAGE holds no celestial WCS")
    if frame != "icrs":
        raise RefusalError(f"the WCS of IMAGE is in the {frame} system; it must be in ICRS")
    return wcs
