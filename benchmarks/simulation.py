# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Simulated scenes of the benchmark."""

from __future__ import annotations

__all__ = ("GLOW", "GLOW_FWHM", "bench_scene", "make_scene")

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scenes import MARGIN, TARGET_SIGMA, BenchScene
from sky import sky_of

from lsst.coadd.deepprior.families import family_scene
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.simulate import Scene, add_glow
from lsst.coadd.deepprior.truth import render
from lsst.coadd.deepprior.warps import Warp

GLOW, GLOW_FWHM, GLOW_SNR = "glow", 20.0, 3.0
"""Name of the family with a faint extended source, its FWHM in arcsec, and its S/N in the middle of the coadd
in the area of a PSF, ``1 / sum(psf^2)``."""

BAND = "i"
BAD_PLANES = ("BAD", "SAT", "CR", "NO_DATA")
"""Mask planes of the simulation that make a pixel unusable."""


def make_scene(family: str, seed: int) -> BenchScene:
    """Simulate a scene.

    Parameters
    ----------
    family : `str`
        One of `lsst.coadd.deepprior.families.FAMILIES`, or `GLOW`: the scene of the family ``empty`` with a
        glow of `GLOW_FWHM` arcsec and `GLOW_SNR`.
    seed : `int`
        Number of the scene.

    Returns
    -------
    scene : `BenchScene`
        The scene.
    """
    scene = Scene(family_scene("empty" if family == GLOW else family, seed))
    warps = [scene.warp(number, BAND) for number in range(scene.config.n_visits)]
    result = bench_scene(scene, warps)
    if family != GLOW:
        return result
    sky = sky_of(result)
    # A flux of b * n in the n pixels of the PSF's area has the noise sqrt(n).
    brightness = GLOW_SNR * sky.noise * math.sqrt(float(np.sum(sky.coadd_psf**2)))
    box = scene.patch.outer_bbox
    centre, width = (box.y.center, box.x.center), GLOW_FWHM / scene.config.pixel_scale
    warps, glow = add_glow(warps, brightness, centre, width)
    return dataclasses.replace(
        result,
        observations=[warp.observation(BAD_PLANES) for warp in warps],
        wide_truth=result.wide_truth + np.pad(glow, MARGIN, mode="edge"),
    )


def bench_scene(scene: Scene, warps: Sequence[Warp] | None = None, *, band: str = BAND) -> BenchScene:
    """Return a simulated scene as arrays.

    Parameters
    ----------
    scene : `~lsst.coadd.deepprior.simulate.Scene`
        The scene.
    warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.Warp`], optional
        Its visits, where they are already there.
    band : `str`, optional
        Their band.

    Returns
    -------
    result : `BenchScene`
        The scene.
    """
    numbers = range(scene.config.n_visits)
    if warps is None:
        warps = [scene.warp(number, band) for number in numbers]
    cells, box = scene.patch.cells, scene.patch.outer_bbox
    catalogue, scale = scene.catalogue(band), scene.config.pixel_scale
    return BenchScene(
        observations=[warp.observation(BAD_PLANES) for warp in warps],
        layout=CellLayout(cells.grid_size.i, cells.grid_size.j, cells.cell_shape.y, cells.cell_shape.x),
        start=(box.y.start, box.x.start),
        pixel_scale=scale,
        catalogue=catalogue,
        wide_truth=render(catalogue, TARGET_SIGMA, box.padded(MARGIN), pixel_scale=scale),
        artifacts=np.array([scene.artifacts(number, band) for number in numbers]),
    )
