# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""True objects of simulated scenes: what they are, and how they look without noise.

Fluxes are AB, in nJy.
"""

from __future__ import annotations

__all__ = (
    "AB_ZERO_POINT",
    "BANDS",
    "GALSIM",
    "SceneConfig",
    "add_object",
    "galaxy_profile",
    "make_objects",
    "render",
)

import dataclasses

import galsim
import numpy as np
from astropy.table import Table

from lsst.images import Box

from .resampling import KERNELS

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy (`float`)."""

BANDS = {"u": 2.2, "g": 1.0, "r": 0.3, "i": 0.0, "z": -0.15, "y": -0.2}
"""Bands, and the magnitude difference to the i band of an object of unit colour (`dict`)."""

GALSIM = galsim.GSParams(folding_threshold=1e-3, maximum_fft_size=16384)
"""Accuracy of drawings (`galsim.GSParams`)."""


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What a scene is made of; the default is the standard family.

    The objects depend on `seed` and `patch_id` alone; the seeing and depth of a visit on `seed`, its band and
    its number.
    """

    seed: int = 1
    """Seed of all random numbers (`int`)."""

    patch_id: int = 0
    """Number of the patch in the tract (`int`)."""

    n_cells: tuple[int, int] = (2, 2)
    """Number of rows and columns of cells (`tuple` [`int`, `int`])."""

    cell_shape: tuple[int, int] = (150, 150)
    """Height and width of a cell in pixels (`tuple` [`int`, `int`])."""

    start: tuple[int, int] = (14200, 15600)
    """Position y, x of the first pixel of the patch in tract pixels (`tuple` [`int`, `int`])."""

    pixel_scale: float = 0.2
    """Size of a pixel in arcsec (`float`)."""

    n_visits: int = 12
    """Number of visits (`int`)."""

    depth: float = 24.5
    """Magnitude of a point source of 5 sigma in one visit of median seeing (`float`)."""

    depth_scatter: float = 0.1
    """Standard deviation of the visits' depth in mag (`float`)."""

    sky_magnitude: float = 21.0
    """Surface brightness of the sky in mag per square arcsec; it sets the noise of sources (`float`)."""

    saturation: float = 15000.0
    """Flux of a pixel in nJy above which it is saturated (`float`)."""

    seeing: tuple[float, float] = (0.55, 1.1)
    """Smallest and largest FWHM of the PSF, with the pixel, in arcsec (`tuple` [`float`, `float`])."""

    psf_size: int = 41
    """Width of the PSF stamps in pixels, odd (`int`)."""

    psf_ellipticity: float = 0.03
    """Standard deviation of each component of the visits' PSF ellipticity, a reduced shear (`float`)."""

    psf_fwhm_change: float = 0.0
    """Relative change of the PSF's FWHM from the left to the right border of the patch (`float`)."""

    psf_ellipticity_change: float = 0.0
    """Change of the first component of the PSF's ellipticity from the lower to the upper border (`float`)."""

    psf_error: float = 0.0
    """By how much the FWHM of the stamps that are handed out exceeds the true one, relatively (`float`)."""

    star_density: float = 15.0
    """Number of single stars of 17 to 25 mag per square arcmin (`float`)."""

    galaxy_density: float = 80.0
    """Number of single galaxies of 20 to 26.5 mag per square arcmin (`float`)."""

    pair_density: float = 8.0
    """Number of close pairs of 21 to 24 mag per square arcmin (`float`)."""

    pair_separation: tuple[float, float] = (0.5, 0.9)
    """Smallest and largest separation of pairs in arcsec (`tuple` [`float`, `float`])."""

    n_trails: int = 2
    """Number of visits with an unmasked satellite trail, at most a third of all (`int`)."""

    cosmic_ray_density: float = 5.0
    """Number of masked cosmic rays per visit and square arcmin (`float`)."""

    n_unmasked_cosmic_rays: int = 0
    """Number of cosmic rays per visit of 1 to 5 pixels and 10 to 80 sigma each that no mask shows (`int`)."""

    n_bad_columns: int = 1
    """Number of masked bad columns per visit (`int`)."""

    partial_fraction: float = 0.25
    """Fraction of the visits that cover only a part of the patch (`float`)."""

    n_gaps: int = 0
    """Number of strips per visit, 8 to 12 arcsec wide, in which it has no data (`int`)."""

    missing_corner: int = 0
    """Side in pixels of the square at the upper right corner of the patch that no visit sees (`int`)."""

    background_offset: float = 0.0
    """Standard deviation of the visits' background error in units of the sky noise of a pixel (`float`)."""

    background_slope: float = 0.0
    """Standard deviation of the change of the visits' background error from the left to the right border, and
    from the lower to the upper one, in units of the sky noise of a pixel (`float`)."""

    noise_correlation: str = "none"
    """Interpolation kernel by which the noise was resampled from detector pixels: ``none`` for white noise,
    ``bilinear`` or ``lanczos3`` (`str`).

    The detector of each visit has another orientation and another sub-pixel shift.  The sky noise, hence the
    depth, is that of a detector pixel; the variance plane is the propagated one of each pixel by itself, as
    that of Rubin's warps (see `lsst.coadd.deepprior.resampling`).  The PSF stamps include the interpolation.
    """

    def __post_init__(self) -> None:
        if self.noise_correlation not in ("none", *KERNELS):
            raise ValueError(
                f"There is no noise correlation {self.noise_correlation!r}; choose from none, "
                f"{', '.join(KERNELS)}."
            )


def make_objects(config: SceneConfig, patch_box: Box) -> Table:
    """Draw the objects of a scene, in and up to 4 arcsec around its patch.

    Parameters
    ----------
    config : `SceneConfig`
        What the scene is made of.
    patch_box : `lsst.images.Box`
        Box of the patch in tract pixels.

    Returns
    -------
    objects : `astropy.table.Table`
        The objects, with ``mag`` in the i band and ``colour``, by which `BANDS` is to be multiplied.
    """
    rng = np.random.default_rng([config.seed, config.patch_id, 0])
    margin = round(4.0 / config.pixel_scale)
    box = patch_box.padded(margin)
    area = box.area * (config.pixel_scale / 60.0) ** 2
    n_stars, n_galaxies, n_pairs = (
        rng.poisson(area * density)
        for density in (config.star_density, config.galaxy_density, config.pair_density)
    )
    n = n_stars + n_galaxies + 2 * n_pairs
    is_star = np.repeat([True, False], [n_stars, n_galaxies])
    # Two of three members of pairs are stars.
    is_star = np.concatenate([is_star, rng.random(2 * n_pairs) < 2.0 / 3.0])
    x = rng.uniform(box.x.start - 0.5, box.x.stop - 0.5, n)
    y = rng.uniform(box.y.start - 0.5, box.y.stop - 0.5, n)
    pair_id = np.full(n, -1)
    first, second = slice(n - 2 * n_pairs, n - n_pairs), slice(n - n_pairs, n)
    pair_id[first] = pair_id[second] = np.arange(n_pairs)
    separation = rng.uniform(*config.pair_separation, n_pairs) / config.pixel_scale
    angle = rng.uniform(0.0, 2.0 * np.pi, n_pairs)
    x[second] = x[first] + separation * np.cos(angle)
    y[second] = y[first] + separation * np.sin(angle)

    mag = np.empty(n)
    mag[:n_stars] = _counts(rng, n_stars, 17.0, 25.0, 0.12)
    mag[n_stars : n_stars + n_galaxies] = _counts(rng, n_galaxies, 20.0, 26.5, 0.33)
    mag[first] = rng.uniform(21.0, 24.0, n_pairs)
    mag[second] = np.clip(mag[first] + rng.uniform(-1.0, 1.0, n_pairs), 21.0, 24.0)
    hlr = 0.45 * 10.0 ** (-0.1 * (mag - 23.0) + rng.normal(0.0, 0.12, n))
    return Table(
        {
            "id": np.arange(n) + 1,
            "type": np.where(is_star, "star", "galaxy"),
            "x": x,
            "y": y,
            "pair_id": pair_id,
            "hlr": np.where(is_star, 0.0, hlr),
            "sersic_n": np.where(is_star, 0.0, rng.choice([1.0, 2.0, 4.0], n, p=[0.7, 0.2, 0.1])),
            "axis_ratio": np.where(is_star, 1.0, rng.uniform(0.3, 1.0, n)),
            "angle": np.where(is_star, 0.0, rng.uniform(0.0, 180.0, n)),
            "mag": mag,
            "colour": rng.normal(0.8, 0.4, n),
        }
    )


def _counts(rng: np.random.Generator, n: int, bright: float, faint: float, slope: float) -> np.ndarray:
    """Draw magnitudes whose density grows as 10**(slope * mag)."""
    low, high = 10.0 ** (slope * bright), 10.0 ** (slope * faint)
    return np.log10(rng.uniform(low, high, n)) / slope


def galaxy_profile(row: Table.Row) -> galsim.GSObject:
    """Return the profile of a galaxy.

    Parameters
    ----------
    row : `astropy.table.Row`
        Row of a catalogue.

    Returns
    -------
    profile : `galsim.GSObject`
        Profile in arcsec, of unit flux.
    """
    profile = galsim.Sersic(
        n=row["sersic_n"], half_light_radius=row["hlr"] * row["axis_ratio"] ** 0.5, gsparams=GALSIM
    )
    return profile.shear(q=row["axis_ratio"], beta=row["angle"] * galsim.degrees)


def add_object(
    image: galsim.Image, profile: galsim.GSObject, x: float, y: float, scale: float, noise: float, method: str
) -> None:
    """Add an object to an image, out to where it is far below the noise.

    Parameters
    ----------
    image : `galsim.Image`
        Image in nJy, whose bounds are tract pixels; changed in place.
    profile : `galsim.GSObject`
        The object, in arcsec and nJy.
    x, y : `float`
        Position in tract pixels.
    scale : `float`
        Size of a pixel in arcsec.
    noise : `float`
        Noise of a pixel in nJy.
    method : `str`
        ``auto`` to convolve with the pixel, ``no_pixel`` to sample at pixel centres.
    """
    # Beyond the size that GalSim proposes, profiles fall at least with the third power of the distance.
    good = profile.getGoodImageSize(scale)
    excess = max(1.0, profile.flux / (1e4 * noise)) ** (1.0 / 3.0)
    half = int(min(0.5 * good * excess, 400.0)) + 1
    bounds = galsim.BoundsI(round(x) - half, round(x) + half, round(y) - half, round(y) + half) & image.bounds
    if bounds.isDefined():
        profile.drawImage(
            image[bounds], scale=scale, center=galsim.PositionD(x, y), method=method, add_to_image=True
        )


def render(catalogue: Table, psf_sigma: float, box: Box, *, pixel_scale: float = 0.2) -> np.ndarray:
    """Draw the noiseless image of a catalogue at a Gaussian PSF that is sampled at pixel centres.

    This is what a perfect restoration with that target PSF would give.

    Parameters
    ----------
    catalogue : `astropy.table.Table`
        Objects, as `~lsst.coadd.deepprior.simulate.Scene.catalogue` returns them.
    psf_sigma : `float`
        Sigma of the PSF in pixels.
    box : `lsst.images.Box`
        Box of the image in tract pixels.
    pixel_scale : `float`, optional
        Size of a pixel in arcsec.

    Returns
    -------
    image : `numpy.ndarray`, (y, x), float64
        Flux per pixel in nJy.
    """
    image = galsim.ImageD(galsim.BoundsI(box.x.min, box.x.max, box.y.min, box.y.max), init_value=0.0)
    x, y = box.x.arange.astype(float), box.y.arange.astype(float)
    psf = galsim.Gaussian(sigma=psf_sigma * pixel_scale, gsparams=GALSIM)
    for row in catalogue:
        if row["type"] == "star":
            gauss_x = np.exp(-0.5 * ((x - row["x"]) / psf_sigma) ** 2)
            gauss_y = np.exp(-0.5 * ((y - row["y"]) / psf_sigma) ** 2)
            image.array[:] += row["flux_nJy"] / (2.0 * np.pi * psf_sigma**2) * np.outer(gauss_y, gauss_x)
        else:
            profile = galsim.Convolve(galaxy_profile(row), psf, gsparams=GALSIM).withFlux(row["flux_nJy"])
            add_object(image, profile, row["x"], row["y"], pixel_scale, 0.01, "no_pixel")
    return image.array
