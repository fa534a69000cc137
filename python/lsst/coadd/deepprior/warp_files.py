# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warp files: one visit of a patch as a plain FITS file.

A file has a primary header, the image extensions ``IMAGE``, ``MASK``, ``VARIANCE``, ``PSF``, and ``NOISE``
where there is one.  Positions are tract pixels, ``array index - LTV``.
"""

from __future__ import annotations

__all__ = ("InvalidWarpFileError", "WarpFile", "read_warp_file", "write_warp_file")

import dataclasses
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning

from lsst.images import Box, Mask, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images.cells import CellGrid, PatchDefinition

from .cells import make_cell_psf
from .psf import stamp_fault
from .warp_file_header import RefusalError, WarpFileHeader, read_warp_file_header
from .warps import InvalidWarpError, Warp

_UNREADABLE = (OSError, EOFError, TypeError, ValueError, LookupError, zlib.error, fits.VerifyError)
"""What astropy raises for files that are damaged or not FITS."""


class InvalidWarpFileError(ValueError):
    """Raised for a file that is no valid warp file; the message is one sentence.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file.
    reason : `str`
        What is wrong, and what to do where that is not plain, without a full stop.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}.")


@dataclasses.dataclass(frozen=True, eq=False)
class WarpFile:
    """Content of a warp file.

    Parameters
    ----------
    header : `WarpFileHeader`
        All but the pixels.
    image, variance : `numpy.ndarray`, (y, x), float32
        Flux in nJy and variance in nJy^2; infinite values were replaced by NaN.
    mask : `lsst.images.Mask`
        Mask planes; pixels with a bit that no keyword names have the plane ``NO_DATA``.
    psf : `numpy.ndarray`, (k, k) or (cell_i, cell_j, k, k)
        PSF stamps, NaN in cells in which the visit has no data.
    noise : `numpy.ndarray`, (y, x), float32, or `None`
        Noise-only image in nJy.
    """

    header: WarpFileHeader
    image: np.ndarray
    variance: np.ndarray
    mask: Mask
    psf: np.ndarray
    noise: np.ndarray | None

    def to_warp(self, patch: PatchDefinition, sky_projection: SkyProjection[TractFrame]) -> Warp:
        """Put the pixels on the grid of a patch.

        Parameters
        ----------
        patch : `lsst.images.cells.PatchDefinition`
            Definition of the patch.
        sky_projection : `lsst.images.SkyProjection`
            Projection of the tract.

        Returns
        -------
        warp : `Warp`
            The warp, without PSF in cells that the file does not reach.

        Raises
        ------
        InvalidWarpFileError
            Raised if the file does not fit the patch.
        """
        grid = patch.cells
        size = grid.grid_size
        if self.header.psf_cells not in (None, size.as_tuple()):
            raise InvalidWarpFileError(
                self.header.path,
                f"it has PSF stamps for {self.header.psf_cells} cells, its patch has {size.as_tuple()}",
            )
        stamps = np.full((size.i, size.j, *self.psf.shape[-2:]), np.nan)
        reached = _reached(grid, self.header.bbox)
        stamps[reached] = self.psf[reached] if self.psf.ndim == 4 else self.psf
        try:
            return Warp(
                instrument=self.header.instrument,
                visit=self.header.visit,
                physical_filter=self.header.physical_filter,
                band=self.header.band,
                day_obs=self.header.day_obs,
                image=self.image,
                variance=self.variance,
                mask=self.mask,
                bbox=self.header.bbox,
                psf=make_cell_psf(stamps, grid),
                sky_projection=sky_projection,
                patch=patch,
                noise=() if self.noise is None else (self.noise,),
            )
        except InvalidWarpError as err:
            raise InvalidWarpFileError(self.header.path, str(err).removesuffix(".")) from err


def read_warp_file(path: str | Path) -> WarpFile:
    """Read and check a warp file.

    Parameters
    ----------
    path : `str` or `~pathlib.Path`
        The file.

    Returns
    -------
    warp_file : `WarpFile`
        Its content.

    Raises
    ------
    InvalidWarpFileError
        Raised if the file is not a complete FITS file or not a valid warp file.
    """
    path = Path(path)
    try:
        return _interpret(path, _load(path))
    except RefusalError as err:
        raise InvalidWarpFileError(path, str(err)) from err


def write_warp_file(
    path: str | Path, warp: Warp, *, exposure_time: float | None = None, mjd: float | None = None
) -> None:
    """Write a warp file, replacing an older one.

    Parameters
    ----------
    path : `str` or `~pathlib.Path`
        The file.
    warp : `Warp`
        What to write.  Its cells must be square.
    exposure_time : `float`, optional
        Exposure time in seconds.
    mjd : `float`, optional
        Middle of the exposure as MJD in TAI.

    Raises
    ------
    ValueError
        Raised if the format cannot hold the warp.
    """
    cells = warp.patch.cells
    planes = list(warp.mask.schema.names)
    if cells.cell_shape.y != cells.cell_shape.x:
        raise ValueError(f"{warp.label}: a warp file cannot hold cells that are not square.")
    if len(warp.noise) > 1:
        raise ValueError(f"{warp.label}: a warp file cannot hold more than one noise image.")
    if len(planes) > 31:
        raise ValueError(f"{warp.label}: a warp file cannot hold more than 31 mask planes.")
    wcs = warp.sky_projection.as_fits_wcs(warp.bbox, allow_approximation=True)
    if wcs is None:
        raise ValueError(f"{warp.label}: its sky projection has no FITS form.")

    primary = fits.Header()
    frame = warp.sky_projection.pixel_frame
    primary.update(
        {name: value for name, value in (("EXPTIME", exposure_time), ("MJD", mjd)) if value is not None},
        INSTRUME=warp.instrument,
        VISIT=warp.visit,
        BAND=warp.band,
        FILTER=warp.physical_filter,
        SKYMAP=frame.skymap,
        TRACT=frame.tract,
        PATCH=warp.patch.id,
        CELLSZ=cells.cell_shape.x,
        PATX0=cells.bbox.x.start,
        PATY0=cells.bbox.y.start,
        PATNX=cells.bbox.x.size,
        PATNY=cells.bbox.y.size,
    )

    pixel_header = wcs.to_header(relax=True)
    pixel_header["LTV1"] = -warp.bbox.x.start
    pixel_header["LTV2"] = -warp.bbox.y.start

    bits = np.zeros(tuple(warp.bbox.shape), dtype=np.int32)
    mask_header = pixel_header.copy()
    for bit, plane in enumerate(planes):
        bits |= warp.mask.get(plane).astype(np.int32) << bit
        mask_header[f"HIERARCH MP_{plane}"] = bit
    image_header, variance_header = pixel_header.copy(), pixel_header.copy()
    image_header["BUNIT"] = "nJy"
    variance_header["BUNIT"] = "nJy2"
    hdus = [
        fits.PrimaryHDU(header=primary),
        fits.ImageHDU(warp.image.astype(np.float32, copy=False), image_header, name="IMAGE"),
        fits.ImageHDU(bits, mask_header, name="MASK"),
        fits.ImageHDU(warp.variance.astype(np.float32, copy=False), variance_header, name="VARIANCE"),
        fits.ImageHDU(_shared_stamp(warp).astype(np.float32), name="PSF"),
    ]
    if warp.noise:
        hdus.append(fits.ImageHDU(warp.noise[0].astype(np.float32, copy=False), image_header, name="NOISE"))
    fits.HDUList(hdus).writeto(path, overwrite=True)


def _shared_stamp(warp: Warp) -> np.ndarray:
    """Return the one stamp (k, k) that all cells that the warp reaches share, or, if there is none, all."""
    stamps = warp.psf_stamps
    reached = stamps[_reached(warp.patch.cells, warp.bbox)].reshape(-1, *stamps.shape[-2:])
    return reached[0] if np.all(reached == reached[0]) else stamps


def _reached(grid: CellGrid, bbox: Box) -> tuple[slice, slice]:
    """Return the cells (i, j) that a box reaches."""
    first, last = (grid.index_of(y=y, x=x) for y, x in ((bbox.y.min, bbox.x.min), (bbox.y.max, bbox.x.max)))
    return slice(first.i, last.i + 1), slice(first.j, last.j + 1)


def _load(path: Path) -> dict[str, tuple[fits.Header, np.ndarray]]:
    """Read the headers and pixels of all HDUs; the primary one has the name ``PRIMARY``."""
    result: dict[str, tuple[fits.Header, np.ndarray]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            with fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
                for hdu in hdus:
                    if hdu.is_image and hdu.name not in result:
                        list(hdu.header.items())  # makes astropy parse the cards
                        result[hdu.name] = (hdu.header, np.empty(0) if hdu.data is None else hdu.data)
    except FileNotFoundError:
        raise RefusalError("there is no such file") from None
    except AstropyUserWarning:
        raise RefusalError("the file is truncated") from None
    except _UNREADABLE as err:
        raise RefusalError(f"it is not a complete FITS file ({str(err).rstrip('.')})") from err
    return result


def _interpret(path: Path, hdus: Mapping[str, tuple[fits.Header, np.ndarray]]) -> WarpFile:
    """Check the content of a file."""
    for name in ("IMAGE", "MASK", "VARIANCE", "PSF"):
        if name not in hdus:
            raise RefusalError(f"the extension {name} is missing")
        if hdus[name][1].size == 0:
            raise RefusalError(f"the extension {name} is empty")
    image_header, image = hdus["IMAGE"]
    variance_header, variance = hdus["VARIANCE"]
    mask_header, mask = hdus["MASK"]
    noise_header, noise = hdus.get("NOISE", (fits.Header(), None))
    psf = hdus["PSF"][1]

    if image.ndim != 2:
        raise RefusalError(f"IMAGE has {image.ndim} dimensions, not 2")
    for name, plane in (("MASK", mask), ("VARIANCE", variance), ("NOISE", noise)):
        if plane is not None and plane.shape != image.shape:
            raise RefusalError(f"{name} has the shape {plane.shape}, IMAGE {image.shape}")
    if not np.issubdtype(mask.dtype, np.integer):
        raise RefusalError(f"MASK is of type {mask.dtype}, not of an integer type")
    _check_unit("IMAGE", image_header.get("BUNIT", ""), (u.nJy,))
    # Files are found whose variance carries the unit of the image.
    _check_unit("VARIANCE", variance_header.get("BUNIT", "nJy2"), (u.nJy**2, u.nJy))
    _check_unit("NOISE", noise_header.get("BUNIT", "nJy"), (u.nJy,))
    _check_psf(psf)

    header = read_warp_file_header(path, hdus["PRIMARY"][0], image_header, image.shape, psf.shape)
    return WarpFile(
        header=header,
        image=_finite(image),
        variance=_finite(variance),
        mask=_read_mask(mask_header, mask, header.bbox),
        psf=psf.astype(np.float64),
        noise=None if noise is None else _finite(noise),
    )


def _check_unit(name: str, text: object, allowed: tuple[u.UnitBase, ...]) -> None:
    if not isinstance(text, str) or u.Unit(text, parse_strict="silent") not in allowed:
        found = f"in the unit {text!r}" if text else "without BUNIT"
        raise RefusalError(f"{name} is {found}; it must be in {allowed[0]}")


def _check_psf(psf: np.ndarray) -> None:
    """Refuse PSF arrays that are no set of odd-sized stamps of PSFs."""
    if psf.ndim not in (2, 4):
        raise RefusalError(
            f"PSF has {psf.ndim} dimensions; it must be one stamp (2) or one for each cell (4)"
        )
    height, width = psf.shape[-2:]
    if height != width or height % 2 == 0:
        raise RefusalError(f"the PSF has {height}x{width} pixels; it must be square with an odd size")
    stamps = psf.reshape(-1, height, width)
    stamps = stamps[~np.isnan(stamps).all(axis=(1, 2))]
    if not len(stamps):
        raise RefusalError("the PSF is empty, it holds nothing but NaN")
    for stamp in stamps:
        if fault := stamp_fault(stamp):
            raise RefusalError(f"a PSF stamp {fault}")


def _finite(array: np.ndarray) -> np.ndarray:
    """Return float32 pixels with NaN in place of infinite values, which lossy compression would spread."""
    array = array.astype(np.float32)
    array[np.isinf(array)] = np.nan
    return array


def _read_mask(header: fits.Header, array: np.ndarray, bbox: Box) -> Mask:
    """Return the mask planes that ``MP_`` keywords name."""
    bits = {keyword.removeprefix("MP_"): header[keyword] for keyword in header if keyword.startswith("MP_")}
    for name, bit in bits.items():
        if not isinstance(bit, int) or not 0 <= bit <= 31:
            raise RefusalError(f"MP_{name} = {bit!r} is not the number of a mask bit, 0 to 31")
    # Through an unsigned type of the same size, in which the highest bit is no sign.
    pixels = array.astype(f"u{array.dtype.itemsize}").astype(np.uint64)
    names = dict.fromkeys([*bits, "NO_DATA"])
    mask = Mask(
        schema=MaskSchema([MaskPlane(name, f"Plane {name} of the warp file.") for name in names]), bbox=bbox
    )
    for name, bit in bits.items():
        mask.set(name, (pixels >> bit) & 1)
    named = sum(1 << bit for bit in set(bits.values()))
    mask.set("NO_DATA", pixels & ~np.uint64(named))
    return mask
