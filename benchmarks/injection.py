# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Objects of known flux, shape and position in the warps of a patch: simulated ones, and real ones."""

from __future__ import annotations

__all__ = (
    "COMPANION_ARCSEC",
    "COMPANION_SNR",
    "DISTURBS",
    "GALAXY_BINS",
    "STAR_BINS",
    "InjectedScene",
    "disturbed",
    "inject_into_warps",
    "injected_scene",
    "read_warps",
)

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import galsim
import numpy as np
from astropy.table import Table, vstack
from scenes import BenchScene
from simulation import bench_scene

from lsst.coadd.deepprior.families import family_scene
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.simulate import Scene, SceneConfig
from lsst.coadd.deepprior.truth import AB_ZERO_POINT, GALSIM, galaxy_profile
from lsst.coadd.deepprior.warp_files import read_warp_file

STAR_BINS = ((18.5, 20.0), (20.0, 21.5), (21.5, 23.0), (23.0, 24.0), (24.0, 25.0), (25.0, 25.7))
"""Magnitudes of stars, from where a pixel of the sharpest visits saturates to S/N 7 in the coadd."""

GALAXY_BINS = ((20.0, 22.0), (22.0, 23.0), (23.0, 24.0), (24.0, 25.2))
"""Magnitudes of galaxies; the faintest reach S/N 7 in the coadd."""

_PER_BIN = 16
"""Number of objects of a bin that a scene is offered; those without a place are left out."""

_BRIGHT = 23.0
"""Magnitude that divides the bins: scenes of even seeds get the brighter ones, those of odd seeds the rest,
so that bright objects do not take all the places of faint ones."""

_POOL_SEED = 500_000
"""What is added to the seed of a scene for the objects that are injected into it."""

_TRIES = 200
"""Number of places that are tried for an object."""

DISTURBS = ((1.5, 0.1), (3.0, 1.0), (6.0, 10.0))
"""Distances in arcsec within which no neighbour of an isolated object may be brighter by some ratio, as in
`sky`."""

COMPANION_ARCSEC = 1.5
COMPANION_SNR = 1.0
"""A source is lone if no object whose true S/N is above the one is nearer than the other."""

_BAND = "i"


def disturbed(
    x: float, y: float, flux: float, x_all: np.ndarray, y_all: np.ndarray, flux_all: np.ndarray, scale: float
) -> np.ndarray:
    """Tell which of some objects disturb another one.

    Parameters
    ----------
    x, y, flux : `float`
        Position in pixels and flux of the object.
    x_all, y_all, flux_all : `numpy.ndarray`, (object,)
        Those of the others.
    scale : `float`
        Size of a pixel in arcsec.

    Returns
    -------
    disturbs : `numpy.ndarray`, (object,), bool
        Whether another object is so near and so bright (see `DISTURBS`).
    """
    distance = np.hypot(x_all - x, y_all - y) * scale
    near = [(distance < radius) & (flux_all > ratio * flux) for radius, ratio in DISTURBS]
    return np.any(near, axis=0)


class InjectedScene(Scene):
    """A simulated scene with more objects in it: photons, saturation and resampling are those of the others.

    Parameters
    ----------
    config : `~lsst.coadd.deepprior.simulate.SceneConfig`
        The scene.
    """

    def __init__(self, config: SceneConfig) -> None:
        super().__init__(config)
        self._whole = {}
        own = super().catalogue(_BAND)
        self._whole[_BAND] = vstack([own, self._injected(own)], metadata_conflicts="silent")

    def catalogue(self, band: str) -> Table:
        """Return all objects (see `lsst.coadd.deepprior.simulate.Scene.catalogue`); only the i band has any.

        Parameters
        ----------
        band : `str`
            The band.

        Returns
        -------
        catalogue : `astropy.table.Table`
            The objects.
        """
        return self._whole[band]

    def _injected(self, own: Table) -> Table:
        """Choose objects of the same population, and places where nothing disturbs them."""
        config, box, scale = self.config, self.patch.outer_bbox, self.config.pixel_scale
        many = dataclasses.replace(
            config, seed=config.seed + _POOL_SEED, star_density=300.0, galaxy_density=1500.0, pair_density=0.0
        )
        pool = Scene(many).catalogue(_BAND)
        rng = np.random.default_rng([config.seed, 6])
        star = np.asarray(pool["type"]) == "star"
        half = [(low, high) for low, high in STAR_BINS if (high <= _BRIGHT) == (config.seed % 2 == 0)]
        stars = np.flatnonzero(star)[: _PER_BIN * len(half)]
        # The population has no stars as faint as the catalogue reaches.
        pool["mag"][stars] = rng.uniform(*np.repeat(half, _PER_BIN, axis=0).T[:, : len(stars)])
        pool["flux_nJy"] = 10.0 ** ((AB_ZERO_POINT - pool["mag"]) / 2.5)
        chosen = stars.tolist()
        for low, high in GALAXY_BINS:
            if (high <= _BRIGHT) == (config.seed % 2 == 0):
                inside = ~star & (pool["mag"] > low) & (pool["mag"] <= high)
                chosen += np.flatnonzero(inside)[:_PER_BIN].tolist()
        result = pool[sorted(chosen, key=lambda index: pool["mag"][index])]
        x, y, flux = (np.asarray(own[name], dtype=float) for name in ("x", "y", "flux_nJy"))
        placed = np.zeros(len(result), dtype=bool)
        border = 3.5 / scale
        for place, row in enumerate(result):
            for _ in range(_TRIES):
                at = (
                    rng.uniform(box.x.start + border, box.x.stop - border),
                    rng.uniform(box.y.start + border, box.y.stop - border),
                )
                if not disturbed(*at, row["flux_nJy"], x, y, flux, scale).any():
                    row["x"], row["y"] = at
                    placed[place] = True
                    x, y, flux = (
                        np.append(old, new)
                        for old, new in zip((x, y, flux), (*at, row["flux_nJy"]), strict=True)
                    )
                    break
        result = result[placed]
        result["id"] = own["id"].max() + 1 + np.arange(len(result)) if len(own) else np.arange(len(result))
        return result


def injected_scene(family: str, seed: int) -> BenchScene:
    """Simulate a scene of a family with objects injected into it.

    Parameters
    ----------
    family : `str`
        One of `lsst.coadd.deepprior.families.FAMILIES`.
    seed : `int`
        Number of the scene.

    Returns
    -------
    scene : `BenchScene`
        The scene; its catalogue holds all objects.
    """
    return bench_scene(InjectedScene(family_scene(family, seed)))


def read_warps(paths: Sequence[Path], cell: int = 128) -> tuple[list[Observation], CellLayout, float]:
    """Read warp files of one patch.

    Parameters
    ----------
    paths : `~collections.abc.Sequence` [`pathlib.Path`]
        The files, all of one shape.
    cell : `int`
        Height and width of the cells in pixels; the patch ends with the last whole cell.

    Returns
    -------
    observations : `list` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Their cells.
    pixel_scale : `float`
        Size of a pixel in arcsec.

    Raises
    ------
    ValueError
        Raised if there is no file, or the files differ in shape.
    """
    files = [read_warp_file(path) for path in paths]
    if not files or len({file.image.shape for file in files}) != 1:
        raise ValueError("Injection needs warp files of one patch, all of the same shape.")
    n_i, n_j = (n // cell for n in files[0].image.shape)
    ny, nx = n_i * cell, n_j * cell
    result = []
    for path, file in zip(paths, files, strict=True):
        bad = np.zeros(file.image.shape, dtype=bool)
        for plane in file.mask.schema.names & {"BAD", "SAT", "CR", "NO_DATA", "EDGE", "INTRP"}:
            bad |= file.mask.get(plane)
        good = ~bad & np.isfinite(file.image) & (np.nan_to_num(file.variance) > 0.0)
        psf = np.broadcast_to(file.psf, (n_i, n_j, *file.psf.shape[-2:])).astype(float)
        result.append(
            Observation(
                flux=file.image[:ny, :nx],
                variance=file.variance[:ny, :nx],
                good=good[:ny, :nx],
                psf=psf / psf.sum(axis=(2, 3), keepdims=True),
                origin=(0, 0),
                name=path.stem,
            )
        )
    scale = np.sqrt(np.abs(np.linalg.det(files[0].header.wcs.pixel_scale_matrix))) * 3600.0
    return result, CellLayout(n_i, n_j, cell, cell), float(scale)


def inject_into_warps(
    observations: Sequence[Observation], objects: Table, layout: CellLayout, pixel_scale: float
) -> list[Observation]:
    """Add objects to visits at the PSF stamp of their cell.

    Their photons add no noise, and nothing to the variance, since the gain of real warps is not known: bright
    objects are less noisy than they would be.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        Visits of the whole patch.
    objects : `astropy.table.Table`
        Objects, with ``x`` and ``y`` in array coordinates, and the other columns of
        `lsst.coadd.deepprior.simulate.Scene.catalogue`.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    pixel_scale : `float`
        Size of a pixel in arcsec.

    Returns
    -------
    visits : `list` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits with the objects.
    """
    result = []
    for visit in observations:
        ny, nx = visit.flux.shape
        image = galsim.ImageD(galsim.BoundsI(0, nx - 1, 0, ny - 1), init_value=0.0)
        profiles: dict[tuple[int, int], galsim.GSObject] = {}
        for row in objects:
            cell = (
                min(int(row["y"]) // layout.height, layout.n_i - 1),
                min(int(row["x"]) // layout.width, layout.n_j - 1),
            )
            if cell not in profiles:
                stamp = galsim.Image(visit.psf[cell].copy())
                profiles[cell] = galsim.InterpolatedImage(
                    stamp, scale=pixel_scale, flux=1.0, x_interpolant="lanczos15"
                )
            profile = profiles[cell]
            if row["type"] == "galaxy":
                profile = galsim.Convolve(galaxy_profile(row), profile, gsparams=GALSIM)
            size, ix, iy = 2 * visit.psf.shape[-1] + 1, round(row["x"]), round(row["y"])
            stamp = profile.withFlux(row["flux_nJy"]).drawImage(
                nx=size,
                ny=size,
                scale=pixel_scale,
                offset=(row["x"] - ix, row["y"] - iy),
                method="no_pixel",
                dtype=float,
            )
            stamp.setCenter(ix, iy)
            both = stamp.bounds & image.bounds
            image[both] += stamp[both]
        flux = np.where(visit.good, visit.flux + image.array, visit.flux).astype(np.float32)
        result.append(dataclasses.replace(visit, flux=flux))
    return result
