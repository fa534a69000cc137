# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What is a source and what is none, on analytic scenes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gaussian_patch import NOISE, ORIGIN, TARGET, make_inputs, match, measure, render


def test_trace_of_a_bright_neighbour_is_no_source():
    """A faint peak beside a very bright star must stand out above what errors of the PSF may leave there."""
    error = NOISE * np.sqrt(4 * np.pi) * 2.0
    for faint, n_sources in ((8.0, 1), (40.0, 2)):
        scene = [40.0, 48.0], [50.0, 50.0], [5000.0 * error, faint * error]
        assert len(measure(make_inputs((110, 90), (1, 1), *scene))) == n_sources


def test_missed_source_is_found_in_the_residual():
    inputs = make_inputs((130, 90), (1, 1), [30.3, 60.0], [41.2, 99.6], [5000.0, 3000.0], factor=[1.0, 0.0])
    table = measure(inputs)
    assert list(table["flag_residual_only"]) == [False, True]
    np.testing.assert_allclose(table["x"] - ORIGIN[1], [30.3, 60.0], atol=0.4)
    np.testing.assert_allclose(table["y"] - ORIGIN[0], [41.2, 99.6], atol=0.4)
    assert abs(table["flux"][1] - 3000.0) < 4.0 * table["flux_err"][1]


def test_source_that_the_model_merged_with_a_galaxy_is_found():
    """A star beside a galaxy, whose peak on the restored image is within its errors."""
    shape, star, galaxy, width = (110, 130), (71.0, 44.0, 2000.0), (62.0, 50.0, 4e4), 3.0
    patch = make_inputs(shape, (1, 1), [], [], [])

    def at(sigma):
        light = render(shape, *([value] for value in galaxy), np.hypot(width, sigma))
        return light + render(shape, *([value] for value in star), sigma)

    peak = star[2] / (2.0 * np.pi * TARGET**2)
    table = measure(dataclasses.replace(patch, model=at(TARGET), model_variance=np.full(shape, peak**2)))
    assert list(table["flag_residual_only"]) == [False, True]
    found = match(table, [galaxy[0], star[0]], [galaxy[1], star[1]], 0.5)
    assert np.all(np.abs(found["flux"] - [galaxy[2], star[2]]) < 4.0 * found["flux_err"])
    assert np.all(found["flux_err"] < [800.0, 300.0])
    assert list(found["flag_blended"]) == [True, True]


def test_what_a_fit_leaves_beside_its_sources_is_no_other():
    """A disc and a star that the model takes for one, and whose fit is not perfect, are two entries."""
    shape, disc, star, smeared = (80, 80), (41.7, 39.3, 23789.9), (42.6, 41.2, 50320.1), (43.0, 40.0, 29563.1)
    patch = make_inputs(shape, (1, 1), [], [], [])

    def at(sigma, x, y, flux):
        return render(shape, [x], [y], [flux], sigma)

    data = at(np.hypot(2.0, 1.5), *disc) + at(2.0, *star)
    residual = patch.residual + data - at(2.0, *smeared)
    table = measure(dataclasses.replace(patch, model=at(TARGET, *smeared), residual=residual))
    assert len(table) == 2


def test_smooth_light_that_the_model_lacks_is_no_source():
    """Stars in front of a nebula of which the restored image shows nothing."""
    shape, x, y, flux = (110, 130), [41.3, 90.8], [79.6, 35.2], [1000.0, 3000.0]
    patch = make_inputs(shape, (1, 1), x, y, flux, factor=[0.0, 1.0])
    grid_y, grid_x = np.indices(shape)
    nebula = 1.2 * NOISE * (1.0 + np.sin(grid_x / 20.0) * np.sin(grid_y / 18.0))
    table = measure(dataclasses.replace(patch, residual=patch.residual + nebula))
    assert list(table["flag_residual_only"]) == [False, True]
    match(table, x[::-1], y[::-1], 0.5)


def test_lumps_of_smooth_light_are_no_sources():
    """What the restored image makes lumps of is even in the data."""
    shape, x, y = (90, 110), [90.8], [45.2]
    patch = make_inputs(shape, (1, 1), x, y, [3000.0])
    lump_y, lump_x = np.mgrid[20.3:80:25, 15.6:70:27].reshape(2, -1)
    light = np.full(lump_x.size, 500.0)
    residual = patch.residual + NOISE - render(shape, lump_x, lump_y, light, 2.0)
    model = patch.model + render(shape, lump_x, lump_y, light, TARGET)
    table = measure(dataclasses.replace(patch, model=model, residual=residual))
    assert len(table) == 1
    match(table, x, y, 0.5)


def test_rest_of_a_clipped_trail_is_no_source():
    """What is left in the residual where a visit was clipped does not enter the catalogue."""
    clipped = np.zeros((130, 90), dtype=bool)
    clipped[98:102, 58:62] = True
    scene = [30.3, 60.0], [41.2, 99.6], [5000.0, 3000.0]
    table = measure(make_inputs((130, 90), (1, 1), *scene, factor=[1.0, 0.0], CLIPPED=clipped))
    assert list(table["flag_residual_only"]) == [False]


def test_light_of_the_model_beside_a_clipped_pixel_is_a_source():
    """What the model holds in one piece with a brighter star is no rest of an outlier."""
    shape, clipped = (110, 130), np.zeros((110, 130), dtype=bool)
    clipped[52:54, 72:74] = True
    inputs = make_inputs(shape, (1, 1), [60.0, 70.0], [50.0, 50.0], [6e4, 1e4], CLIPPED=clipped)
    inputs.model += 30.0 * (np.hypot(*(np.indices(shape) - np.array([50, 65])[:, None, None])) < 12.0)
    inputs = dataclasses.replace(inputs, model_variance=np.full(shape, 1e4**2))
    match(measure(inputs), [60.0, 70.0], [50.0, 50.0], radius=0.2)


def test_what_only_the_model_holds_is_no_source():
    """A star that the prior invented is cancelled by the residual."""
    x, y, flux = np.array([30.3, 60.0]), np.array([41.2, 99.6]), np.array([5000.0, 3000.0])
    real = make_inputs((130, 90), (1, 1), x, y, flux)
    fake = make_inputs((130, 90), (1, 1), x[:1], y[:1], flux[:1])
    residual = fake.residual - render((130, 90), x[1:], y[1:], flux[1:], 2.0)
    inputs = dataclasses.replace(fake, model=real.model, residual=residual)
    assert len(measure(inputs)) == 1
    empty = make_inputs((130, 90), (1, 1), [], [], [])
    assert len(measure(empty)) == 0
    np.testing.assert_array_equal(measure(empty).colnames, measure(inputs).colnames)


def test_pieces_that_the_data_cannot_tell_apart_are_one_source():
    """Two peaks of the model, each below the threshold, together above it: one source with all the flux."""
    error = NOISE * np.sqrt(4 * np.pi) * 2.0
    flux = np.full(2, 6.0 * error)
    inputs = make_inputs((110, 130), (1, 1), [60.0, 64.0], [50.0, 50.0], flux)
    table = measure(inputs)
    assert len(table) == 1
    assert abs(table["flux"][0] - flux.sum()) < 3.0 * table["flux_err"][0]


def test_peaks_within_the_errors_of_the_model_are_one_source():
    """Two peaks of an elongated source, which the restored image itself is not sure of, are one source."""
    shape, x, flux = (110, 130), np.linspace(60.0, 64.0, 5), np.full(5, 1.2e3)
    data = make_inputs(shape, (1, 1), x, [50.0] * 5, flux)
    model = make_inputs(shape, (1, 1), [60.5, 63.5], [50.0] * 2, [3e3] * 2)
    carried = render(shape, np.array([60.5, 63.5]), np.full(2, 50.0), np.full(2, 3e3), 2.0)
    residual = data.residual + render(shape, x, np.full(5, 50.0), flux, 2.0) - carried
    inputs = dataclasses.replace(data, model=model.model, residual=residual)
    assert len(measure(inputs)) == 2
    table = measure(dataclasses.replace(inputs, model_variance=np.full(shape, 1e3**2)))
    assert len(table) == 1
    assert abs(table["flux"][0] - flux.sum()) < 4.0 * table["flux_err"][0]


def test_two_points_that_only_the_data_tell_apart_are_two_sources():
    """Where the restored image is not sure of two peaks, the data may be."""
    inputs = make_inputs((110, 130), (1, 1), [60.0, 64.0], [50.0, 50.0], [1e5, 1e5])
    inputs = dataclasses.replace(inputs, model_variance=np.full((110, 130), 1e4**2))
    table = measure(inputs)
    assert len(table) == 2
    assert (np.abs(table["flux"] - 1e5) < 4.0 * table["flux_err"]).all()
    assert table["flag_blended"].all()
    assert np.isnan(table["ixx"]).all()
    assert np.isfinite(table["ap1_flux"]).all()
    match(table, [60.0, 64.0], [50.0, 50.0], radius=0.05)


@pytest.mark.parametrize(("width", "n_stars"), [(8.0, 2), (12.0, 0)])
def test_a_galaxy_whose_core_has_no_data(width, n_stars):
    """No pixel under the PSF in its middle has any; what its wings have is not found once more."""
    shape, (x, y, flux) = (150, 160), np.array([[110.0, 70.4, 4e4], [78.3, 30.2, 3e4]])[:n_stars].T
    patch = make_inputs(shape, (1, 1), x, y, flux)
    radius = np.hypot(*(np.indices(shape) - np.array([74, 76])[:, None, None]))
    variance = width**2 + TARGET**2
    galaxy = 4e6 * np.exp(-0.5 * radius**2 / variance) / (2.0 * np.pi * variance)
    residual = np.where(radius < 26.0, np.nan, patch.residual)
    table = measure(dataclasses.replace(patch, model=patch.model + galaxy, residual=residual))
    assert len(table) == 1 + n_stars
    assert list(np.isnan(table["psf_flux"])) == list(table["flag_no_data"]) == [True] + [False] * n_stars
    found = match(table, [76.0, *x], [74.0, *y])[1:]
    assert np.all(np.abs(found["flux"] - flux) < 4.0 * found["flux_err"])
