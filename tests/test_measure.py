# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Fluxes, positions, errors and flags of sources, measured on analytic scenes."""

from __future__ import annotations

import dataclasses

import astropy.units as u
import numpy as np
import pytest
from astropy.table import vstack
from gaussian_patch import (
    NOISE,
    ORIGIN,
    TARGET,
    enclosed,
    make_inputs,
    match,
    measure,
    pixel_to_sky,
    render,
    robust_std,
    star_grid,
)

from lsst.coadd.deepprior.aperture_fluxes import APERTURES
from lsst.coadd.deepprior.measure import measure_sources
from lsst.coadd.deepprior.moments import peak_offset
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (0.8, 0.0), (1.2, 0.1)])
def test_pulls_whatever_the_prior_did(factor, shift):
    """Fluxes, positions and errors are right when the model has eaten, added or displaced flux."""
    shape, cells = (660, 720), (3, 2)
    rng = np.random.default_rng(7)
    x, y = star_grid(shape, 22, rng)
    assert len(x) > 800
    point_error = NOISE * np.sqrt(4 * np.pi) * 2.0
    flux = point_error * 10 ** rng.uniform(1.0, 2.5, len(x))  # S/N from 10 to 300
    sigmas = [[2.0, 2.1], [1.9, 2.0], [2.2, 2.0]]
    table = measure(make_inputs(shape, cells, x, y, flux, factor=factor, shift=shift, sigmas=sigmas))
    found = match(table, x, y)
    assert len(table) == len(x)
    for name in ("flux", "psf_flux"):
        pull = (found[name] - flux) / found[f"{name}_err"]
        assert 0.9 < robust_std(pull) < 1.15, name
        assert 0.9 < np.std(pull) < 1.15, name
        assert abs(np.median(pull)) < 0.25, name
    np.testing.assert_allclose(np.median(found["psf_flux_err"]), point_error, rtol=0.1)
    np.testing.assert_allclose(found["flux_sys_err"], 0.005 * np.abs(found["flux"]))
    # Whether a fainter source is a point is not certain, which its error knows.
    bright = flux > 100.0 * point_error
    np.testing.assert_allclose(found["flux_err"][bright], point_error, rtol=0.15)
    assert (found["flux_err"][~bright] < 2.5 * point_error).all()
    for name, true in (("x", x + ORIGIN[1]), ("y", y + ORIGIN[0])):
        pull = (found[name] - true) / found[f"{name}_err"]
        assert 0.9 < robust_std(pull) < 1.15, name
        assert abs(np.median(pull)) < 0.25, name
    for n, radius in enumerate(APERTURES, start=1):
        part = enclosed(radius)
        pull = (found[f"ap{n}_flux"] - part * flux) / found[f"ap{n}_flux_err"]
        assert 0.85 < robust_std(pull) < 1.15, radius
        assert abs(np.median(pull)) < 0.25, radius
    np.testing.assert_allclose(np.sqrt(found["ixx"]), TARGET, rtol=0.005)
    np.testing.assert_allclose(np.sqrt(found["iyy"]), TARGET, rtol=0.005)
    np.testing.assert_allclose(found["ixy"], 0.0, atol=0.005)


def test_errors_where_the_noise_differs_between_cells():
    """A star on the border of two cells, one nine times as noisy, has the errors of an optimal fit."""
    shape = (90, 120)
    inputs = make_inputs(shape, (1, 2), [59.5, 20.0], [44.0, 40.0], [2e4, 2e4])
    inputs.variance[:, 60:] *= 9.0
    found = match(measure(inputs), [59.5, 20.0], [44.0, 40.0])
    for row, x, y in zip(found, [59.5, 20.0], [44.0, 40.0], strict=True):
        template = render(shape, [x], [y], [1.0], 2.0)
        optimal = 1.0 / np.sqrt((template**2 / inputs.variance).sum())
        np.testing.assert_allclose(row["psf_flux_err"], optimal, rtol=0.02)
        # Noise on one side only makes the flux depend on the position, which is fitted too.
        changes = np.array([template, *np.gradient(template)]).reshape(3, -1)
        free = np.linalg.inv(changes / inputs.variance.ravel() @ changes.T)[0, 0] ** 0.5
        np.testing.assert_allclose(row["flux_err"], free, rtol=0.03)
    np.testing.assert_allclose(
        inputs.inputs.coadd.information[40, 20] ** -0.5, found["psf_flux_err"][1], rtol=0.01
    )


def test_blends_share_the_light():
    """Pairs at 1.2 FWHM of the coadd, one up to three times the other, of which the model holds 80 %."""
    shape, cells = (330, 400), (2, 2)
    rng = np.random.default_rng(11)
    x, y = star_grid(shape, 40, rng)
    angle = rng.uniform(0.0, 2.0 * np.pi, len(x))
    separation = 1.2 * 2.0 * FWHM_PER_SIGMA
    x = np.concatenate([x, x + separation * np.cos(angle)])
    y = np.concatenate([y, y + separation * np.sin(angle)])
    n = len(angle)
    bright = rng.uniform(40.0, 100.0, n) * NOISE * np.sqrt(4 * np.pi) * 2.0
    flux = np.concatenate([bright, bright / rng.uniform(1.0, 3.0, n)])
    tables = []
    for seed in range(1, 5):
        found = match(measure(make_inputs(shape, cells, x, y, flux, factor=0.8, seed=seed)), x, y)
        assert found["flag_blended"].all()
        assert len(set(found["id"])) == 2 * n
        tables.append(found)
    found, flux = vstack(tables, metadata_conflicts="silent"), np.tile(flux, len(tables))
    assert abs(np.median(found["flux"] / flux) - 1.0) < 0.01
    pull = (found["flux"] - flux) / found["flux_err"]
    assert 0.85 < robust_std(pull) < 1.25


def test_centroid_that_the_prior_pulled_is_put_right():
    x, y = [30.3, 60.0], [41.2, 99.6]
    table = measure(make_inputs((130, 90), (1, 1), x, y, [4e4, 3e4], factor=0.8, shift=0.3))
    found = match(table, x, y)
    assert len(table) == 2
    assert np.all(np.abs(found["x"] - ORIGIN[1] - x) < 4.0 * found["x_err"])
    assert np.all(found["x_err"] < 0.02)


def test_flags():
    shape = (150, 240)
    saturated, clipped, prior = np.zeros((3, *shape), dtype=bool)
    x = [7.5, 60.0, 95.0, 140.0, 180.0, 210.0]  # the first is between 1 and 2 FWHM from the border
    y = [75.0, 40.0, 110.0, 40.0, 110.0, 10.5]
    saturated[40, 60], clipped[110, 95], prior[36:45, 136:145] = True, True, True
    prior[110, 94:97] = True  # the smaller part of a core
    inputs = make_inputs(
        shape, (1, 2), x, y, [2e4] * 6, SAT=saturated, CLIPPED=clipped, PRIOR_CARRIED=prior, UNKNOWN=prior
    )
    inputs.residual[109, 181] = np.nan
    inputs.variance[11, 210] = 0.0
    found = match(measure(inputs), x, y, radius=3.0)
    for name, expected in {
        "flag_edge": [1, 0, 0, 0, 0, 0],
        "flag_saturated": [0, 1, 0, 0, 0, 0],
        "flag_clipped": [0, 0, 1, 0, 0, 0],
        "flag_prior_carried": [0, 0, 0, 1, 0, 0],
        "flag_no_data": [0, 0, 0, 0, 1, 1],
        "flag_residual_only": [0] * 6,
        "is_patch_inner": [1, 1, 1, 1, 1, 0],
    }.items():
        np.testing.assert_array_equal(found[name], np.array(expected, dtype=bool), name)
    whole = found[1:]
    assert np.all(np.abs(whole["flux"] - 2e4) < 4.0 * whole["flux_err"])


def test_inner_box_ends_between_pixels():
    """Pixel centres are whole numbers, so that the box reaches half a pixel beyond the first and the last."""
    x = [30.0, 60.0, 25.0, 55.0, 9.3, 9.7, 89.3, 89.7]
    y = [19.3, 19.7, 69.3, 69.7, 35.0, 52.0, 40.0, 58.0]
    patch = make_inputs((90, 120), (1, 1), x, y, [4e4] * 8)
    inner = slice(ORIGIN[0] + 20, ORIGIN[0] + 70), slice(ORIGIN[1] + 10, ORIGIN[1] + 90)
    found = match(measure(dataclasses.replace(patch, inner=inner)), x, y, radius=0.1)
    assert list(found["is_patch_inner"]) == [False, True, True, False, False, True, True, False]


def test_psf_flux_errors_know_that_the_sky_is_not_known():
    """A unit of the sky adds sum(P) / sum(P^2) to the flux of a lone point of PSF P."""
    inputs = make_inputs((60, 70), (1, 1), [35.0], [30.0], [2e4]).inputs
    (found,) = measure_sources(inputs, pixel_to_sky)
    area = np.pi * (APERTURES[-1] * found["coadd_fwhm"]) ** 2
    n = len(APERTURES)
    sky = np.sqrt(found[f"ap{n}_flux_err"] ** 2 - NOISE**2 * area) / area
    power = (gaussian_stamp(2.0, 33) ** 2).sum()
    added = found["psf_flux_err"] ** 2 - NOISE**2 / power
    assert added == pytest.approx((sky / power) ** 2, rel=0.05)


def test_aperture_errors_know_that_noise_is_correlated():
    """Each pair of neighbouring pixels of an aperture adds twice its correlation to the variance."""
    inputs = make_inputs((60, 70), (1, 1), [35.0], [30.0], [2e4]).inputs
    correlation = np.array([[0.0, 0.2, 0.0], [0.3, 1.0, 0.3], [0.0, 0.2, 0.0]])
    correlated = dataclasses.replace(inputs, coadd=inputs.coadd.correlated(correlation))
    white, table = (measure_sources(one, pixel_to_sky) for one in (inputs, correlated))
    for n, radius in enumerate(APERTURES, start=1):
        y, x = np.mgrid[-20:21, -20:21]
        inside = np.hypot(y, x) <= radius * white["coadd_fwhm"][0]
        pairs = 0.2 * (inside[1:] & inside[:-1]).sum() + 0.3 * (inside[:, 1:] & inside[:, :-1]).sum()
        pixels = NOISE**2 * np.pi * (radius * white["coadd_fwhm"][0]) ** 2
        sky = white[f"ap{n}_flux_err"][0] ** 2 - pixels
        assert sky / pixels == pytest.approx(pixels / NOISE**2 / (60 * 70), rel=0.1)
        expected = pixels * (1.0 + 2.0 * pairs / inside.sum()) + sky * correlation.sum()
        assert table[f"ap{n}_flux_err"][0] ** 2 == pytest.approx(expected, rel=1e-6)


def test_pixels_without_data_count_in_apertures_with_the_fit():
    """Half of the core of a star is masked, and all of another one but its wings."""
    x, y, flux = [35.0, 95.0], [45.2, 44.8], [4e5, 4e5]
    patch = make_inputs((90, 130), (1, 1), x, y, flux)
    patch.residual[:45, 33:38] = np.nan
    grid_y, grid_x = np.indices((90, 130))
    near = np.hypot(grid_y - y[1], grid_x - x[1]) < APERTURES[0] * 2.0 * FWHM_PER_SIGMA + 1.0
    patch.residual[near] = np.nan
    found = match(measure(patch), x, y)
    whole = match(measure(make_inputs((90, 130), (1, 1), x, y, flux)), x, y)
    for name in ("ap1_flux", "ap2_flux", "ap3_flux"):
        error = np.hypot(found[f"{name}_err"], whole[f"{name}_err"])
        np.testing.assert_array_less(np.abs(found[name] - whole[name]), 4.0 * error)
        assert found[f"{name}_err"][0] < 1.5 * whole[f"{name}_err"][0]
    np.testing.assert_allclose(found["ap1_flux_err"][1], found["flux_err"][1], rtol=0.1)


def test_missing_cell():
    """A cell without data neither yields sources nor disturbs those beside it."""
    x, y, flux = [25.0, 58.5, 100.0], [30.0, 40.0, 50.0], [2e4, 2e4, 2e4]
    inputs = make_inputs((90, 120), (1, 2), x, y, flux)
    inputs.psf[0, 1] = np.nan
    for image in (inputs.model, inputs.residual, inputs.variance):
        image[:, 60:] = np.nan
    table = measure(inputs)
    found = match(table, x[:2], y[:2])
    assert len(table) == 2
    assert np.all(np.abs(found["flux"][:1] - flux[:1]) < 4.0 * found["flux_err"][:1])
    assert list(found["flag_no_data"]) == [False, True]


def test_no_data_gives_an_empty_table():
    inputs = make_inputs((90, 120), (1, 2), [25.0], [30.0], [2e4])
    inputs.psf[:] = np.nan
    inputs.residual[:] = np.nan
    assert len(measure(inputs)) == 0


def test_table_is_documented():
    x, y = [30.3, 60.0, 80.2], [41.2, 99.6, 20.0]
    table = measure(make_inputs((130, 90), (1, 1), x, y, [5000.0, 9000.0, 7000.0]))
    assert all(column.description for column in table.itercols())
    assert table["flux"].unit == u.nJy
    assert table["x"].unit == u.pix
    assert table["ixx"].unit == u.pix**2
    assert table["ra"].unit == u.deg
    assert list(table["id"]) == [1, 2, 3]
    assert np.all(np.diff(table["flux"]) < 0)
    np.testing.assert_allclose(table["ra"], 150.0 + table["x"] * 1e-4)
    np.testing.assert_allclose(table["dec"], 2.0 + table["y"] * 1e-4)
    np.testing.assert_allclose(table["coadd_fwhm"], 2.0 * FWHM_PER_SIGMA, rtol=1e-3)


def test_shapes_must_fit():
    inputs = make_inputs((130, 90), (1, 1), [30.0], [40.0], [5000.0]).inputs
    with pytest.raises(ValueError, match=r"model_variance image is \(129, 90\) and the coadd \(130, 90\)"):
        dataclasses.replace(inputs, model_variance=inputs.model_variance[1:])
    with pytest.raises(ValueError, match="SAT image"):
        dataclasses.replace(inputs, planes={"SAT": np.zeros((130, 89), dtype=bool)})


def test_peak_offset():
    """A parabola is exact for the logarithm of a Gaussian; at a border the offset across it is 0."""
    y, x = [20.3, 0.0, 31.6], [9.8, 14.4, 39.0]
    image = np.log(1e-12 + render((40, 40), x, y, [1.0] * 3, 2.0))
    at = np.rint(y).astype(int), np.rint(x).astype(int)
    dy, dx = peak_offset(image, *at)
    np.testing.assert_allclose(at[0] + dy, y, atol=1e-3)
    np.testing.assert_allclose(at[1] + dx, x, atol=1e-3)


def test_stars_beside_a_border_between_unequal_psfs():
    """Each pixel of the data has the PSF of its own cell, and so have the templates."""
    shape, x, y = (90, 120), [57.3, 62.8, 90.0], [20.4, 45.2, 70.0]
    flux = np.array([3e6, 3e4, 3e6])
    table = measure(make_inputs(shape, (1, 2), x, y, flux, sigmas=[[2.0, 2.4]]))
    found = match(table, x, y)
    assert len(table) == len(x)
    for name in ("flux", "psf_flux"):
        np.testing.assert_array_less(np.abs(found[name] - flux) / found[f"{name}_err"], 4.0)
    np.testing.assert_allclose(found["flux"][[0, 2]], flux[[0, 2]], rtol=1e-3)


def test_a_star_in_a_missing_cell_beside_a_star():
    """Its wing is seen from the other side of the border, where it has the PSF of that cell."""
    x, y, flux = [57.3, 62.8], [20.4, 45.2], [3e6, 1e5]
    patch = make_inputs((90, 120), (1, 2), x, y, flux, sigmas=[[2.0, 2.4]])
    patch.psf[0, 1] = np.nan
    patch.residual[:, 60:] = np.nan
    found = match(measure(patch), x, y)
    np.testing.assert_array_less(np.abs(found["flux"] - flux) / found["flux_err"], 4.0)
    assert list(found["flag_no_data"]) == [False, True]
