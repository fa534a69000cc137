# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Restored image and residual in one: two cells of unequal depth, a residual of stars without noise."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
from toy import gaussian_stars

from lsst.coadd.deepprior.cells import make_cell_psf
from lsst.coadd.deepprior.coadd import MASK_SCHEMA
from lsst.coadd.deepprior.measure_coadd import make_measure_coadd
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.simulate import Scene
from lsst.images import YX, Box, Image, Mask
from lsst.images.cells import CellCoadd, CellGrid, CoaddProvenance, PatchDefinition

SHAPE, SEEING, TARGET = (60, 140), 2.0, 0.9

SNR = {(20.0, 20.0): 5.0, (50.0, 40.0): -5.0, (20.0, 45.0): 3.3, (110.0, 15.0): 5.0, (100.0, 42.0): 2.7}
"""Significance of the stars of the residual by position (x, y); the variance is 1 below x = 70, then 4."""

HOLE = (30, 90)
"""A pixel (y, x) without data."""


def make_coadd(
    scene: Scene, image: np.ndarray, variance: float, sigma: float, seed: int, x: int = 0
) -> CellCoadd:
    """Return a coadd of two cells of unequal variance, with a noise realisation and masked pixels."""
    grid = CellGrid(
        bbox=Box.from_shape(YX(*SHAPE), start=YX(14200, 15600 + x)), cell_shape=YX(SHAPE[0], SHAPE[1] // 2)
    )
    mask = Mask(schema=MASK_SCHEMA, bbox=grid.bbox)
    for name, column in (("SAT", 3), ("CLIPPED", 4 + seed)):
        pixels = np.zeros(SHAPE, dtype=bool)
        pixels[2, column] = True
        mask.set(name, pixels)
    variances = variance * np.where(np.arange(SHAPE[1]) < 70, 1.0, 4.0) * np.ones(SHAPE)
    noise = np.random.default_rng(seed).normal(size=SHAPE)
    images = (array.astype(np.float32) for array in (image, variances, noise))
    pixels, variance_plane, realisation = (
        Image(array, bbox=grid.bbox, unit=unit)
        for array, unit in zip(images, (u.nJy, u.nJy**2, None), strict=True)
    )
    patch = PatchDefinition(id=0, index=YX(0, 0), inner_bbox=grid.bbox, cells=grid)
    provenance = CoaddProvenance(
        inputs=CoaddProvenance.make_empty_input_table(1),
        contributions=CoaddProvenance.make_empty_contribution_table(0),
    )
    return CellCoadd(
        pixels,
        mask=mask,
        variance=variance_plane,
        noise_realizations=[realisation],
        sky_projection=scene.sky_projection,
        band="r",
        psf=make_cell_psf(np.tile(gaussian_stamp(sigma, 31), (1, 2, 1, 1)), grid),
        patch=patch,
        provenance=provenance,
    )


def plain_of(coadd: CellCoadd, residual: CellCoadd) -> Coadd:
    psf = np.tile(gaussian_stamp(SEEING, 31), (1, 2, 1, 1))
    return Coadd(coadd.image.array, TARGET, residual.image.array, residual.variance.array, psf)


@pytest.fixture
def pair(scene: Scene) -> tuple[CellCoadd, CellCoadd]:
    """A restored image, and a residual with a pixel without data."""
    error = np.sqrt(4.0 * np.pi) * SEEING
    stars = [(x, y, snr * error * (1.0 if x < 70.0 else 2.0)) for (x, y), snr in SNR.items()]
    image = np.random.default_rng(3).normal(size=SHAPE)
    coadd = make_coadd(scene, image, 0.25, TARGET, seed=1)
    residual = make_coadd(scene, gaussian_stars(SHAPE, stars, SEEING), 1.0, SEEING, seed=2)
    for plane in (residual.image, residual.variance, residual.noise_realizations[0]):
        plane.array[HOLE] = np.nan
    return coadd, residual


def test_psf_is_inexact_where_the_residual_is_significant(pair: tuple[CellCoadd, CellCoadd]) -> None:
    """The significance of a star falls from its place as exp(-r^2 / 4 sigma^2); that of 3 is the limit."""
    inexact = make_measure_coadd(*pair, plain_of(*pair)).mask.get("INEXACT_PSF")
    y, x = np.indices(SHAPE)
    significance = sum(
        snr * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (4.0 * SEEING**2)) for (x0, y0), snr in SNR.items()
    )
    clear = np.abs(np.abs(significance) - 3.0) > 0.15
    expected = np.abs(significance) > 3.0
    assert (expected & clear).sum() > 20
    expected[HOLE] = clear[HOLE] = True
    np.testing.assert_array_equal(inexact[clear], expected[clear])


def test_significance_of_the_residual_knows_that_noise_is_correlated(
    pair: tuple[CellCoadd, CellCoadd],
) -> None:
    """Blocks of equal pixels have four times the variance of white noise: 5 sigma are 2.5."""
    plain = plain_of(*pair)
    reach = 1.0 - 0.5 * np.abs(np.arange(-1, 2))
    inexact = make_measure_coadd(*pair, plain.correlated(np.outer(reach, reach))).mask.get("INEXACT_PSF")
    assert plain.noise_excess(plain.psf[0, 0]) == 1.0
    for (x, y), snr in SNR.items():
        assert not inexact[int(y), int(x)], snr


def test_image_variance_and_noise_are_sums(pair: tuple[CellCoadd, CellCoadd]) -> None:
    coadd, residual = pair
    both = make_measure_coadd(coadd, residual, plain_of(coadd, residual))
    seen = np.ones(SHAPE, dtype=bool)
    seen[HOLE] = False
    for name in ("image", "variance"):
        one, other, total = (getattr(c, name) for c in (coadd, residual, both))
        np.testing.assert_allclose(total.array[seen], (one.array + other.array)[seen], rtol=1e-5, atol=1e-6)
        assert total.unit == one.unit
    (noise,) = both.noise_realizations
    parts = [c.noise_realizations[0].array[seen] for c in pair]
    np.testing.assert_allclose(noise.array[seen], parts[0] + parts[1], rtol=1e-5, atol=1e-6)
    assert both.image.array[HOLE] == coadd.image.array[HOLE]
    assert np.isnan(both.variance.array[HOLE])
    assert np.isnan(noise.array[HOLE])


def test_mask_has_the_planes_of_both(pair: tuple[CellCoadd, CellCoadd]) -> None:
    coadd, residual = pair
    mask = make_measure_coadd(coadd, residual, plain_of(coadd, residual)).mask
    assert np.argwhere(mask.get("CLIPPED")).tolist() == [[2, 5], [2, 6]]
    assert np.argwhere(mask.get("SAT")).tolist() == [[2, 3]]
    assert np.argwhere(coadd.mask.get("CLIPPED")).tolist() == [[2, 5]]
    assert not coadd.mask.get("INEXACT_PSF").any()


def test_psf_is_the_target(pair: tuple[CellCoadd, CellCoadd]) -> None:
    both = make_measure_coadd(*pair, plain_of(*pair))
    for cell in both.psf.bounds.cell_indices():
        np.testing.assert_allclose(both.psf[cell].array, gaussian_stamp(TARGET, 31))


def test_metadata_are_those_of_the_restored_image(pair: tuple[CellCoadd, CellCoadd]) -> None:
    coadd, residual = pair
    coadd.metadata.update({"method": "pretrained network", "oversampling": 2})
    both = make_measure_coadd(coadd, residual, plain_of(coadd, residual))
    assert dict(both.metadata) == dict(coadd.metadata)
    both.metadata["method"] = "changed"
    assert coadd.metadata["method"] == "pretrained network"


def test_coadds_of_two_patches_are_refused(pair: tuple[CellCoadd, CellCoadd], scene: Scene) -> None:
    coadd, residual = pair
    beside = make_coadd(scene, residual.image.array, 1.0, SEEING, seed=2, x=SHAPE[1])
    with pytest.raises(ValueError, match="The restored image covers"):
        make_measure_coadd(coadd, beside, plain_of(coadd, residual))
