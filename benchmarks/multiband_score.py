# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Scenes of several bands, and the numbers that bands restored together are judged by."""

from __future__ import annotations

__all__ = ("FAMILIES", "SHALLOW", "Family", "do_scene")

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import galsim
import metrics
import numpy as np
from scenes import TARGET_SIGMA, BenchScene
from score import APERTURE_ARCSEC, _cutout, score_image
from simulation import bench_scene
from sky import Sky, sky_of

from lsst.coadd.deepprior.band_scenes import BandScene, BandSceneConfig
from lsst.coadd.deepprior.families import FAMILIES as SINGLE_BAND
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp
from lsst.coadd.deepprior.truth import GALSIM

SHALLOW = "g"
"""Band with few visits."""

COLOUR_SNR = 20.0
"""Signal-to-noise ratio in both bands of the sources whose colours are compared."""

NEAR_ARCSEC = 1.5
"""Distance within which another source makes a single-band source one of a blend."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Scenes of one kind, and how many of them are made with each start."""

    title: str
    n_visits: dict[str, int]
    scenes: tuple[int, int]

    def config(self, seed: int) -> BandSceneConfig:
        """Return a scene."""
        return BandSceneConfig(dataclasses.replace(SINGLE_BAND["standard"], seed=seed), self.n_visits)


FAMILIES = {
    "three": Family("Bands g, r, i with 3, 12 and 12 visits", {"g": 3, "r": 12, "i": 12}, (30, 2)),
    "two": Family(
        "Bands g and r with 3 and 12 visits: no third band confirms a source", {"g": 3, "r": 12}, (15, 1)
    ),
}


def _scenes(config: BandSceneConfig, *, with_singles: bool) -> dict[str, BenchScene]:
    """Simulate all bands of a scene."""
    result = {}
    for band in config.n_visits:
        scene = BandScene(config, band, with_singles=with_singles)
        warps = [scene.warp(number, band) for number in range(scene.config.n_visits)]
        result[band] = bench_scene(scene, warps, band=band)
    return result


def _restored(
    scenes: Mapping[str, BenchScene], start: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Restore each band alone, then together; return both images of each band, and numbers."""
    from lsst.coadd.deepprior.coupling import BandLight, coupled
    from lsst.coadd.deepprior.fitted_patch import RestoreSettings, fit_patch
    from lsst.coadd.deepprior.weights import packaged_network

    settings = RestoreSettings(target_fwhm=FWHM_PER_SIGMA * TARGET_SIGMA)
    network = packaged_network() if start == "pretrained" else None
    started = time.monotonic()
    fits = {
        band: fit_patch(scene.observations, scene.layout, settings, network=network)
        for band, scene in scenes.items()
    }
    alone = time.monotonic() - started
    points = coupled([BandLight(fit.data, fit.sets, fit.points.latent) for fit in fits.values()])
    numbers = {
        "seconds": [alone, time.monotonic() - started],
        "methods": sorted({fit.method for fit in fits.values()}),
    }
    single = {band: fit.image(fit.points.latent).astype(float) for band, fit in fits.items()}
    joint = {
        band: single[band] if own is None else fit.image(own.latent).astype(float)
        for (band, fit), own in zip(fits.items(), points, strict=True)
    }
    return single, joint, numbers


def _apertures(scene: BenchScene, sky: Sky, image: np.ndarray) -> dict[int, float]:
    """Return flux over true flux of isolated sources of high S/N, by their number."""
    profile = galsim.Gaussian(sigma=TARGET_SIGMA * scene.pixel_scale, gsparams=GALSIM)
    error, radius = image - scene.truth, APERTURE_ARCSEC / scene.pixel_scale
    chosen = sky.isolated & (sky.snr > COLOUR_SNR) & ~np.asarray(scene.catalogue["only"])
    return {
        int(scene.catalogue["id"][index]): metrics.aperture_ratio(
            *_cutout(scene, error, profile, index), radius
        )
        for index in np.flatnonzero(chosen).tolist()
    }


def _point_noise(scene: BenchScene, sky: Sky) -> float:
    """Return the noise in nJy of the flux of a point in the coadd."""
    stars = (np.asarray(scene.catalogue["type"]) == "star") & (sky.snr > COLOUR_SNR)
    return float(np.median(np.asarray(scene.catalogue["flux_nJy"])[stars] / sky.snr[stars]))


def _leaks(
    scenes: Mapping[str, BenchScene],
    skies: Mapping[str, Sky],
    with_singles: Mapping[str, np.ndarray],
    without: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Return what sources of one band change in the other bands, in parts of their flux and in units of the
    noise of a point there.
    """
    noise = {band: _point_noise(scene, skies[band]) for band, scene in scenes.items()}
    result = []
    for band, scene in scenes.items():
        for row in scene.catalogue[scene.catalogue["only"]]:
            y, x = row["y"] - scene.start[0], row["x"] - scene.start[1]
            inside = metrics.near(scene.layout.shape, [x], [y], APERTURE_ARCSEC / scene.pixel_scale)
            for other in [name for name in scenes if name != band]:
                truth = scenes[other].catalogue
                distance = scene.pixel_scale * np.hypot(truth["x"] - row["x"], truth["y"] - row["y"])
                leak = float((with_singles[other] - without[other])[inside].sum())
                result.append(
                    {
                        "from": band,
                        "to": other,
                        "mag": float(row["mag"]),
                        "leak": leak / float(row["flux_nJy"]),
                        "significance": leak / noise[other],
                        "blend": bool((distance < NEAR_ARCSEC).any()),
                    }
                )
    return result


def do_scene(family: str, seed: int, start: str) -> dict[str, Any]:
    """Restore a scene band by band and together, and judge both.

    Parameters
    ----------
    family : `str`
        One of `FAMILIES`.
    seed : `int`
        Number of the scene.
    start : `str`
        ``pretrained`` or ``scratch``.

    Returns
    -------
    row : `dict`
        By ``single`` and ``joint`` and band the scores of the image; ``colours``, the ratio of the measured
        over the true colour of each source, single and joint, by pairs of bands; ``leaks``, with the
        pretrained start only; and how long it took.
    """
    config = FAMILIES[family].config(seed)
    scenes = _scenes(config, with_singles=True)
    skies = {band: sky_of(scene) for band, scene in scenes.items()}
    single, joint, numbers = _restored(scenes, start)
    psf = gaussian_stamp(TARGET_SIGMA, 25)
    row: dict[str, Any] = dict(numbers)
    ratios: dict[str, dict[str, dict[int, float]]] = {}
    for name, images in (("single", single), ("joint", joint)):
        row[name] = {
            band: {
                key: value
                for key, value in score_image(scene, skies[band], images[band], psf).items()
                if isinstance(value, float)
            }
            for band, scene in scenes.items()
        }
        ratios[name] = {band: _apertures(scene, skies[band], images[band]) for band, scene in scenes.items()}
    bands = list(scenes)
    row["colours"] = {
        f"{a} - {b}": [
            [ratios[name][a][n] / ratios[name][b][n] for name in ("single", "joint")]
            for n in sorted(ratios["single"][a].keys() & ratios["single"][b].keys())
        ]
        for a, b in zip(bands[:-1], bands[1:], strict=True)
    }
    if start == "pretrained":
        _, without, _ = _restored(_scenes(config, with_singles=False), start)
        row["leaks"] = _leaks(scenes, skies, joint, without)
    return row
