# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Simulated scenes with known truth, as catalogues, warps and warp files.

The flux of an object is that which falls into a PSF stamp, since stamps have unit sum.
"""

from __future__ import annotations

__all__ = ("INSTRUMENT", "Scene", "SceneConfig", "render", "simulate_scene", "write_scene")

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

_SKYMAP = "deepprior_sim"
_TRACT = 9
_TRACT_CENTRE = 15000
"""Tract pixel, in x and y, of the tangential point of the projection."""

_STANDARD = SceneConfig()

_MOFFAT_BETA = 3.5

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
        band_number = list(BANDS).index(band)
        visit_rng = np.random.default_rng([config.seed, band_number, number, 1])
        rng = np.random.default_rng([config.seed, config.patch_id, band_number, number, 2])
        psf = _VisitPsf(config, self.patch.outer_bbox, visit_rng)
        depth = config.depth + config.depth_scatter * visit_rng.standard_normal()
        sky_noise = _sky_noise(config, depth)
        roles = np.random.default_rng([config.seed, band_number, 3]).permutation(config.n_visits)
        n_trails = min(config.n_trails, config.n_visits // 3)
        n_partial = round(config.partial_fraction * config.n_visits)
        rank = int(np.flatnonzero(roles == number)[0])
        bbox = self.patch.outer_bbox
        if n_trails <= rank < n_trails + n_partial:
            bbox = _cut(bbox, visit_rng)

        model = self._draw(bbox, psf, self.catalogue(band), sky_noise)
        gain = 10.0 ** ((AB_ZERO_POINT - config.sky_magnitude) / 2.5) * config.pixel_scale**2 / sky_noise**2
        variance = sky_noise**2 + np.maximum(model, 0.0) / gain
        image = model + np.sqrt(variance) * rng.standard_normal(model.shape)
        image += config.background_offset * sky_noise * visit_rng.standard_normal()
        if rank < n_trails:
            image += _trail(bbox, psf.fwhm / config.pixel_scale, rng) * sky_noise
        mask = Mask(schema=_SCHEMA, bbox=bbox)
        saturated = image > config.saturation
        image[saturated] = config.saturation
        mask.set("SAT", saturated)
        self._add_defects(image, mask, sky_noise, rng)
        return Warp(
            instrument=INSTRUMENT,
            visit=1000 * (band_number + 1) + number,
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

    def _add_defects(self, image: np.ndarray, mask: Mask, sky_noise: float, rng: np.random.Generator) -> None:
        """Put garbage under cosmic rays and bad columns, and mask them."""
        config = self.config
        area = image.size * (config.pixel_scale / 60.0) ** 2
        hit = np.zeros(image.shape, dtype=bool)
        for _ in range(rng.poisson(area * config.cosmic_ray_density)):
            length, angle = rng.uniform(3.0, 20.0), rng.uniform(0.0, 2.0 * np.pi)
            step = np.arange(0.0, length, 0.5)
            y = np.rint(rng.uniform(0, image.shape[0] - 1) + step * np.sin(angle)).astype(int)
            x = np.rint(rng.uniform(0, image.shape[1] - 1) + step * np.cos(angle)).astype(int)
            inside = (y >= 0) & (y < image.shape[0]) & (x >= 0) & (x < image.shape[1])
            hit[y[inside], x[inside]] = True
        image[hit] += sky_noise * rng.uniform(20.0, 500.0, np.count_nonzero(hit))
        mask.set("CR", hit)
        bad = np.zeros(image.shape, dtype=bool)
        bad[:, rng.integers(0, image.shape[1], config.n_bad_columns)] = True
        image[bad] = sky_noise * rng.uniform(-1000.0, 1000.0, np.count_nonzero(bad))
        mask.set("BAD", bad)


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

    def at(self, x: float, y: float) -> galsim.GSObject:
        """Return the profile, without pixel, at a position in tract pixels."""
        config = self._config
        fwhm = self.fwhm * (1.0 + config.psf_fwhm_change * (x - self._centre.x) / self._bbox.x.size)
        g1 = self._g1 + config.psf_ellipticity_change * (y - self._centre.y) / self._bbox.y.size
        return _moffat(round(fwhm, 6), round(g1, 6), round(self._g2, 6), config.pixel_scale)

    def _stamp(self, x: float, y: float) -> np.ndarray:
        size = self._config.psf_size
        return self.at(x, y).drawImage(nx=size, ny=size, scale=self._config.pixel_scale, dtype=float).array

    def stamps(self, grid: CellGrid) -> np.ndarray:
        """Return the stamps at the centres of all cells, of unit sum, (cell_i, cell_j, k, k)."""
        size = grid.grid_size
        k = self._config.psf_size
        result = np.empty((size.i, size.j, k, k))
        for i in range(size.i):
            for j in range(size.j):
                x = grid.bbox.x.start + (j + 0.5) * grid.cell_shape.x - 0.5
                y = grid.bbox.y.start + (i + 0.5) * grid.cell_shape.y - 0.5
                stamp = self._stamp(x, y)
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


def _cut(bbox: Box, rng: np.random.Generator) -> Box:
    """Cut a border off a box, so that 30 to 80 per cent of its height or width are left."""
    kept = rng.uniform(0.3, 0.8)
    height, width = round(kept * bbox.y.size), round(kept * bbox.x.size)
    side = rng.integers(4)
    if side == 0:
        return bbox.absolute[: bbox.y.start + height, :]
    if side == 1:
        return bbox.absolute[bbox.y.stop - height :, :]
    if side == 2:
        return bbox.absolute[:, : bbox.x.start + width]
    return bbox.absolute[:, bbox.x.stop - width :]


def _trail(bbox: Box, fwhm: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a satellite trail across the middle half of a box in units of the sky noise, (y, x)."""
    angle = rng.uniform(0.0, np.pi)
    centre_x = bbox.x.center + rng.uniform(-0.25, 0.25) * bbox.x.size
    centre_y = bbox.y.center + rng.uniform(-0.25, 0.25) * bbox.y.size
    x, y = bbox.meshgrid()
    distance = (x - centre_x) * np.sin(angle) - (y - centre_y) * np.cos(angle)
    sigma = fwhm / 2.355
    return rng.uniform(3.0, 10.0) * np.exp(-0.5 * (distance / sigma) ** 2)


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
