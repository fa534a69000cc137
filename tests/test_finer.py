# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The numerics of grids that are finer than those of the visits."""

from __future__ import annotations

import dataclasses

import galsim
import numpy as np
import pytest
import scipy.ndimage
import torch
from accelerator import ACCELERATOR, PretendedAccelerator
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.conditions import patch_conditions
from lsst.coadd.deepprior.finer import (
    OVERSAMPLINGS,
    block_correlation,
    finer_layout,
    finer_observation,
    finer_psf,
    own_stamp,
    spread_psf,
)
from lsst.coadd.deepprior.fit import make_trunk
from lsst.coadd.deepprior.fitted_patch import RestoreSettings, fit_patch
from lsst.coadd.deepprior.noise import coadd_layers
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.point_templates import point_latent
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp
from lsst.coadd.deepprior.restore import Restoration, restore
from lsst.coadd.deepprior.weights import TrainedNetwork, packaged_network

LAYOUT = CellLayout(2, 3, 20, 16)
SIGMA = 1.0
"""Sigma of the target in fine pixels."""


def profile(kind: str, fwhm: float) -> galsim.GSObject:
    """Return an elongated PSF without the pixel whose FWHM with it is about the one given, in pixels."""
    width = np.sqrt(fwhm**2 - 0.64)
    return {
        "moffat": galsim.Moffat(beta=3.5, fwhm=width),
        "kolmogorov": galsim.Kolmogorov(fwhm=width),
        "gaussian": galsim.Gaussian(fwhm=width),
    }[kind].shear(g1=0.05, g2=-0.08)


def stamp(psf: galsim.GSObject, size: int, oversampling: int = 1, shift: float = 0.0) -> np.ndarray:
    """Return what fine pixels see of a PSF with the response of a whole pixel, shifted by some of them."""
    seen = galsim.Convolve(psf, galsim.Pixel(1.0))
    image = galsim.Image(size, size, scale=1.0 / oversampling, dtype=float)
    array = seen.drawImage(image, method="no_pixel", offset=(-shift, -shift)).array
    return array / array.sum()


def finer(visits: list[Observation], oversampling: int) -> list[Observation]:
    return [finer_observation(visit, oversampling) for visit in visits]


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
@pytest.mark.parametrize(
    ("kind", "fwhm", "error"),
    [
        ("moffat", 3.0, 5e-4),
        ("moffat", 2.0, 1e-3),
        ("moffat", 1.5, 5e-3),
        ("kolmogorov", 3.0, 1e-3),
        ("kolmogorov", 2.0, 4e-3),
        ("kolmogorov", 1.5, 5e-3),
        ("gaussian", 2.0, 1e-3),
        ("gaussian", 1.5, 1e-3),
    ],
)
def test_finer_psf_is_the_psf_at_fine_pixels(kind: str, fwhm: float, error: float, oversampling: int) -> None:
    psf = profile(kind, fwhm)
    own = stamp(psf, 25)
    for centred in (False, True):
        result = finer_psf(own[None, None], oversampling, centred=centred)[0, 0]
        shift = 0.0 if centred or oversampling == 3 else 0.5
        truth = stamp(psf, 24 * oversampling + 1, oversampling, shift)
        assert result.sum() == pytest.approx(1.0)
        assert np.abs(result - truth).max() < error * truth.max()


def test_finer_psf_of_cells() -> None:
    own = np.full((2, 2, 15, 15), np.nan)
    own[0, 0] = own[0, 1] = 7.0 * stamp(profile("moffat", 2.5), 15)
    own[1, 1] = stamp(profile("gaussian", 3.0), 15)
    result = finer_psf(own, 2)
    assert result.shape == (2, 2, 29, 29)
    assert np.isnan(result[1, 0]).all()
    np.testing.assert_array_equal(result[0, 0], result[0, 1])
    assert np.abs(result[0, 0] - result[1, 1]).max() > 1e-3
    for cell in ((0, 0), (1, 1)):
        back = own_stamp(result[cell], 2)
        assert back.shape == (15, 15)
        expected = own[cell] / own[cell].sum()
        np.testing.assert_allclose(back, expected, rtol=0.0, atol=2e-3 * expected.max())
    assert own_stamp(own[0, 0], 1) is own[0, 0] or np.array_equal(own_stamp(own[0, 0], 1), own[0, 0])
    np.testing.assert_allclose(
        own_stamp(finer_psf(own, 3)[0, 0], 3), own[0, 0] / 7.0, rtol=0.0, atol=2e-3 * own[0, 0].max() / 7.0
    )


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_spread_psf_is_centred_and_wider_by_a_pixel(oversampling: int) -> None:
    own = gaussian_stamp(1.5, 21)[None, None]
    spread = spread_psf(finer_psf(own, oversampling), oversampling)[0, 0]
    assert spread.sum() == pytest.approx(1.0)
    fit = fit_star(spread, radius=12)
    assert fit.x == pytest.approx(spread.shape[0] // 2, abs=1e-6)
    assert fit.y == pytest.approx(spread.shape[0] // 2, abs=1e-6)
    variance = (oversampling * 1.5) ** 2 + (oversampling**2 - 1) / 12.0
    assert fit.sigma == pytest.approx(np.sqrt(variance), rel=3e-3)
    assert np.isnan(spread_psf(np.full((1, 1, 5, 5), np.nan), oversampling)).all()


@pytest.mark.parametrize("oversampling", [0, 1, 4, 2.5])
def test_other_factors_are_refused(oversampling: int) -> None:
    (visit,) = observe(LAYOUT, [], [1.5])
    for refused in (
        lambda: finer_layout(LAYOUT, oversampling),
        lambda: finer_observation(visit, oversampling),
        lambda: finer_psf(visit.psf, oversampling),
    ):
        with pytest.raises(ValueError, match="must be 2 or 3"):
            refused()


def test_what_cannot_be_finer_is_refused() -> None:
    (visit,) = observe(LAYOUT, [], [1.5])
    with pytest.raises(ValueError, match="finer grid already"):
        finer_observation(finer_observation(visit, 2), 2)
    with pytest.raises(ValueError, match="odd k"):
        finer_psf(np.ones((1, 1, 4, 4)), 2)
    with pytest.raises(ValueError, match="odd k"):
        finer_psf(np.ones((5, 5)), 2)
    with pytest.raises(ValueError, match="positive sum"):
        finer_psf(-np.ones((1, 1, 5, 5)), 2)
    visits = [finer_observation(visit, 2), dataclasses.replace(finer_observation(visit, 2), sampling=1)]
    with pytest.raises(ValueError, match="not the same pixels"):
        PatchData(visits, finer_layout(LAYOUT, 2), SIGMA)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_a_fine_visit_has_the_pixels_of_the_visit_and_no_others(oversampling: int) -> None:
    (visit,) = observe(LAYOUT, [], [1.5], noise=3.0, masked_fraction=0.1)
    noise = np.random.default_rng(2).standard_normal((30, 40)).astype(np.float32)
    part = {name: getattr(visit, name)[7:37, 2:42] for name in ("flux", "variance", "good")}
    fine = finer_observation(dataclasses.replace(visit, **part, noise=noise, origin=(7, 2)), oversampling)
    assert fine.origin == (7 * oversampling, 2 * oversampling)
    assert fine.good.sum() == part["good"].sum()
    # The pixel in the middle of each block, or the one before it.
    block = np.s_[(oversampling - 1) // 2 :: oversampling]
    area = oversampling**2
    for name, scale in (("flux", area), ("noise", area), ("variance", area**2), ("good", 1)):
        own = noise if name == "noise" else part[name]
        np.testing.assert_allclose(scale * getattr(fine, name)[block, block], own, rtol=1e-6)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_a_star_is_predicted_where_it_is(oversampling: int) -> None:
    """A point of the fine grid at k X + (k - 1) / 2 is at X for the visits, with its flux."""
    k, x, y, flux = oversampling, 20.37, 13.81, 5000.0
    # The visit covers a part of the patch only, at an origin of its own.
    visits = observe(LAYOUT, [(x, y, flux)], [1.4], noiseless=True)
    visit = dataclasses.replace(
        visits[0],
        flux=visits[0].flux[3:, 5:43],
        variance=visits[0].variance[3:, 5:43],
        good=visits[0].good[3:, 5:43],
        origin=(3, 5),
    )
    data = PatchData([finer_observation(visit, k)], finer_layout(LAYOUT, k), SIGMA, margin=8)
    latent = torch.zeros(data.shape)
    fine_y, fine_x = k * y + 0.5 * (k - 1) + 8, k * x + 0.5 * (k - 1) + 8
    iy, ix = round(fine_y), round(fine_x)
    point = torch.as_tensor(point_latent(SIGMA, fine_y - iy, fine_x - ix), dtype=torch.float32)
    half = point.shape[0] // 2
    latent[iy - half : iy + half + 1, ix - half : ix + half + 1] = flux * point
    tensors = data.visit(0)
    prediction = tensors.kernel.forward(latent)[data.sampled].numpy() * k**2
    inside = tensors.weight[data.sampled].numpy() > 0.0
    np.testing.assert_array_equal(inside[3:, 5:43], True)
    assert inside.sum() == visit.good.sum()
    expected = gaussian_stars(LAYOUT.shape, [(x, y, flux)], 1.4)
    assert np.abs(prediction - expected)[inside].max() < 4e-3 * expected.max()
    there = tensors.flux[data.sampled].numpy()[3:, 5:43] * k**2
    np.testing.assert_allclose(there, visit.flux, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_masked_operator_is_adjoint_and_near_its_gram_form(oversampling: int) -> None:
    visits = finer(observe(LAYOUT, [], [0.85, 1.2]), oversampling)
    data = PatchData(visits, finer_layout(LAYOUT, oversampling), SIGMA, margin=16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.randn(data.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = torch.zeros_like(u)
    for _, visit in data.visits():
        left = (visit.weight * visit.kernel.forward(u) * v).sum()
        right = (u * visit.kernel.adjoint(visit.weight * v)).sum()
        assert float(left) == pytest.approx(float(right), rel=1e-10)
        exact += visit.kernel.adjoint(visit.weight * visit.kernel.forward(u))
    gram = data.sets().gram.forward(u[None])[0]
    inner = np.s_[40:-40, 40:-40] if oversampling == 3 else np.s_[32:-32, 32:-32]
    # FWHM 2 pixels at best: what the pixels alias is a few per cent of the smallest scales.
    assert float((exact - gram)[inner].std()) < 0.05 * float(gram[inner].std())


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_weights_are_shared_between_fine_pixels(oversampling: int) -> None:
    visits = observe(LAYOUT, [], [1.3, 1.6], masked_fraction=0.2)
    own = PatchData(visits, LAYOUT, SIGMA)
    data = PatchData(finer(visits, oversampling), finer_layout(LAYOUT, oversampling), SIGMA)
    # In nJy per fine pixel the variance is smaller by the area squared, and shared by the area.
    np.testing.assert_allclose(data.weight, oversampling**2 * own.weight, rtol=1e-6)
    np.testing.assert_allclose(data.good_fraction, own.good_fraction)
    np.testing.assert_array_equal(data.overlap, own.overlap)
    np.testing.assert_allclose(data.seeing, oversampling * own.seeing, rtol=1e-2)
    middle = tuple(n // 2 for n in data.shape)
    variance, seen = data.noise_of_gradient()
    assert float(variance[middle] / seen[middle]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_median_between_pixels_is_linear(oversampling: int) -> None:
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    (visit,) = observe(LAYOUT, [], [1.5], noiseless=True)
    ramp = dataclasses.replace(visit, flux=(4.0 + 2.0 * x + 3.0 * y).astype(np.float32))
    data = PatchData(finer([ramp], oversampling), finer_layout(LAYOUT, oversampling), SIGMA)
    median = data.lower_median(data.sets())[0]
    inner = median[data.margin : -data.margin, data.margin : -data.margin].numpy() * oversampling**2
    fine_y, fine_x = np.mgrid[: inner.shape[0], : inner.shape[1]]
    shift = 0.5 * (oversampling - 1)
    expected = 4.0 + 2.0 * (fine_x - shift) / oversampling + 3.0 * (fine_y - shift) / oversampling
    edge = oversampling
    np.testing.assert_allclose(inner[edge:-edge, edge:-edge], expected[edge:-edge, edge:-edge], rtol=1e-5)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_layers_are_spread_over_fine_pixels(oversampling: int) -> None:
    """What is found at pixels of visits is the same as on their own grid; an outlier keeps place and flux."""
    k = oversampling
    visits = observe(LAYOUT, [(30.0, 20.0, 900.0)], [1.4, 1.6, 1.8, 1.5], seed=3, masked_fraction=0.05)
    visits[2].flux[9:11, 12:17] = 40.0
    visits[2].good[9:11, 12:17] = True
    visits = [
        dataclasses.replace(visit, flux=np.where(visit.good, visit.flux, 0.0).astype(np.float32))
        for visit in visits
    ]
    own = PatchData(visits, LAYOUT, SIGMA)
    data = PatchData(finer(visits, k), finer_layout(LAYOUT, k), SIGMA)
    expected = coadd_layers(own, torch.zeros(own.shape))
    layers = coadd_layers(data, torch.zeros(data.shape))
    for name in ("coadd", "residual"):
        blocks = getattr(layers, name).reshape(LAYOUT.shape[0], k, LAYOUT.shape[1], k).sum(axis=(1, 3))
        np.testing.assert_allclose(blocks, getattr(expected, name), rtol=1e-4, atol=1e-4)
    for name, scale in (("variance", k**4), ("n_visits", 1), ("n_good", 1), ("masked", 1), ("clipped", 1)):
        for dy, dx in np.ndindex(k, k):
            shown = getattr(layers, name)[dy::k, dx::k]
            np.testing.assert_allclose(shown * scale, getattr(expected, name), rtol=1e-5)
    assert layers.chi2 == pytest.approx(expected.chi2, rel=1e-5)
    found, wanted = (
        max((one for one in some.outliers if one.visit == 2 and one.x < 24 * step), key=lambda one: one.flux)
        for some, step in ((layers, k), (expected, 1))
    )
    one, fine = np.zeros(LAYOUT.shape), np.zeros(finer_layout(LAYOUT, k).shape)
    one[wanted.pixels] = 1.0
    np.add.at(fine, found.pixels, 1.0)
    np.testing.assert_array_equal(fine, np.kron(one, np.ones((k, k))))
    assert found.x == pytest.approx(k * wanted.x + 0.5 * (k - 1))
    assert found.y == pytest.approx(k * wanted.y + 0.5 * (k - 1))
    assert found.peak_snr == pytest.approx(wanted.peak_snr, rel=1e-4)
    for name in ("flux", "flux_err"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-4)
    for name in ("psf_flux", "psf_flux_err"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-2)
    for name in ("length", "width"):
        assert getattr(found, name) == pytest.approx(k * getattr(wanted, name))


def test_noise_between_neighbours_is_that_of_the_visits() -> None:
    rng = np.random.default_rng(1)
    visits = observe(LAYOUT, [], [1.5, 1.5, 1.5])
    smooth = [scipy.ndimage.uniform_filter(rng.standard_normal(LAYOUT.shape), 2) * 2.0 for _ in visits]
    visits = [
        dataclasses.replace(visit, flux=image.astype(np.float32))
        for visit, image in zip(visits, smooth, strict=True)
    ]
    from lsst.coadd.deepprior.baselines import maximum_likelihood

    values = []
    for data in (
        PatchData(visits, LAYOUT, SIGMA),
        PatchData(finer(visits, 2), finer_layout(LAYOUT, 2), SIGMA),
    ):
        solution = maximum_likelihood(data, data.sets(), steps=5)
        values.append(patch_conditions(data, solution, 5)["noise_correlation"])
    assert values[0] == pytest.approx(0.5, abs=0.1)
    assert values[1] == pytest.approx(values[0], abs=0.1)


def test_block_correlation_is_that_of_repeated_pixels() -> None:
    np.testing.assert_array_equal(block_correlation(1), [[1.0]])
    rng = np.random.default_rng(4)
    noise = np.kron(rng.standard_normal((400, 400)), np.ones((3, 3)))
    correlation = block_correlation(3)
    for dy, dx in ((0, 1), (1, 2), (2, 2)):
        measured = (noise[dy:, dx:] * noise[: noise.shape[0] - dy, : noise.shape[1] - dx]).mean()
        assert measured == pytest.approx(correlation[2 + dy, 2 + dx], abs=0.01)


# Restorations: a pair 1.75 pixels apart, seen with a FWHM of 2.25 pixels, and a star.
PAIR = [(23.9, 20.3, 6000.0), (25.4, 21.2, 6000.0)]
STAR = (9.3, 30.6, 9000.0)
FIELD = CellLayout(1, 1, 40, 36)
QUICK = RestoreSettings(steps=0, base_steps=240, n_variance_draws=2, check_psf=False)
SEEING = 2.25 / 2.3548


def restored(oversampling: int, network: TrainedNetwork | None, fwhm: float | None = None) -> Restoration:
    visits = observe(FIELD, [*PAIR, STAR], [0.97 * SEEING, SEEING, 1.03 * SEEING, SEEING] * 2, noise=5.0)
    settings = dataclasses.replace(QUICK, target_fwhm=fwhm)
    if oversampling == 1:
        return restore(visits, FIELD, settings, network=network)
    return restore(finer(visits, oversampling), finer_layout(FIELD, oversampling), settings, network=network)


def dip(image: np.ndarray, oversampling: int) -> float:
    """Return how far the image between the members of the pair is below the fainter of them."""
    (x1, y1, _), (x2, y2, _) = PAIR
    t = np.linspace(-0.2, 1.2, 57)
    points = [oversampling * (a + t * (b - a)) + 0.5 * (oversampling - 1) for a, b in ((y1, y2), (x1, x2))]
    line = scipy.ndimage.map_coordinates(image, points, order=3)
    between = slice(20, 37)
    return 1.0 - line[between].min() / min(line[:28].max(), line[28:].max())


@pytest.mark.parametrize("start", ["maximum likelihood", "pretrained"])
def test_pair_is_split_on_finer_pixels_only(start: str) -> None:
    network = packaged_network() if start == "pretrained" else None
    result = restored(2, network)
    assert start in result.metrics["method"]
    normal, fine = restored(1, network).image, result.image
    interpolated = scipy.ndimage.zoom(normal, 2, order=5, grid_mode=True, mode="nearest") / 4.0
    assert dip(fine, 2) > 0.25
    assert dip(normal, 1) < 0.1
    assert dip(interpolated, 2) < 0.1
    x, y, flux = STAR
    cut = fine[2 * 31 - 14 : 2 * 31 + 14, 0 : 2 * 9 + 14]
    assert cut.sum() == pytest.approx(flux, rel=0.02)
    star = fit_star(fine, x=2 * x + 0.5, y=2 * y + 0.5, radius=5)
    assert star.x == pytest.approx(2 * x + 0.5, abs=0.05)
    assert star.y == pytest.approx(2 * y + 0.5, abs=0.05)


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_rebinned_image_is_the_normal_one(oversampling: int) -> None:
    """With the same target on the sky, and none of the structure that only fine pixels hold."""
    visits = observe(FIELD, [(11.3, 25.6, 4000.0), (26.1, 12.2, 1500.0)], [1.5, 1.6, 1.7, 1.8], noise=4.0)
    # With pixels of a third the seeing is beyond what the network was trained on.
    network = packaged_network() if oversampling == 2 else None
    normal = restore(visits, FIELD, dataclasses.replace(QUICK, target_fwhm=2.5), network=network)
    fine = restore(
        finer(visits, oversampling),
        finer_layout(FIELD, oversampling),
        dataclasses.replace(QUICK, target_fwhm=2.5 * oversampling),
        network=network,
    )
    method = "maximum likelihood: no steps asked for" if network is None else "pretrained network"
    assert normal.metrics["method"] == fine.metrics["method"] == method
    rebinned = fine.image.reshape(40, oversampling, 36, oversampling).sum(axis=(1, 3))
    # The sum over a pixel of the visits, for the normal image too: its mean over the pixel.
    frequency = [np.fft.fftfreq(n) for n in normal.image.shape]
    response = [
        np.sin(np.pi * f) / (oversampling * np.sin(np.pi * f / oversampling) + (f == 0)) + (f == 0)
        for f in frequency
    ]
    same = np.fft.ifft2(np.fft.fft2(normal.image) * np.outer(*response)).real
    noise = normal.metrics["noise"]["coadd_sigma_nJy"]
    difference = (rebinned - same) / noise
    assert np.sqrt((difference**2).mean()) < 0.5
    # Maximum likelihood has the noise of the sky in it, which is not negative.
    assert rebinned.sum() == pytest.approx(same.sum(), rel=0.01 if network is not None else 0.03)
    # No pattern on the scale of the visits' pixels.
    phases = [
        fine.image[dy::oversampling, dx::oversampling].mean() for dy, dx in np.ndindex(*(oversampling,) * 2)
    ]
    assert np.ptp(phases) < 0.05 * noise / oversampling**2
    assert np.isfinite(fine.variance).all()
    assert fine.image.shape == fine.prior_carried.shape == fine.residual.shape


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_light_of_stars_is_not_doubled_after_many_steps(oversampling: int) -> None:
    """A point may be more than a fine pixel from the peak that it takes the place of."""
    visits = observe(FIELD, [(11.3, 25.6, 4000.0), (26.1, 12.2, 1500.0)], [1.5, 1.6, 1.7, 1.8], noise=4.0)
    visits, layout = finer(visits, oversampling), finer_layout(FIELD, oversampling)
    few, many = (
        fit_patch(
            visits,
            layout,
            dataclasses.replace(QUICK, base_steps=steps, target_fwhm=2.5 * oversampling),
        )
        for steps in (160, 960)
    )
    assert sorted(many.points.flux) == pytest.approx([1500.0, 4000.0], rel=0.03)
    few_sum, many_sum = (float(fitted.image(fitted.points.latent).sum()) for fitted in (few, many))
    assert many_sum == pytest.approx(few_sum, rel=0.005)


@pytest.mark.parametrize("start", ["scratch", "trained"])
def test_finer_restoration_on_an_accelerator(start: str) -> None:
    """No tensor of a finer restoration is on the wrong device, and the result is that of the CPU."""
    layout = CellLayout(2, 1, 16, 20)
    visits = finer(observe(layout, [(9.2, 14.7, 900.0)], [1.5, 1.7, 1.9, 1.6], seed=1, stamp=15), 2)
    visits[2].flux[31, 3:30] += 20.0
    settings = RestoreSettings(steps=4, base_steps=25, n_splits=2, refresh_every=2, n_variance_draws=1)
    ranges = dict.fromkeys(
        ("n_visits", "seeing_pixels", "target_pixels", "lit_fraction", "noise_correlation"), (-1e3, 1e3)
    )
    trunk = make_trunk(1, torch.device("cpu"), torch.float32)
    network = TrainedNetwork(trunk, ranges, {"name": "toy"}) if start == "trained" else None
    expected = restore(visits, finer_layout(layout, 2), settings, network=network)
    with PretendedAccelerator():
        result = restore(visits, finer_layout(layout, 2), settings, network=network, device=ACCELERATOR)
    np.testing.assert_allclose(result.image, expected.image, rtol=1e-4, atol=1e-4)
    again = restore(visits, finer_layout(layout, 2), settings, network=network)
    np.testing.assert_array_equal(again.image, expected.image)
