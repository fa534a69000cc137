# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Simulated scenes with known truth, as catalogues, warps and warp files.

The flux of an object is that which falls into a PSF stamp, since stamps have unit sum.
"""

from __future__ import annotations

__all__ = (
    "INSTRUMENT",
    "MAX_VISITS",
    "Scene",
    "SceneConfig",
    "add_glow",
    "render",
    "simulate_scene",
    "write_scene",
)

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from lsst.images import YX, Box, Mask, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images.cells import CellGrid, PatchDefinition

from .cells import make_cell_psf
from .defects import cut_border, gaps, masked_cosmic_rays, trail, unmasked_cosmic_rays
from .psf import FWHM_PER_SIGMA
from .resampling import Resampling
from .truth import (
    AB_ZERO_POINT,
    BANDS,
    GALSIM,
    SceneConfig,
    add_object,
    galaxy_profile,
    make_objects,
    render,
)
from .warp_file_header import night_of
from .warp_files import write_warp_file
from .warps import Warp

INSTRUMENT = "DeepPriorSim"
"""Name of the simulated instrument (`str`)."""

MAX_VISITS = 1000
"""Number of visits of a band that have numbers of their own (`int`)."""

_SKYMAP = "deepprior_sim"
_TRACT = 9
_TRACT_CENTRE = 15000
"""Tract pixel, in x and y, of the tangential point of the projection."""

_STANDARD = SceneConfig()

_MOFFAT_BETA = 3.5

_TOUCHED = 0.1
"""Change by an artifact, in units of the sky noise, above which a pixel counts as touched by it."""

_SCHEMA = MaskSchema(
    [
        MaskPlane("BAD", "Bad pixel of the detector."),
        MaskPlane("SAT", "Pixel was saturated."),
        MaskPlane("CR", "Pixel was hit by a cosmic ray."),
        MaskPlane("NO_DATA", "No data was available for this pixel."),
    ]
)


class Scene:
    """A patch of sky with known objects, and the visits that see it.

    Parameters
    ----------
    config : `SceneConfig`, optional
        What the scene is made of.
    """

    def __init__(self, config: SceneConfig = _STANDARD) -> None:
        self.config = config
        height, width = config.cell_shape
        shape = YX(y=config.n_cells[0] * height, x=config.n_cells[1] * width)
        grid = CellGrid(bbox=Box.from_shape(shape, start=YX(*config.start)), cell_shape=YX(y=height, x=width))
        self.patch = PatchDefinition(
            id=config.patch_id,
            index=YX(y=config.start[0] // shape.y, x=config.start[1] // shape.x),
            inner_bbox=grid.bbox,
            cells=grid,
        )
        self._wcs = wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.radesys = "ICRS"
        wcs.wcs.crval = [150.1, 2.2]
        wcs.wcs.crpix = [_TRACT_CENTRE + 1.0, _TRACT_CENTRE + 1.0]
        wcs.wcs.cd = np.diag([-config.pixel_scale, config.pixel_scale]) / 3600.0
        self.sky_projection: SkyProjection[TractFrame] = SkyProjection.from_fits_wcs(
            wcs, TractFrame(skymap=_SKYMAP, tract=_TRACT, bbox=grid.bbox), pixel_bounds=grid.bbox
        )

    def catalogue(self, band: str) -> Table:
        """Return all objects in and up to 4 arcsec around the patch.

        Parameters
        ----------
        band : `str`
            Band of the fluxes.

        Returns
        -------
        catalogue : `astropy.table.Table`
            Columns ``id``, ``type`` (star or galaxy), ``x``, ``y`` (tract pixels), ``ra``, ``dec``, ``mag``,
            ``flux_nJy``, ``pair_id`` (-1: no member of a pair), and for galaxies ``hlr`` (half-light radius
            of the major axis), ``sersic_n``, ``axis_ratio`` and ``angle`` (of the major axis, from x to y).
        """
        if band not in BANDS:
            raise ValueError(f"There is no simulated band {band!r}; choose from {', '.join(BANDS)}.")
        result = make_objects(self.config, self.patch.outer_bbox)
        result["mag"] += BANDS[band] * result["colour"]
        del result["colour"]
        result["flux_nJy"] = 10.0 ** ((AB_ZERO_POINT - result["mag"]) / 2.5)
        result["ra"], result["dec"] = self._wcs.pixel_to_world_values(result["x"], result["y"])
        for name, unit in {"x": u.pix, "y": u.pix, "ra": u.deg, "dec": u.deg, "angle": u.deg}.items():
            result[name].unit = unit
        result["hlr"].unit = u.arcsec
        result["flux_nJy"].unit = u.nJy
        result["mag"].unit = u.ABmag
        return result

    def warp(self, number: int, band: str) -> Warp:
        """Simulate a visit.

        Parameters
        ----------
        number : `int`
            Number of the visit, from 0.
        band : `str`
            Band of the visit.

        Returns
        -------
        warp : `Warp`
            The visit.
        """
        config = self.config
        visit = self._visit(number, band)
        sky_noise, bbox, psf = visit.sky_noise, visit.bbox, visit.psf
        model = self._draw(bbox, psf, self.catalogue(band), sky_noise)
        gain = 10.0 ** ((AB_ZERO_POINT - config.sky_magnitude) / 2.5) * config.pixel_scale**2 / sky_noise**2
        photons = np.maximum(model, 0.0)
        if visit.resampling is None:
            variance = sky_noise**2 + photons / gain
            image = model + np.sqrt(variance) * visit.noise
        else:
            detector_variance = sky_noise**2 + visit.resampling.at_detector(photons) / gain
            variance = visit.resampling.variance(detector_variance)
            image = model + visit.resampling.image(np.sqrt(detector_variance) * visit.noise)
        image += visit.background
        image += visit.artifacts
        mask = Mask(schema=_SCHEMA, bbox=bbox)
        saturated = image > config.saturation
        image[saturated] = config.saturation
        mask.set("SAT", saturated)
        area = image.size * (config.pixel_scale / 60.0) ** 2
        hit = masked_cosmic_rays(bbox.shape, visit.rng.poisson(area * config.cosmic_ray_density), visit.rng)
        image[hit] += sky_noise * visit.rng.uniform(20.0, 500.0, np.count_nonzero(hit))
        mask.set("CR", hit)
        bad = np.zeros(image.shape, dtype=bool)
        bad[:, visit.rng.integers(0, image.shape[1], config.n_bad_columns)] = True
        image[bad] = sky_noise * visit.rng.uniform(-1000.0, 1000.0, np.count_nonzero(bad))
        mask.set("BAD", bad)
        image[visit.no_data] = variance[visit.no_data] = np.nan
        mask.set("NO_DATA", visit.no_data)
        return Warp(
            instrument=INSTRUMENT,
            visit=MAX_VISITS * (list(BANDS).index(band) + 1) + number,
            physical_filter=f"{band}_sim",
            band=band,
            day_obs=night_of(self.mjd(number, band)),
            image=image.astype(np.float32),
            variance=variance.astype(np.float32),
            mask=mask,
            bbox=bbox,
            psf=make_cell_psf(psf.stamps(self.patch.cells), self.patch.cells),
            sky_projection=self.sky_projection,
            patch=self.patch,
        )

    def artifacts(self, number: int, band: str) -> np.ndarray:
        """Return where an unmasked trail or cosmic ray touches a visit.

        Parameters
        ----------
        number : `int`
            Number of the visit, from 0.
        band : `str`
            Band of the visit.

        Returns
        -------
        artifacts : `numpy.ndarray`, (y, x), bool
            Pixels of the patch that have data and that the artifact changes by more than a tenth of the sky
            noise.
        """
        visit = self._visit(number, band)
        result = np.zeros(tuple(self.patch.outer_bbox.shape), dtype=bool)
        touched = (np.abs(visit.artifacts) > _TOUCHED * visit.sky_noise) & ~visit.no_data
        result[visit.bbox.slice_within(self.patch.outer_bbox)] = touched
        return result

    def _visit(self, number: int, band: str) -> _Visit:
        """Draw all of a visit that does not depend on what it looks at."""
        config = self.config
        band_number = list(BANDS).index(band)
        visit_rng = np.random.default_rng([config.seed, band_number, number, 1])
        rng = np.random.default_rng([config.seed, config.patch_id, band_number, number, 2])
        psf = _VisitPsf(config, self.patch.outer_bbox, visit_rng)
        sky_noise = _sky_noise(config, config.depth + config.depth_scatter * visit_rng.standard_normal())
        roles = np.random.default_rng([config.seed, band_number, 3]).permutation(config.n_visits)
        n_trails = min(config.n_trails, config.n_visits // 3)
        n_partial = round(config.partial_fraction * config.n_visits)
        rank = int(np.flatnonzero(roles == number)[0])
        bbox = self.patch.outer_bbox
        if n_trails <= rank < n_trails + n_partial:
            bbox = cut_border(bbox, visit_rng)
        shape = bbox.shape

        # What was added later has its own random numbers, so that scenes without it stay what they were.
        later_visit_rng = np.random.default_rng([config.seed, band_number, number, 4])
        later_rng = np.random.default_rng([config.seed, config.patch_id, band_number, number, 5])
        slope = config.background_slope * later_visit_rng.standard_normal(2)
        angle, shift_y, shift_x = later_visit_rng.uniform(0.0, [2.0 * np.pi, 1.0, 1.0])
        resampling = None
        if config.noise_correlation != "none":
            resampling = Resampling(shape, config.noise_correlation, angle, (shift_y, shift_x))
        noise = rng.standard_normal(shape if resampling is None else resampling.detector_shape)
        background = np.full(shape, config.background_offset * visit_rng.standard_normal())
        x, y = bbox.meshgrid()
        whole = self.patch.outer_bbox
        background += slope[0] * (y - whole.y.center) / whole.y.size
        background += slope[1] * (x - whole.x.center) / whole.x.size
        artifacts = np.zeros(shape)
        if rank < n_trails:
            artifacts += trail(bbox, psf.fwhm / config.pixel_scale, rng)
        artifacts += unmasked_cosmic_rays(shape, config.n_unmasked_cosmic_rays, resampling, later_rng)
        no_data = gaps(shape, config.n_gaps, config.pixel_scale, later_rng)
        corner = (y >= whole.y.stop - config.missing_corner) & (x >= whole.x.stop - config.missing_corner)
        return _Visit(
            bbox=bbox,
            psf=psf,
            sky_noise=sky_noise,
            resampling=resampling,
            noise=noise,
            background=sky_noise * background,
            artifacts=sky_noise * artifacts,
            no_data=no_data | corner,
            rng=rng,
        )

    def mjd(self, number: int, band: str) -> float:
        """Return the time of a visit.

        Parameters
        ----------
        number : `int`
            Number of the visit, from 0.
        band : `str`
            Band of the visit.

        Returns
        -------
        mjd : `float`
            Middle of the exposure as MJD in TAI.
        """
        return 61041.2 + 0.01 * list(BANDS).index(band) + 3.0 * number

    def _draw(self, bbox: Box, psf: _VisitPsf, catalogue: Table, sky_noise: float) -> np.ndarray:
        """Draw the noiseless image of a visit in nJy, (y, x)."""
        bounds = galsim.BoundsI(bbox.x.min, bbox.x.max, bbox.y.min, bbox.y.max)
        image = galsim.ImageD(bounds, init_value=0.0)
        for row in catalogue:
            profile = psf.at(row["x"], row["y"])
            if row["type"] == "galaxy":
                profile = galsim.Convolve(galaxy_profile(row), profile, gsparams=GALSIM)
            flux = row["flux_nJy"] / psf.fraction
            add_object(
                image, profile.withFlux(flux), row["x"], row["y"], self.config.pixel_scale, sky_noise, "auto"
            )
        return image.array


@dataclasses.dataclass(frozen=True, eq=False)
class _Visit:
    """What a visit adds to the sky."""

    bbox: Box
    psf: _VisitPsf
    sky_noise: float
    """Noise of a sky pixel of the detector in nJy."""
    resampling: Resampling | None
    """Interpolation from the detector, `None` where the warp has the pixels of the detector."""
    noise: np.ndarray
    """Noise of the pixels of the detector in units of their standard deviation."""
    background: np.ndarray
    """Background error in nJy, (y, x)."""
    artifacts: np.ndarray
    """Unmasked trails and cosmic rays in nJy, (y, x)."""
    no_data: np.ndarray
    """Pixels without data, (y, x)."""
    rng: np.random.Generator
    """Random numbers of what remains to be drawn."""


class _VisitPsf:
    """PSF of a visit, which may vary over the patch."""

    def __init__(self, config: SceneConfig, bbox: Box, rng: np.random.Generator) -> None:
        self._config = config
        self._bbox = bbox
        self.fwhm = rng.uniform(*config.seeing)
        self._g1, self._g2 = rng.normal(0.0, config.psf_ellipticity, 2)
        stamp = self._stamp(self._centre.x, self._centre.y)
        self.fraction = stamp.sum()
        """Fraction of the light that falls into the stamp in the middle of the patch."""

    @property
    def _centre(self) -> galsim.PositionD:
        return galsim.PositionD(self._bbox.x.center, self._bbox.y.center)

    def at(self, x: float, y: float, error: float = 0.0) -> galsim.GSObject:
        """Return the profile, without pixel, at a position in tract pixels; wider by a relative error."""
        config = self._config
        fwhm = (
            (1.0 + error)
            * self.fwhm
            * (1.0 + config.psf_fwhm_change * (x - self._centre.x) / self._bbox.x.size)
        )
        g1 = self._g1 + config.psf_ellipticity_change * (y - self._centre.y) / self._bbox.y.size
        return _moffat(round(fwhm, 6), round(g1, 6), round(self._g2, 6), config.pixel_scale)

    def _stamp(self, x: float, y: float, error: float = 0.0) -> np.ndarray:
        size, scale = self._config.psf_size, self._config.pixel_scale
        return self.at(x, y, error).drawImage(nx=size, ny=size, scale=scale, dtype=float).array

    def stamps(self, grid: CellGrid) -> np.ndarray:
        """Return the stamps handed out for the cells, of unit sum, (cell_i, cell_j, k, k)."""
        size = grid.grid_size
        k = self._config.psf_size
        result = np.empty((size.i, size.j, k, k))
        for i in range(size.i):
            for j in range(size.j):
                x = grid.bbox.x.start + (j + 0.5) * grid.cell_shape.x - 0.5
                y = grid.bbox.y.start + (i + 0.5) * grid.cell_shape.y - 0.5
                stamp = self._stamp(x, y, self._config.psf_error)
                result[i, j] = stamp / stamp.sum()
        return result


@functools.lru_cache(maxsize=512)
def _moffat(fwhm: float, g1: float, g2: float, pixel_scale: float) -> galsim.GSObject:
    """Return a Moffat profile that has the FWHM, in arcsec, together with the pixel (to about 1 %)."""
    without_pixel = np.sqrt(fwhm**2 - (0.8 * pixel_scale) ** 2)
    return galsim.Moffat(beta=_MOFFAT_BETA, fwhm=without_pixel, gsparams=GALSIM).shear(g1=g1, g2=g2)


def _sky_noise(config: SceneConfig, depth: float) -> float:
    """Return the noise of a sky pixel in nJy at which a source of the depth has 5 sigma in median seeing."""
    psf = _moffat(float(np.mean(config.seeing)), 0.0, 0.0, config.pixel_scale)
    stamp = psf.drawImage(nx=config.psf_size, ny=config.psf_size, scale=config.pixel_scale, dtype=float).array
    stamp /= stamp.sum()
    return 10.0 ** ((AB_ZERO_POINT - depth) / 2.5) / 5.0 * np.sqrt(np.sum(stamp**2))


def simulate_scene(config: SceneConfig = _STANDARD, band: str = "i") -> tuple[Table, list[Warp]]:
    """Simulate all visits of a scene in a band.

    Parameters
    ----------
    config : `SceneConfig`, optional
        What the scene is made of.
    band : `str`, optional
        The band.

    Returns
    -------
    catalogue : `astropy.table.Table`
        True objects (see `Scene.catalogue`).
    warps : `list` [`Warp`]
        The visits.
    """
    scene = Scene(config)
    return scene.catalogue(band), [scene.warp(number, band) for number in range(config.n_visits)]


def add_glow(
    warps: Sequence[Warp], brightness: float, centre: tuple[float, float], fwhm: float
) -> tuple[list[Warp], np.ndarray]:
    """Add a faint extended source, a round Gaussian, to the visits of a patch.

    It is so much wider than the PSFs that it is taken to look the same in all visits: the squares of widths
    add, so a PSF of a tenth of its width would lower its peak by 1 per cent.  Its photons add nothing to the
    variance, so it must be much fainter than the sky.

    Parameters
    ----------
    warps : `~collections.abc.Sequence` [`Warp`]
        Visits of one patch; they are not changed.
    brightness : `float`
        Surface brightness in the middle, in nJy per pixel.
    centre : `tuple` [`float`, `float`]
        Position y, x of the middle in tract pixels.
    fwhm : `float`
        FWHM in pixels, at least ten times that of the widest PSF.

    Returns
    -------
    warps : `list` [`Warp`]
        The visits with the source; saturated pixels keep their value.
    truth : `numpy.ndarray`, (y, x), float64
        The source on the pixels of the patch, in nJy.

    Raises
    ------
    ValueError
        Raised if there is no visit, or the source is too narrow.
    """
    if not warps:
        raise ValueError("There is no visit to add the glow to.")
    sigma = fwhm / FWHM_PER_SIGMA
    seen = max(float(np.nanmax(warp.info.psf_shapes[..., :2])) ** 0.5 for warp in warps)
    if not sigma >= 10.0 * seen:
        raise ValueError(
            f"A glow of FWHM {fwhm:g} pixels is less than ten times as wide as the widest PSF; "
            f"make it at least {10.0 * FWHM_PER_SIGMA * seen:.1f}."
        )
    patch = warps[0].patch.outer_bbox
    x, y = patch.meshgrid()
    truth = brightness * np.exp(-0.5 * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / sigma**2)
    result = []
    for warp in warps:
        glow = np.where(warp.mask.get("SAT"), 0.0, truth[warp.bbox.slice_within(patch)])
        result.append(dataclasses.replace(warp, image=(warp.image + glow).astype(warp.image.dtype)))
    return result, truth


def write_scene(
    outdir: str | Path,
    config: SceneConfig,
    bands: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the warps of a scene as warp files, and the truth as ``truth_{patch}_{band}.ecsv``.

    Parameters
    ----------
    outdir : `str` or `~pathlib.Path`
        Directory, made if absent.
    config : `SceneConfig`
        What the scene is made of.  Its cells must be square.
    bands : `~collections.abc.Sequence` [`str`]
        Bands to simulate.
    progress : `~collections.abc.Callable`, optional
        Called with the number of warps written and their final number.

    Returns
    -------
    files : `list` [`~pathlib.Path`]
        The warp files.
    """
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    scene = Scene(config)
    files = []
    for band in bands:
        catalogue = scene.catalogue(band)
        catalogue.meta = {"seed": config.seed, "band": band, "pixel_scale": config.pixel_scale}
        catalogue.write(outdir / f"truth_{config.patch_id}_{band}.ecsv", overwrite=True)
        for number in range(config.n_visits):
            warp = scene.warp(number, band)
            path = outdir / f"warp_{config.patch_id}_{band}_{warp.visit}.fits"
            write_warp_file(path, warp, exposure_time=30.0, mjd=scene.mjd(number, band))
            files.append(path)
            if progress is not None:
                progress(len(files), len(bands) * config.n_visits)
    return files
