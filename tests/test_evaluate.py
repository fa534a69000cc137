# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.
from __future__ import annotations

import galsim
import numpy as np
import pytest
from astropy.table import Table, vstack

from lsst.coadd.deepprior.evaluate import (
    Detections,
    Gain,
    aperture_ratios,
    coadd_detections,
    evaluate,
    match,
    pool,
    split_pairs,
)
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp
from lsst.coadd.deepprior.truth import render
from lsst.images import Box

SCALE = 0.2
BOX = Box.factory[500:620, 300:400]
SIGMA, COADD_SIGMA, NOISE = 0.9, 1.9, 1.0


def truth(rows: list[tuple[float, float, float, int]], kind: str = "star") -> Table:
    """Make a catalogue of objects (x, y, flux, pair)."""
    x, y, flux, pair = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    return Table(
        {
            "type": [kind] * n,
            "x": x.astype(float),
            "y": y.astype(float),
            "flux_nJy": flux.astype(float),
            "mag": 31.4 - 2.5 * np.log10(flux),
            "pair_id": pair,
            "hlr": np.full(n, 0.4),
            "sersic_n": np.ones(n),
            "axis_ratio": np.full(n, 0.7),
            "angle": np.full(n, 30.0),
        }
    )


FIELD = truth([(330.3, 530.2, 900.0, -1), (370.0, 590.4, 700.0, 0), (373.1, 591.0, 450.0, 0)])


def plain_coadd(catalogue: Table, model: np.ndarray, seed: int = 1) -> Coadd:
    """Make the plain coadd of a field, of which the restoration has found ``model``."""
    data = render(catalogue, COADD_SIGMA, BOX) + NOISE * np.random.default_rng(seed).standard_normal(
        BOX.shape
    )
    psf = gaussian_stamp(COADD_SIGMA, 25)[None, None]
    carried = Coadd(model, SIGMA, np.zeros(BOX.shape), np.full(BOX.shape, NOISE**2), psf).image
    return Coadd(model, SIGMA, data - carried, np.full(BOX.shape, NOISE**2), psf)


def test_matches_are_one_to_one_and_closest_first() -> None:
    catalogue = truth([(10.0, 20.0, 1.0, -1), (12.0, 20.0, 1.0, -1), (40.0, 50.0, 1.0, -1)])
    found = Detections(np.array([11.8, 10.5, 70.0]), np.array([20.0, 20.0, 70.0]), np.ones(3))
    np.testing.assert_array_equal(match(found, catalogue, 3.0), [1, 0, -1])
    one = Detections(np.array([10.9]), np.array([20.0]), np.ones(1))
    np.testing.assert_array_equal(match(one, catalogue, 3.0), [0, -1, -1])
    np.testing.assert_array_equal(match(Detections(*np.empty((3, 0))), catalogue, 3.0), [-1, -1, -1])


def test_split_pairs_need_both_members() -> None:
    catalogue = truth([(1, 1, 1, 0), (2, 1, 1, 0), (9, 9, 1, 4), (8, 9, 1, 4), (5, 5, 1, -1), (7, 1, 1, 5)])
    index = np.array([0, 1, 2, -1, 3, 4])
    bright = np.ones(6, dtype=bool)
    np.testing.assert_array_equal(split_pairs(index, catalogue, bright), [True, False])
    bright[0] = False
    np.testing.assert_array_equal(split_pairs(index, catalogue, bright), [False])


@pytest.mark.parametrize("kind", ["star", "galaxy"])
def test_aperture_ratio_of_truth_is_one_and_scales(kind: str) -> None:
    catalogue = truth([(330.3, 530.2, 900.0, -1), (360.7, 580.6, 700.0, -1)], kind)
    image = render(catalogue, SIGMA, BOX)
    psf = galsim.Gaussian(sigma=SIGMA * SCALE)
    np.testing.assert_allclose(aperture_ratios(image, psf, catalogue, BOX, SCALE), 1.0, rtol=5e-3)
    np.testing.assert_allclose(aperture_ratios(0.8 * image, psf, catalogue, BOX, SCALE), 0.8, rtol=5e-3)


def test_plain_coadd_detects_stars_and_blends_the_pair() -> None:
    coadd = plain_coadd(FIELD, np.zeros(BOX.shape))
    found = coadd_detections(coadd, (BOX.y.start, BOX.x.start))
    index = match(found, FIELD, 2.0)
    assert index[0] >= 0
    assert (index[1:] >= 0).sum() == 1
    assert found.flux[index[0]] == pytest.approx(900.0, rel=0.05)
    assert len(found.x) <= 3
    # Centred pixels would be off by (0.3, 0.2) and the error is about 0.03.
    np.testing.assert_allclose([found.x[index[0]], found.y[index[0]]], [330.3, 530.2], atol=0.12)


def test_wings_of_stars_are_no_blank_sky() -> None:
    """Neither those of a Moffat star in the patch nor those of a brighter one beyond its border."""
    catalogue = truth([(330.3, 530.2, 1e5, -1), (395.0, 645.0, 3e6, -1)])
    moffat = galsim.Moffat(beta=3.5, fwhm=COADD_SIGMA * SCALE * FWHM_PER_SIGMA)
    data = galsim.Image(NOISE * np.random.default_rng(2).standard_normal(BOX.shape))
    data.setOrigin(BOX.x.start, BOX.y.start)
    for x, y, flux in catalogue["x", "y", "flux_nJy"].iterrows():
        star = moffat.withFlux(flux).drawImage(
            nx=301, ny=301, scale=SCALE, center=galsim.PositionD(x, y), method="no_pixel", dtype=float
        )
        overlap = star.bounds & data.bounds
        data[overlap] += star[overlap]
    stamp = moffat.drawImage(nx=25, ny=25, scale=SCALE, method="no_pixel", dtype=float).array
    model = render(catalogue, SIGMA, BOX)
    zero, variance = np.zeros(BOX.shape), np.full(BOX.shape, NOISE**2)
    psf = (stamp / stamp.sum())[None, None]
    carried = Coadd(model, SIGMA, zero, variance, psf).image
    coadd = Coadd(model, SIGMA, data.array - carried, variance, psf)
    sources = Table({"x": [], "y": [], "flux": []})
    gains = evaluate(coadd, model, SIGMA, sources, catalogue, BOX, SCALE)
    numbers = {gain.name: gain.numbers() for gain in gains}
    for name in ("rms of the blank sky (nJy)", "robust scatter of the blank sky (nJy)"):
        assert numbers[name][0] == pytest.approx(NOISE, rel=0.05)
        assert numbers[name][1] == pytest.approx(0.0, abs=1e-3)
    # Nowhere in the patch is the sky blank when the star beyond the border is far brighter.
    catalogue["flux_nJy"][1] = 1e9
    gains = evaluate(coadd, model, SIGMA, sources, catalogue, BOX, SCALE)
    assert np.isnan({gain.name: gain.numbers() for gain in gains}["rms of the blank sky (nJy)"][0])


def test_star_beside_one_beyond_the_border_is_not_isolated() -> None:
    """The bright star 4 arcsec away, outside the image, would be seen in the flux of the one inside."""
    inside, outside = (381.0, 530.2, 900.0, -1), (401.0, 530.2, 9000.0, -1)
    sources = Table({"x": [381.0], "y": [530.2], "flux": [900.0]})
    for rows, n in (([inside], 1), ([inside, outside], 0)):
        catalogue = truth(rows)
        model = render(catalogue, SIGMA, BOX)
        gains = evaluate(plain_coadd(catalogue, model), model, SIGMA, sources, catalogue, BOX, SCALE)
        counts = {gain.name: len(gain.restored) for gain in gains}
        assert counts["flux in the image, stars with S/N > 20 (%)"] == n


def test_evaluation_of_a_perfect_restoration() -> None:
    model = render(FIELD, SIGMA, BOX)
    sources = Table({"x": FIELD["x"], "y": FIELD["y"], "flux": FIELD["flux_nJy"]})
    gains = evaluate(plain_coadd(FIELD, model), model, SIGMA, sources, FIELD, BOX, SCALE)
    numbers = {gain.name: gain.numbers() for gain in gains}
    assert numbers["seeing, FWHM of the PSF (arcsec)"] == pytest.approx((0.8948, 0.4239), rel=1e-3)
    for name in ("rms of the blank sky (nJy)", "robust scatter of the blank sky (nJy)"):
        assert numbers[name] == pytest.approx((NOISE, 0.0), rel=0.05, abs=1e-3)
    assert numbers["flux in the image, stars with S/N > 20 (%)"][1] == pytest.approx(0.0, abs=0.5)
    assert numbers["flux in the catalogue, stars with S/N > 20 (%)"][1] == pytest.approx(0.0, abs=1e-9)
    assert numbers["size of stars with S/N > 100 against the PSF (%)"][1] == pytest.approx(0.0, abs=0.1)
    assert numbers["pairs at 0.5-0.9 arcsec split (%)"] == (0.0, 100.0)
    assert numbers["true sources with S/N > 5 found (%)"] == pytest.approx((200 / 3, 100.0))
    assert numbers["entries without a true source (%)"][1] == 0.0
    assert np.isnan(numbers["flux in the image, galaxies of 22-24 mag (%)"][1])


def test_evaluation_of_a_poor_catalogue() -> None:
    """Of stars and galaxies that are displaced, missing, near the border or without data."""
    stars = truth([(330.3, 530.2, 900.0, -1), (370.0, 580.0, 700.0, 0), (305.0, 600.0, 800.0, 0)])
    field = vstack([stars, truth([(365.0, 535.4, 3000.0, -1), (330.7, 580.0, 500.0, -1)], "galaxy")])
    model = render(field, SIGMA, BOX)
    zero, variance = np.zeros(BOX.shape), np.full(BOX.shape, NOISE**2)
    # There are no data in the core of the second star.
    variance[79:82, 69:72] = np.nan
    coadd = Coadd(model, SIGMA, zero, variance, gaussian_stamp(COADD_SIGMA, 25)[None, None])
    found = coadd_detections(coadd, (BOX.y.start, BOX.x.start))
    assert np.hypot(found.x - 370.0, found.y - 580.0).min() > 5.0
    sources = Table(
        {
            "x": [331.3, 306.8, 365.0, 330.7, 350.0],
            "y": [530.2, 600.0, 535.4, 580.0, 560.0],
            "flux": [900.0, 800.0, 3300.0, 400.0, 100.0],
        }
    )
    gains = {gain.name: gain for gain in evaluate(coadd, model, SIGMA, sources, field, BOX, SCALE)}
    for name, bias in (
        ("stars with S/N > 20", 0.0),
        ("galaxies of 22-24 mag", 10.0),
        ("galaxies of 24-25.5 mag", -20.0),
    ):
        assert len(gains[f"flux in the image, {name} (%)"].restored) == 1
        assert gains[f"flux in the image, {name} (%)"].numbers() == pytest.approx((0.0, 0.0), abs=0.5)
        assert gains[f"flux in the catalogue, {name} (%)"].numbers()[1] == pytest.approx(bias)
    # The star at the border is matched within half of the seeing, and not within 0.3 arcsec.
    assert gains["true sources with S/N > 5 found (%)"].numbers() == (100.0, 75.0)
    assert gains["entries without a true source (%)"].numbers() == (0.0, 20.0)
    assert np.isnan(gains["pairs at 0.5-0.9 arcsec split (%)"].numbers()).all()


def test_pool() -> None:
    first = [
        Gain("a", "share", np.array([True]), np.array([False])),
        Gain("b", "bias", np.empty(0), np.ones(1)),
    ]
    second = [
        Gain("a", "share", np.array([False]), np.array([False])),
        Gain("b", "bias", np.empty(0), 1.2 * np.ones(1)),
    ]
    shares, bias = pool([first, second])
    assert shares.numbers() == (50.0, 0.0)
    assert bias.numbers()[1] == pytest.approx(10.0)
    assert np.isnan(bias.numbers()[0])
