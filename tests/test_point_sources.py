# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior import point_sources as module
from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.point_sources import PointSources, point_sources
from lsst.coadd.deepprior.point_templates import point_latent, point_templates
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp

LAYOUT = CellLayout(2, 1, 40, 70)
SIGMA = 0.9
MARGIN = 16
SEEING = [1.6, 1.8, 2.2, 1.7]


def _points(
    visits: list[Observation], steps: int = 40, **settings: float
) -> tuple[PatchData, torch.Tensor, PointSources]:
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN, **settings)
    sets = data.sets()
    latent = maximum_likelihood(data, sets, steps=steps).latent[0]
    return data, latent, point_sources(data, sets, latent)


def _image(latent: torch.Tensor) -> np.ndarray:
    return inner_smooth(latent, SIGMA).numpy()[MARGIN:-MARGIN, MARGIN:-MARGIN]


@pytest.mark.parametrize("sigma", [0.8, 1.3])
@pytest.mark.parametrize("dy", [-0.5, -0.2, 0.0, 0.35, 1.0])
@pytest.mark.parametrize("dx", [-1.0, 0.1, 0.5])
def test_latent_image_of_a_point_is_the_target_psf(sigma: float, dy: float, dx: float) -> None:
    latent = point_latent(sigma, dy, dx)
    assert latent.min() >= 0.0
    size = latent.shape[0] + 20
    image = inner_smooth(torch.as_tensor(np.pad(latent, 10)), sigma).numpy()
    expected = gaussian_stamp(sigma, size, dx=dx, dy=dy)
    np.testing.assert_allclose(image, expected, atol=2e-3 * expected.max())
    assert latent.sum() == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("position", [(1.2, 0.0), (0.0, -1.01), (np.nan, 0.0)])
def test_a_point_outside_the_central_pixel_is_refused(position: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="central pixel"):
        point_latent(0.8, *position)


def test_stars_get_their_flux_their_place_and_the_target_psf() -> None:
    stars = [(20.2, 15.7, 8000.0), (50.4, 60.0, 2000.0)]
    visits = observe(LAYOUT, stars, SEEING, seed=1, masked_fraction=0.02)
    _, latent, points = _points(visits)
    assert len(points.flux) == 2
    advertised = fit_star(gaussian_stamp(SIGMA, 15), radius=4)
    for (x, y, flux), px, py, found in zip(
        sorted(stars),
        *(values[np.argsort(points.x)] for values in (points.x, points.y, points.flux)),
        strict=True,
    ):
        # The errors of a position and a flux are some 1.2 / (S/N) pixels and 1 / (S/N), S/N above 300.
        assert (px - MARGIN, py - MARGIN) == pytest.approx((x, y), abs=0.02)
        assert found == pytest.approx(flux, rel=0.01)
        fit = fit_star(_image(points.latent), x=x, y=y, radius=4)
        assert fit.sigma == pytest.approx(advertised.sigma, rel=2e-3)
        assert np.hypot(fit.e1, fit.e2) < 2e-3
    before = [fit_star(_image(latent), x=x, y=y, radius=4) for x, y, _ in stars]
    assert max(abs(fit.sigma / advertised.sigma - 1.0) for fit in before) > 5e-3


def test_what_is_no_point_is_left_as_it_was() -> None:
    """A galaxy of sigma 1 pixel, and two stars 1.6 pixels apart, which make one peak."""
    galaxy = [(20.0, 30.0, 9000.0)]
    visits = observe(LAYOUT, [(50.2, 50.0, 5000.0), (51.5, 51.0, 4000.0)], SEEING, seed=2)
    for visit, sigma in zip(visits, SEEING, strict=True):
        visit.flux[...] += gaussian_stars(LAYOUT.shape, galaxy, np.hypot(sigma, 1.0))
    _, latent, points = _points(visits)
    assert points.n_candidates > 0
    assert len(points.flux) == 0
    assert points.latent is latent


def test_close_stars_are_fitted_together() -> None:
    stars = [(30.2, 25.3, 4000.0), (34.6, 26.1, 2500.0), (52.0, 24.6, 1500.0)]
    visits = observe(LAYOUT, stars, SEEING, seed=3)
    _, _, points = _points(visits, steps=200)
    order = np.argsort(points.x)
    np.testing.assert_allclose(points.flux[order], [flux for _, _, flux in stars], rtol=0.03)
    np.testing.assert_allclose(points.x[order] - MARGIN, [x for x, _, _ in stars], atol=0.06)
    np.testing.assert_allclose(points.y[order] - MARGIN, [y for _, y, _ in stars], atol=0.06)


def test_a_dense_field_is_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stars are linked; parts of at most 5, each with those around it, give what one large fit does."""
    rng = np.random.default_rng(4)
    places = [(x, y) for x in range(8, 68, 6) for y in range(9, 45, 6)]
    stars = [(*(np.array(p) + rng.uniform(-0.5, 0.5, 2)), rng.uniform(2000.0, 9000.0)) for p in places]
    visits = observe(LAYOUT, stars, SEEING, seed=6)
    monkeypatch.setattr(module, "_LARGEST", 1000)
    _, _, whole = _points(visits)
    assert len(whole.flux) == len(stars)
    sizes = []

    def noted(equations: module._Equations, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(members))
        return of(equations, members)

    of = module._Equations.of
    monkeypatch.setattr(module, "_LARGEST", 5)
    monkeypatch.setattr(module._Equations, "of", noted)
    _, _, parts = _points(visits)
    assert max(sizes) < len(stars)
    # Standard errors are some .01 pixels and a third of a per cent of the fluxes and more.
    np.testing.assert_allclose(parts.x, whole.x, atol=1e-3)
    np.testing.assert_allclose(parts.y, whole.y, atol=1e-3)
    np.testing.assert_allclose(parts.flux, whole.flux, rtol=1e-3)


def test_a_saturated_star_gets_its_flux_from_its_wings() -> None:
    """Three of four visits are masked in the core, and the image to start from has lost a third of it."""
    visits = observe(LAYOUT, [(25.3, 40.2, 3e4)], SEEING, seed=4)
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    for visit in visits[:3]:
        visit.good[np.hypot(x - 25.3, y - 40.2) < 3.0] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    sets = data.sets()
    latent = 0.67 * maximum_likelihood(data, sets, steps=60).latent[0]
    points = point_sources(data, sets, latent)
    assert points.flux == pytest.approx([3e4], rel=5e-3)


def test_a_saturated_star_with_a_neighbour_gets_its_flux_from_its_wings() -> None:
    """As above with wider PSFs and two fifths lost, which takes more than one pass to come back."""
    seeing = [2.1, 2.3, 2.6, 2.0]
    visits = observe(LAYOUT, [(25.3, 40.2, 5e5), (18.2, 42.5, 1500.0)], seeing, seed=4)
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    for visit in visits[:3]:
        visit.good[np.hypot(x - 25.7, y - 39.7) < 2.2] = False
    data = PatchData(visits, LAYOUT, 0.8, margin=MARGIN)
    sets = data.sets()
    latent = 0.6 * maximum_likelihood(data, sets, steps=60).latent[0]
    points = point_sources(data, sets, latent)
    assert points.flux.max(initial=0.0) == pytest.approx(5e5, rel=5e-3)


def test_the_flux_survives_a_wrong_psf() -> None:
    """Stamps 2 % too wide: a fit of the flux alone is 2 % off."""
    visits = observe(LAYOUT, [(25.3, 40.2, 2e4)], SEEING, seed=5)
    wrong = observe(LAYOUT, [], [1.02 * sigma for sigma in SEEING])
    visits = [dataclasses.replace(a, psf=b.psf) for a, b in zip(visits, wrong, strict=True)]
    _, _, points = _points(visits)
    assert points.flux == pytest.approx([2e4], rel=0.01)


def test_a_star_with_a_very_wrong_psf_is_left_as_it_was() -> None:
    visits = observe(LAYOUT, [(25.3, 40.2, 2e4)], SEEING, seed=5)
    wrong = observe(LAYOUT, [], [1.1 * sigma for sigma in SEEING])
    visits = [dataclasses.replace(a, psf=b.psf) for a, b in zip(visits, wrong, strict=True)]
    _, _, points = _points(visits)
    assert (points.n_candidates, len(points.flux)) == (1, 0)


def test_a_faint_neighbour_keeps_its_light() -> None:
    """A galaxy 4 pixels from a star is not a part of the star."""
    visits = observe(LAYOUT, [(25.3, 40.2, 5000.0)], SEEING, seed=6)
    for visit, sigma in zip(visits, SEEING, strict=True):
        visit.flux[...] += gaussian_stars(LAYOUT.shape, [(29.8, 41.0, 1000.0)], np.hypot(sigma, 0.8))
    _, _, points = _points(visits, steps=150)
    assert points.flux == pytest.approx([5000.0], rel=0.02)
    near = np.s_[37:46, 28:35]
    assert _image(points.latent)[near].sum() == pytest.approx(1000.0, rel=0.25)


FIELD = [(17.2, 20.6, 3e4), (50.4, 60.1, 2e4), (20.0, 60.3, 3e4), (52.3, 20.4, 2e4)]
"""Stars far from each other."""


def test_stars_with_more_noise_than_the_sky_are_points() -> None:
    """The photons of a star make its second moments more uncertain than its flux over the sky suggests."""
    visits = observe(LAYOUT, FIELD, SEEING, seed=6)
    rng = np.random.default_rng(7)
    for visit, sigma in zip(visits, SEEING, strict=True):
        variance = 30.0 * gaussian_stars(LAYOUT.shape, FIELD, sigma)
        visit.flux[...] += np.sqrt(variance) * rng.standard_normal(LAYOUT.shape)
        visit.variance[...] += variance
    _, _, points = _points(visits, psf_error=0.002)
    assert len(points.flux) == len(FIELD)


def test_a_star_with_something_unresolved_beside_it_is_no_point() -> None:
    """A faint star 3 pixels away is no peak and changes no second moment, but is left in the data."""
    visits = observe(LAYOUT, [(25.3, 40.2, 8000.0), (28.3, 40.2, 600.0)], SEEING, seed=6)
    _, latent, points = _points(visits, steps=60)
    assert points.n_candidates == 1
    assert points.latent is latent


def test_fluxes_are_those_of_the_psf_where_it_has_no_error() -> None:
    """No light is left to second moments; the fit of known PSFs, at the same places, has a closed form."""
    stars = [(x, y, 0.1 * flux) for x, y, flux in FIELD]
    visits = observe(LAYOUT, stars, SEEING, seed=4)
    _, _, points = _points(visits, steps=60, psf_error=0.0, huber_delta=1e9)
    assert len(points.flux) == len(stars)
    for x, y, flux in zip(points.x - MARGIN, points.y - MARGIN, points.flux, strict=True):
        unit = [gaussian_stars(LAYOUT.shape, [(x, y, 1.0)], sigma) for sigma in SEEING]
        information = sum((one**2).sum() for one in unit)
        fitted = sum((one * visit.flux).sum() for one, visit in zip(unit, visits, strict=True)) / information
        assert abs(flux - fitted) * np.sqrt(information) < 0.3


def test_a_star_takes_back_what_lies_where_no_visit_has_data() -> None:
    """Beside a cell without a visit; maximum likelihood spreads light there, as far as the seeing."""
    visits = observe(LAYOUT, [(40.0, 37.0, 2e5)], [2.6, 2.8, 3.0, 2.7], seed=8)
    for visit in visits:
        visit.good[40:] = False
        visit.psf[1] = np.nan
    _, _, points = _points(visits, steps=60)
    assert points.flux == pytest.approx([2e5], rel=0.02)


def test_nothing_bright_nothing_changed() -> None:
    visits = observe(LAYOUT, [(25.3, 40.2, 30.0)], SEEING, seed=7)
    _, latent, points = _points(visits)
    assert points.latent is latent
    assert points.n_candidates == 0


def test_a_star_at_the_edge_and_a_cell_without_a_visit() -> None:
    visits = observe(
        LAYOUT, [(0.3, 12.2, 6000.0), (69.0, 79.4, 6000.0), (40.0, 40.5, 6000.0)], SEEING, seed=8
    )
    for visit in visits:
        visit.good[40:] = False
        visit.psf[1] = np.nan
    _, _, points = _points(visits)
    assert np.isfinite(points.latent.numpy()).all()
    assert len(points.flux) >= 1
    assert points.flux[np.argmin(points.x)] == pytest.approx(6000.0, rel=0.03)
    assert ((points.y - MARGIN) < 44).all()


@pytest.mark.parametrize(
    ("x", "y", "most"), [(-2.0, 30.3, 4.0), (-1.0, 30.3, 1.4), (30.2, -2.3, 6.0), (71.1, 30.0, 4.5)]
)
def test_light_of_a_star_beyond_the_patch_is_not_piled_up_at_its_border(
    x: float, y: float, most: float
) -> None:
    """Light that the patch shows over that it should: 2 to 11 when the start was dark beyond the data."""
    star = [(x, y, 2e5)]
    _, _, points = _points(observe(LAYOUT, star, SEEING, seed=3), steps=240)
    assert 0.9 < _image(points.latent).sum() / gaussian_stars(LAYOUT.shape, star, SIGMA).sum() < most


@pytest.mark.parametrize(("x", "y"), [(1.2, 30.3), (30.0, 1.3)])
def test_star_at_the_border_gives_no_light_away(x: float, y: float) -> None:
    star = [(x, y, 2e5)]
    _, _, points = _points(observe(LAYOUT, star, SEEING, seed=3), steps=240)
    assert _image(points.latent).sum() == pytest.approx(
        gaussian_stars(LAYOUT.shape, star, SIGMA).sum(), rel=5e-3
    )


def test_noise_of_the_gradient_is_that_of_the_data() -> None:
    """The scatter of K^T w m n over 300 realisations of noise n, with masks and a bright, noisy box."""
    visits = observe(LAYOUT, [], [1.6, 2.1], seed=9, masked_fraction=0.1)
    for visit in visits:
        visit.variance[20:30, 30:45] = 9.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    rng = np.random.default_rng(3)
    total = torch.zeros(data.shape)
    for _ in range(300):
        draw = torch.zeros(data.shape)
        for _, visit in data.visits():
            noise = torch.as_tensor(rng.standard_normal(data.shape, dtype=np.float32)) * visit.variance.sqrt()
            draw += visit.kernel.adjoint(visit.weight * noise)
        total += draw.square() / 300
    variance, seen = data.noise_of_gradient()
    inside = np.s_[MARGIN + 5 : -MARGIN - 5, MARGIN + 5 : -MARGIN - 5]
    assert float((total / variance)[inside].mean()) == pytest.approx(1.0, abs=0.02)
    assert float((variance / seen)[MARGIN + 25, MARGIN + 38]) == pytest.approx(9.0, rel=0.05)
    assert float((seen / data.matched_noise().square())[inside].mean()) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("sigma", [0.85, 2.5, 4.0])
def test_point_is_the_target_however_wide(sigma: float) -> None:
    latent = torch.as_tensor(point_latent(sigma, 0.3, -0.4))
    wide = torch.nn.functional.pad(latent, (40,) * 4)
    image = inner_smooth(wide, sigma).numpy()
    expected = gaussian_stamp(sigma, image.shape[0], dx=-0.4, dy=0.3)
    assert np.abs(image - expected).max() < 2e-3 * expected.max()


def test_normal_matrices_are_products_of_the_templates() -> None:
    """Against A applied to the templates; each cell has a PSF of its own."""
    layout = CellLayout(2, 3, 60, 64)
    visits = observe(layout, [], SEEING, seed=2)
    for visit in visits:
        for i, j in np.ndindex(2, 3):
            visit.psf[i, j] = gaussian_stamp(1.5 + 0.3 * i + 0.2 * j, visit.psf.shape[-1])
    data = PatchData(visits, layout, SIGMA, margin=MARGIN)
    sets = data.sets()
    canvas = module._Canvas(data, sets, torch.zeros(data.shape))
    # The last two are near enough to each other to be fitted together, in the middle of their cell.
    x, y = np.array([(31.2, 28.9), (160.4, 27.7), (95.3, 91.4), (98.1, 89.6)]).T + MARGIN
    points = np.column_stack([[500.0, 800.0, 300.0, 900.0], x, y])
    gradient = np.random.default_rng(3).normal(size=data.shape)
    equations = module._Equations(canvas, points, gradient, np.ones(data.shape))
    for members in ([0], [1], [2, 3], [3, 2]):
        images = np.zeros((len(members), 6, *data.shape), dtype=np.float32)
        for image, template in zip(images, point_templates(SIGMA, points[members]), strict=True):
            for part, values in zip(image, template.images, strict=True):
                template._replace(images=values).cut(part)[...] = values
        flat = images.reshape(-1, *data.shape)
        seen = sets.gram.forward(torch.as_tensor(flat)[:, None])[:, 0].numpy()
        matrix, right = equations.of(np.array(members))
        expected = np.einsum("ayx,byx->ab", flat, seen)
        scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        np.testing.assert_allclose(matrix.reshape(expected.shape) / scale, expected / scale, atol=1e-3)
        np.testing.assert_allclose(
            right.ravel(), np.einsum("ayx,yx->a", flat, gradient), rtol=1e-3, atol=1e-3
        )
