# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps: one visit resampled to the pixel grid of a patch."""

from __future__ import annotations

__all__ = ("InvalidWarpError", "Warp", "WarpInfo", "psf_shapes")

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import astropy.units as u
import numpy as np

from lsst.images import Box, Image, Mask, Polygon, SkyProjection, TractFrame
from lsst.images.cells import CellCoadd, CellGrid, CellPointSpreadFunction, PatchDefinition

from .cells import fill_cells, make_cell_field, make_cell_psf, spread_cell_field
from .observation import Observation
from .provenance import make_provenance
from .psf import stamp_fault

_LARGEST_VARIANCE = 1e5
"""Variance, as a multiple of `_usual_variance`, above which a pixel is marked as bad and not measured: a full
pixel holds no more than some 1e5 electrons, whose variance stands against that of a read noise of 2 electrons
or more. Nor is a pixel measured that many times better than the usual ones."""

_GAP = 7
"""Powers of 2 that no pixel has as its variance, from which the pixels on either side count as two groups."""

_SMALLEST_GROUP = 0.01
"""Part of the pixels that a group must have to be taken for those that were measured."""


class InvalidWarpError(ValueError):
    """Raised for a warp whose parts do not fit together; the message is one sentence that names the visit."""


@dataclasses.dataclass(frozen=True, eq=False)
class WarpInfo:
    """What is remembered of a warp once its pixels are dropped.

    Parameters
    ----------
    instrument, physical_filter, band : `str`
        Names of the instrument, the filter and the band.
    visit, day_obs : `int`
        Visit ID, and night of the observation as YYYYMMDD.
    bbox : `lsst.images.Box`
        Box of the warp in tract pixels.
    psf_shapes : `numpy.ndarray`, (cell_i, cell_j, 3)
        Adaptive second moments xx, yy, xy of the PSF in each cell of the patch, in pixel^2; NaN in cells
        without PSF and where the measurement failed.
    detectors : `~collections.abc.Mapping` [`int`, `lsst.images.Polygon`]
        Outline of each detector of the visit in tract pixels, at least one.
    aperture_corrections : `~collections.abc.Mapping` [`str`, `numpy.ndarray`]
        Factor (cell_i, cell_j) of each flux of the visit, by its name; NaN where it is not known.
    """

    instrument: str
    visit: int
    physical_filter: str
    band: str
    day_obs: int
    bbox: Box
    psf_shapes: np.ndarray
    detectors: Mapping[int, Polygon]
    aperture_corrections: Mapping[str, np.ndarray]

    @property
    def label(self) -> str:
        """What messages call the visit (`str`)."""
        return f"{self.instrument} visit {self.visit}"


@dataclasses.dataclass(frozen=True, eq=False)
class Warp:
    """One visit on the pixel grid of a patch, validated on construction.

    Parameters
    ----------
    instrument, physical_filter, band : `str`
        Names of the instrument, the filter and the band.
    visit, day_obs : `int`
        Visit ID, and night of the observation as YYYYMMDD.
    image : `numpy.ndarray`, (y, x), float32
        Background-subtracted flux in nJy.
    variance : `numpy.ndarray`, (y, x), float32
        Variance in nJy^2, NaN where unknown.
    mask : `lsst.images.Mask`
        Mask planes on the same box.
    bbox : `lsst.images.Box`
        Box of the arrays in tract pixels; it may cover only a part of the patch.
    psf : `lsst.images.cells.CellPointSpreadFunction`
        PSF stamps, odd-sized, on the cell grid of the patch.  A cell whose stamp is NaN counts as missing.
    sky_projection : `lsst.images.SkyProjection`
        Projection of the tract.
    patch : `lsst.images.PatchDefinition`
        Identifiers and cell grid of the patch.
    noise : `tuple` [`numpy.ndarray`], optional
        Images (y, x) of noise alone, in nJy, that were warped like the data.
    detectors : `~collections.abc.Mapping` [`int`, `lsst.images.Polygon`], optional
        Outline of each detector in tract pixels, by its ID. Without any, the visit counts as one detector,
        with the ID 0 and the outline of ``bbox``.
    aperture_corrections : `~collections.abc.Mapping` [`str`, `numpy.ndarray`], optional
        Factors (cell_i, cell_j) that fluxes are to be multiplied with, by the name of the flux, NaN where
        they are not known.

    Raises
    ------
    InvalidWarpError
        Raised if the parts do not fit together.
    """

    instrument: str
    visit: int
    physical_filter: str
    band: str
    day_obs: int
    image: np.ndarray
    variance: np.ndarray
    mask: Mask
    bbox: Box
    psf: CellPointSpreadFunction
    sky_projection: SkyProjection[TractFrame]
    patch: PatchDefinition
    noise: tuple[np.ndarray, ...] = ()
    detectors: Mapping[int, Polygon] = dataclasses.field(default_factory=dict)
    aperture_corrections: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = self.patch.cells
        planes = {"image": self.image, "variance": self.variance}
        planes |= {f"noise image {n}": noise for n, noise in enumerate(self.noise)}
        for name, plane in planes.items():
            if plane.shape != tuple(self.bbox.shape):
                raise self._invalid(
                    f"the {name} has the shape {plane.shape}, its box {tuple(self.bbox.shape)}"
                )
            if not np.issubdtype(plane.dtype, np.floating):
                raise self._invalid(f"the {name} is of type {plane.dtype} and not of a floating-point type")
        if self.mask.bbox != self.bbox:
            raise self._invalid(f"the mask covers {self.mask.bbox}, the image {self.bbox}")
        if not isinstance(self.sky_projection.pixel_frame, TractFrame):
            raise self._invalid("the sky projection is not that of a tract")
        if grid.bbox.y.size % grid.cell_shape.y or grid.bbox.x.size % grid.cell_shape.x:
            raise self._invalid(f"the box of patch {self.patch.id} is not a whole number of cells")
        if not grid.bbox.contains(self.bbox):
            raise self._invalid(f"its box {self.bbox} leaves that of patch {self.patch.id}, {grid.bbox}")
        if self.psf.grid != grid:
            raise self._invalid(f"its PSF has another cell grid than patch {self.patch.id}")
        for name, factors in self.aperture_corrections.items():
            if factors.shape != grid.grid_size.as_tuple():
                raise self._invalid(
                    f"the aperture correction {name} has the shape {factors.shape}, its patch "
                    f"{grid.grid_size.as_tuple()} cells"
                )
        self.psf_stamps  # noqa: B018  (reading the stamps checks them)

    def _invalid(self, reason: str) -> InvalidWarpError:
        return InvalidWarpError(f"{self.label}: {reason}.")

    @property
    def label(self) -> str:
        """What messages call the visit (`str`)."""
        return f"{self.instrument} visit {self.visit}"

    @functools.cached_property
    def psf_stamps(self) -> np.ndarray:
        """PSF stamps of all cells of the patch (`numpy.ndarray`, (cell_i, cell_j, k, k), float64).

        Stamps have unit sum, and are NaN in cells without PSF.
        """
        height, width = self.psf.kernel_bbox.shape
        if height != width:
            raise self._invalid(f"its PSF stamps are not square but {height}x{width} pixels")
        size = self.patch.cells.grid_size
        stamps = np.full((size.i, size.j, height, width), np.nan)
        for cell in self.psf.bounds.cell_indices():
            try:
                stamp = self.psf[cell].array
            except ValueError:
                raise self._invalid("its PSF stamps have an even size and so no central pixel") from None
            if np.isnan(stamp).all():
                continue
            if fault := stamp_fault(stamp):
                raise self._invalid(f"the PSF stamp of cell ({cell.i}, {cell.j}) {fault}")
            stamps[cell.i, cell.j] = stamp / stamp.sum(dtype=np.float64)
        return stamps

    @property
    def has_psf(self) -> np.ndarray:
        """Cells of the patch in which the visit has a PSF (`numpy.ndarray`, (cell_i, cell_j), bool)."""
        return np.isfinite(self.psf_stamps[:, :, 0, 0])

    @property
    def in_psf_cell(self) -> np.ndarray:
        """Pixels that lie in a cell in which the visit has a PSF (`numpy.ndarray`, (y, x), bool)."""
        grid = self.patch.cells
        return fill_cells(self.has_psf, grid)[self.bbox.slice_within(grid.bbox)]

    @property
    def info(self) -> WarpInfo:
        """The warp without its pixels (`WarpInfo`)."""
        return WarpInfo(
            instrument=self.instrument,
            visit=self.visit,
            physical_filter=self.physical_filter,
            band=self.band,
            day_obs=self.day_obs,
            bbox=self.bbox,
            psf_shapes=psf_shapes(self.psf_stamps),
            detectors=self.detectors or {0: Polygon.from_box(self.bbox)},
            aperture_corrections=self.aperture_corrections,
        )

    def flagged(self, planes: Iterable[str]) -> np.ndarray:
        """Find the pixels in which any of some mask planes is set.

        Parameters
        ----------
        planes : `~collections.abc.Iterable` [`str`]
            Names of mask planes; those that this warp does not have are ignored, since warps of different
            origin have different planes.

        Returns
        -------
        flagged : `numpy.ndarray`, (y, x), bool
            Pixels with one of the planes set.
        """
        result = np.zeros(tuple(self.bbox.shape), dtype=bool)
        for plane in self.mask.schema.names & set(planes):
            result |= self.mask.get(plane)
        return result

    def unusable(self, bad_planes: Iterable[str]) -> np.ndarray:
        """Find the pixels that say nothing about the sky.

        Parameters
        ----------
        bad_planes : `~collections.abc.Iterable` [`str`]
            Mask planes that make a pixel unusable.

        Returns
        -------
        unusable : `numpy.ndarray`, (y, x), bool
            Pixels that have no finite flux, no positive finite variance, a variance beyond all that noise can
            be (SExtractor and SWarp mark bad pixels with 1e30) or next to none, one of the planes set, or
            that lie in a cell in which the visit has no PSF.
        """
        result = self.flagged(bad_planes)
        result |= ~self.in_psf_cell
        result |= ~np.isfinite(self.image)
        result |= ~(np.isfinite(self.variance) & (self.variance > 0.0))
        usual = _usual_variance(self.image, self.variance, ~result)
        result |= self.variance > _LARGEST_VARIANCE * usual
        result |= self.variance < usual / _LARGEST_VARIANCE
        return result

    def observation(self, bad_planes: Iterable[str]) -> Observation:
        """Return the warp as plain arrays.

        Parameters
        ----------
        bad_planes : `~collections.abc.Iterable` [`str`]
            Mask planes that make a pixel unusable.

        Returns
        -------
        observation : `Observation`
            The visit, with array positions counted from the lower left corner of the patch.
        """
        start = self.patch.cells.bbox.start
        return Observation(
            flux=self.image,
            variance=self.variance,
            good=~self.unusable(bad_planes),
            psf=self.psf_stamps,
            origin=(self.bbox.y.start - start.y, self.bbox.x.start - start.x),
            name=self.label,
            noise=self.noise[0] if self.noise else None,
        )

    @classmethod
    def from_cell_coadd(cls, coadd: CellCoadd) -> Warp:
        """Read a warp from a one-visit cell coadd.

        Parameters
        ----------
        coadd : `lsst.images.cells.CellCoadd`
            Coadd in nJy whose provenance names one visit.

        Returns
        -------
        warp : `Warp`
            The warp; it shares its arrays with ``coadd``.

        Raises
        ------
        InvalidWarpError
            Raised if the coadd is not that of one visit, has no band or is not in nJy, or if its parts do not
            fit together.
        """
        try:
            inputs = coadd.provenance.inputs
            patch = coadd.patch
        except AttributeError as err:
            raise InvalidWarpError(f"Not a one-visit coadd: {err}") from None
        first = inputs[0]
        label = f"{first['instrument']} visit {first['visit']}"
        if len({(row["instrument"], row["visit"]) for row in inputs}) != 1:
            raise InvalidWarpError(f"{label}: not a one-visit coadd, its provenance names several visits.")
        if coadd.unit != u.nJy:
            raise InvalidWarpError(f"{label}: its pixels are in {coadd.unit}, not nJy.")
        if coadd.band is None:
            raise InvalidWarpError(f"{label}: its band is not known.")
        return cls(
            instrument=str(first["instrument"]),
            visit=int(first["visit"]),
            physical_filter=str(first["physical_filter"]),
            band=coadd.band,
            day_obs=int(first["day_obs"]),
            image=coadd.image.array,
            variance=coadd.variance.array,
            mask=coadd.mask,
            bbox=coadd.bbox,
            psf=coadd.psf,
            sky_projection=coadd.sky_projection,
            patch=patch,
            noise=tuple(noise.array for noise in coadd.noise_realizations),
            detectors={int(row["detector"]): row["polygon"] for row in inputs},
            aperture_corrections={
                name: spread_cell_field(field) for name, field in coadd.aperture_corrections.items()
            },
        )

    def to_cell_coadd(self) -> CellCoadd:
        """Return the warp as a one-visit cell coadd, the form in which the Butler stores it.

        Returns
        -------
        coadd : `lsst.images.cells.CellCoadd`
            Coadd that shares its arrays with the warp, with one row of inputs, and one row of contributions
            for each cell in which the visit has pixels and a PSF.
        """
        overlap = _cell_fraction(np.ones_like(self.image, dtype=bool), self.bbox, self.patch.cells)
        unmasked = _cell_fraction(~self.unusable(()), self.bbox, self.patch.cells)
        contributes = self.has_psf & (overlap > 0.0)
        psf = make_cell_psf(self.psf_stamps, self.patch.cells)[self.bbox]
        return CellCoadd(
            Image(self.image, bbox=self.bbox, unit=u.nJy, sky_projection=self.sky_projection),
            mask=self.mask,
            variance=Image(self.variance, bbox=self.bbox, unit=u.nJy**2),
            noise_realizations=[Image(noise, bbox=self.bbox, unit=u.nJy) for noise in self.noise],
            band=self.band,
            psf=psf,
            aperture_corrections={
                name: make_cell_field(factors, psf.bounds)
                for name, factors in self.aperture_corrections.items()
            },
            patch=self.patch,
            provenance=make_provenance(
                [self.info],
                self.patch,
                contributes=contributes[np.newaxis],
                weight=contributes[np.newaxis].astype(float),
                overlap_fraction=overlap[np.newaxis],
                unmasked_fraction=unmasked[np.newaxis],
            ),
        )


def _usual_variance(flux: np.ndarray, variance: np.ndarray, usable: np.ndarray) -> float:
    """Return a variance of many usable pixels, infinite without any.

    Most pixels may be marked by huge variances, or have no data and next to no variance. Of groups of pixels
    whose variances lie far apart, those were measured whose fluxes scatter as their variances say.
    """
    variance = variance[usable]
    if not variance.size:
        return np.inf
    if variance.max() <= _LARGEST_VARIANCE * variance.min():
        return float(variance.min())
    flux = flux[usable]
    power = np.frexp(variance)[1]
    power -= power.min()
    powers = np.flatnonzero(np.bincount(power))
    groups = []
    for group in np.split(powers, np.flatnonzero(np.diff(powers) > _GAP) + 1):
        members = (power >= group[0]) & (power <= group[-1])
        share = members.mean()
        if share >= _SMALLEST_GROUP:
            scatter = np.median(np.abs(flux[members]) / np.sqrt(variance[members]))
            off = round(abs(np.log10(scatter))) if scatter > 0.0 else np.inf
            groups.append((off, -share, float(np.quantile(variance[members], 0.1, method="lower"))))
    return min(groups)[2]


def _cell_fraction(chosen: np.ndarray, bbox: Box, grid: CellGrid) -> np.ndarray:
    """Return the fraction of each cell's pixels that are chosen, (cell_i, cell_j)."""
    pixels = np.zeros(tuple(grid.bbox.shape), dtype=bool)
    pixels[bbox.slice_within(grid.bbox)] = chosen
    size = grid.grid_size
    return pixels.reshape(size.i, grid.cell_shape.y, size.j, grid.cell_shape.x).mean(axis=(1, 3))


def psf_shapes(stamps: np.ndarray) -> np.ndarray:
    """Measure the adaptive moments of PSF stamps.

    Parameters
    ----------
    stamps : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Stamps, NaN in cells without a PSF.

    Returns
    -------
    shapes : `numpy.ndarray`, (cell_i, cell_j, 3)
        Moments xx, yy, xy in pixel^2, NaN without a PSF and where the measurement failed.
    """
    shapes = np.full(stamps.shape[:2] + (3,), np.nan)
    last_stamp, last_shape = None, shapes[0, 0]
    for index in np.ndindex(stamps.shape[:2]):
        stamp = stamps[index]
        if not np.isfinite(stamp[0, 0]):
            continue
        if last_stamp is None or not np.array_equal(stamp, last_stamp):
            last_stamp, last_shape = stamp, _adaptive_moments(stamp)
        shapes[index] = last_shape
    return shapes


def _adaptive_moments(stamp: np.ndarray) -> np.ndarray:
    """Measure the adaptive moments xx, yy, xy of a stamp in pixel^2; NaN where they do not converge."""
    import galsim  # takes a third of a second, and is needed once a patch is restored

    result = galsim.hsm.FindAdaptiveMom(galsim.Image(stamp), strict=False)
    if result.error_message:
        return np.full(3, np.nan)
    e1, e2 = result.observed_e1, result.observed_e2
    half_trace = result.moments_sigma**2 / np.sqrt(1.0 - e1**2 - e2**2)
    return half_trace * np.array([1.0 + e1, 1.0 - e1, e2])
