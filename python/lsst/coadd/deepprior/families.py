# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Families of simulated scenes: those of the benchmark, and the random ones that networks are trained on."""

from __future__ import annotations

__all__ = ("FAMILIES", "HELD_OUT", "family_scene", "training_scene")

import dataclasses

import numpy as np

from .truth import SceneConfig

_STANDARD = SceneConfig(n_cells=(2, 2), cell_shape=(128, 128))

FAMILIES: dict[str, SceneConfig] = {
    "standard": _STANDARD,
    "few_visits_1": dataclasses.replace(_STANDARD, n_visits=1),
    "few_visits_2": dataclasses.replace(_STANDARD, n_visits=2),
    "few_visits_3": dataclasses.replace(_STANDARD, n_visits=3),
    "deep": dataclasses.replace(_STANDARD, n_visits=64),
    "crowded": dataclasses.replace(_STANDARD, star_density=300.0),
    "gaps_and_edges": dataclasses.replace(_STANDARD, partial_fraction=0.6, n_gaps=2, missing_corner=50),
    "varying_psf": dataclasses.replace(_STANDARD, psf_fwhm_change=0.1, psf_ellipticity_change=0.05),
    "correlated_noise": dataclasses.replace(_STANDARD, noise_correlation="lanczos3"),
    "wrong_psf": dataclasses.replace(_STANDARD, psf_error=0.02),
    "background_errors": dataclasses.replace(_STANDARD, background_offset=0.02, background_slope=0.02),
    "cosmic_rays": dataclasses.replace(_STANDARD, n_unmasked_cosmic_rays=10),
    "empty": dataclasses.replace(_STANDARD, star_density=0.0, galaxy_density=0.0, pair_density=0.0),
}
"""Scenes of the benchmark, of 256x256 pixels, without their seeds (`dict` [`str`, `SceneConfig`])."""

HELD_OUT = ("wrong_psf", "crowded")
"""Families whose like never occurs in `training_scene`: its PSFs are right, and it has at most 200 stars per
square arcmin (`tuple` [`str`])."""

_FIRST_TRAINING_SEED = 1_000_000

_MIN_FWHM = 0.45
"""Smallest seeing in arcsec: 1.7 of the largest pixels."""


_MIN_SEEING_PIXELS = 2.4
"""Smallest median seeing in pixels; pixels do not sample a sharper PSF."""


def family_scene(name: str, seed: int) -> SceneConfig:
    """Return a scene of a family.

    Parameters
    ----------
    name : `str`
        One of `FAMILIES`.
    seed : `int`
        Number of the scene, from 0; below 1,000,000, where the seeds of `training_scene` begin.

    Returns
    -------
    config : `SceneConfig`
        The scene.

    Raises
    ------
    ValueError
        Raised if there is no such family, or the seed is out of range.
    """
    if name not in FAMILIES:
        raise ValueError(f"There is no family {name!r}; choose from {', '.join(FAMILIES)}.")
    if not 0 <= seed < _FIRST_TRAINING_SEED:
        raise ValueError(f"The seed of a family's scene must be from 0 to 999999, not {seed}.")
    return dataclasses.replace(FAMILIES[name], seed=seed)


def training_scene(seed: int) -> SceneConfig:
    """Return a random scene to train networks on, of 160x160 pixels in one or in 2x2 cells.

    Its ranges are those that training should span, with up to 300 visits, of which a network reads 200; few
    visits are more frequent than many. No scene of the benchmark has its objects or its noise.

    Parameters
    ----------
    seed : `int`
        Number of the scene, from 0.

    Returns
    -------
    config : `SceneConfig`
        The scene.

    Raises
    ------
    ValueError
        Raised if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"The seed of a training scene must not be negative, but it is {seed}.")
    seed += _FIRST_TRAINING_SEED
    rng = np.random.default_rng(seed)
    n_cells = int(rng.integers(1, 3))
    median = rng.uniform(0.5, 1.5)
    pixel_scale = rng.uniform(0.17, min(0.27, median / _MIN_SEEING_PIXELS))
    spread = min(rng.uniform(0.0, 0.35) * median, median - _MIN_FWHM)
    # The stamps reach out to 2.8 times the FWHM, but like real ones they do not grow without limit.
    half_stamp = int(np.clip(np.ceil(2.8 * (median + spread) / pixel_scale), 20, 30))
    return SceneConfig(
        seed=seed,
        n_cells=(n_cells, n_cells),
        cell_shape=(160 // n_cells, 160 // n_cells),
        pixel_scale=pixel_scale,
        n_visits=round(2.0 * 150.0 ** (rng.random() ** 1.5)),
        depth=rng.uniform(23.5, 25.5),
        depth_scatter=rng.uniform(0.05, 0.3),
        sky_magnitude=rng.uniform(19.5, 21.5),
        seeing=(median - spread, median + spread),
        psf_size=2 * half_stamp + 1,
        psf_ellipticity=rng.uniform(0.0, 0.05),
        psf_fwhm_change=rng.uniform(-0.1, 0.1),
        psf_ellipticity_change=rng.uniform(-0.05, 0.05),
        star_density=_log_uniform(rng, 2.0, 200.0),
        galaxy_density=rng.uniform(40.0, 120.0),
        pair_density=rng.uniform(2.0, 15.0),
        n_trails=int(rng.integers(0, 4)),
        cosmic_ray_density=rng.uniform(0.0, 15.0),
        n_unmasked_cosmic_rays=int(rng.integers(0, 5)),
        n_bad_columns=int(rng.integers(0, 3)),
        partial_fraction=rng.uniform(0.0, 0.5),
        n_gaps=int(rng.random() < 0.2),
        background_offset=rng.uniform(0.0, 0.02),
        noise_correlation=str(rng.choice(["none", "none", "lanczos3", "bilinear"])),
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
