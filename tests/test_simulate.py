# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import astropy.units as u
import galsim
import numpy as np
import pytest
import scipy.ndimage
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table

from lsst.coadd.deepprior.simulate import Scene, SceneConfig, add_glow, render, simulate_scene, write_scene
from lsst.coadd.deepprior.warps import Warp
from lsst.images import Box

EMPTY = SceneConfig(
    seed=11,
    n_cells=(2, 3),
    cell_shape=(40, 36),
    n_visits=12,
    psf_size=31,
    star_density=0.0,
    galaxy_density=0.0,
    pair_density=0.0,
    depth_scatter=0.0,
    n_trails=0,
    cosmic_ray_density=0.0,
    n_bad_columns=0,
    partial_fraction=0.0,
)
"""A scene in which there is nothing but sky noise."""


def empty(**changes: Any) -> Scene:
    return Scene(dataclasses.replace(EMPTY, **changes))


def objects(*rows: dict[str, Any]) -> Table:
    """Make a catalogue of given objects."""
    default = {"type": "star", "hlr": 0.0, "sersic_n": 1.0, "axis_ratio": 1.0, "angle": 0.0}
    return Table([default | row for row in rows])


def test_catalogue_is_that_of_the_seed_whatever_the_visits() -> None:
    config = SceneConfig(seed=3)
    catalogue = Scene(config).catalogue("i")
    for other in (dataclasses.replace(config, n_visits=1), dataclasses.replace(config, depth=26.0)):
        assert np.all(Scene(other).catalogue("i") == catalogue)
    for other in (dataclasses.replace(config, seed=4), dataclasses.replace(config, patch_id=1)):
        assert len(Scene(other).catalogue("i")) != len(catalogue)


def test_catalogue_of_the_standard_family() -> None:
    config = SceneConfig(seed=2, n_cells=(4, 6))
    scene = Scene(config)
    catalogue = scene.catalogue("i")
    assert (scene.patch.index.y, scene.patch.index.x) == (14200 // 600, 15600 // 900)
    star, single = catalogue["type"] == "star", catalogue["pair_id"] < 0
    area = (640 * 940) * 0.04 / 3600.0
    assert np.sum(star & single) == pytest.approx(15.0 * area, rel=0.2)
    assert np.sum(~star & single) == pytest.approx(80.0 * area, rel=0.1)
    assert np.sum(~single) == pytest.approx(16.0 * area, rel=0.3)
    for chosen, low, high in (
        (star & single, 17.0, 25.0),
        (~star & single, 20.0, 26.5),
        (~single, 21.0, 24.0),
    ):
        mag = catalogue["mag"][chosen]
        assert low <= mag.min() < low + 1.5
        assert high - 0.2 < mag.max() <= high
    np.testing.assert_allclose(catalogue["flux_nJy"], (catalogue["mag"].quantity).to_value(u.nJy), rtol=2e-4)
    assert np.all(catalogue["hlr"][star] == 0.0)
    assert 0.1 < np.median(catalogue["hlr"][~star]) < 0.6
    for pair_id in range(catalogue["pair_id"].max() + 1):
        a, b = catalogue[catalogue["pair_id"] == pair_id]
        assert 0.5 <= 0.2 * np.hypot(a["x"] - b["x"], a["y"] - b["y"]) <= 0.9
    box = scene.patch.outer_bbox.padded(20)
    assert np.all((catalogue["x"] > box.x.start - 0.5) & (catalogue["x"] < box.x.stop - 0.5))
    assert np.all((catalogue["y"] > box.y.start - 0.5) & (catalogue["y"] < box.y.stop - 0.5))
    sky = SkyCoord(catalogue["ra"], catalogue["dec"])
    pixel = scene.sky_projection.sky_to_pixel(sky)
    np.testing.assert_allclose(pixel.x, catalogue["x"], atol=1e-5)
    np.testing.assert_allclose(pixel.y, catalogue["y"], atol=1e-5)


def test_bands_share_objects_and_differ_in_colour() -> None:
    scene = Scene(SceneConfig(seed=2))
    r, i = scene.catalogue("r"), scene.catalogue("i")
    np.testing.assert_array_equal(r["x"], i["x"])
    assert 0.1 < np.mean(r["mag"] - i["mag"]) < 0.4
    with pytest.raises(ValueError, match="no simulated band 'j'; choose from u, g, r, i, z, y"):
        scene.catalogue("j")


@pytest.mark.parametrize("number", [0, 2])
def test_star_image_is_the_stamp(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without noise, and with an ellipticity that tells x from y.
    scene = empty(depth=40.0, sky_magnitude=10.0, psf_ellipticity=0.2)
    star = objects({"x": 15650.0, "y": 14240.0, "flux_nJy": 1000.0})
    monkeypatch.setattr(scene, "catalogue", lambda band: star)
    warp = scene.warp(number, "i")
    stamp = warp.psf_stamps[0, 0]
    assert abs(stamp - stamp.T).max() > 0.001
    y, x = 14240 - warp.bbox.y.start, 15650 - warp.bbox.x.start
    image = warp.image[y - 15 : y + 16, x - 15 : x + 16]
    np.testing.assert_allclose(image, 1000.0 * stamp, atol=0.02)
    assert image.sum() == pytest.approx(1000.0, rel=1e-4)


def test_stamps_hold_nearly_all_of_the_light(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = empty(depth=40.0, sky_magnitude=10.0, seeing=(1.1, 1.1), psf_size=41)
    star = objects({"x": 15654.0, "y": 14240.0, "flux_nJy": 1000.0})
    monkeypatch.setattr(scene, "catalogue", lambda band: star)
    image = scene.warp(0, "i").image
    assert 1000.0 < image.sum() < 1002.0


def test_seeing_is_the_width_of_the_stamps() -> None:
    for seeing in (0.55, 0.8, 1.1):
        stamp = empty(seeing=(seeing, seeing), psf_ellipticity=0.0).warp(0, "i").psf_stamps[0, 0]
        measured = galsim.InterpolatedImage(galsim.Image(stamp), scale=0.2).drawImage(
            nx=600, ny=600, scale=0.01
        )
        assert measured.calculateFWHM() == pytest.approx(seeing, rel=0.02)


def test_depth_is_that_of_a_star_in_median_seeing() -> None:
    warp = empty(seeing=(0.6, 1.0), depth=24.0).warp(0, "i")
    # Signal to noise of a star with the stamp of median seeing: flux / sqrt(variance / sum(stamp^2)).
    median = empty(seeing=(0.8, 0.8)).warp(0, "i").psf_stamps[0, 0]
    sigma = np.sqrt(np.median(warp.variance) / np.sum(median**2))
    assert 10.0 ** ((31.4 - 24.0) / 2.5) / sigma == pytest.approx(5.0, rel=0.03)


def test_noise_is_that_of_the_variance_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = empty(saturation=1e9)
    galaxy = objects(
        {"x": 15650.0, "y": 14240.0, "type": "galaxy", "hlr": 2.0, "flux_nJy": 3e6, "axis_ratio": 0.7}
    )
    monkeypatch.setattr(scene, "catalogue", lambda band: galaxy)
    silent = empty(saturation=1e9, depth=40.0, sky_magnitude=10.0)
    monkeypatch.setattr(silent, "catalogue", lambda band: galaxy)
    warp = scene.warp(2, "i")
    noise = (warp.image - silent.warp(2, "i").image) / np.sqrt(warp.variance)
    sky = np.min(warp.variance)
    bright = warp.variance > 3.0 * sky
    assert np.count_nonzero(bright) > 300
    for chosen in (bright, warp.variance < 1.2 * sky):
        assert np.std(noise[chosen]) == pytest.approx(1.0, abs=0.08)
        assert abs(np.mean(noise[chosen])) < 4.0 / np.sqrt(np.count_nonzero(chosen))
    # Neighbours are independent.
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1])) < 0.05
    # The sky's own photons, of 21 mag per square arcsec, make the variance of an empty pixel.
    sky_flux = 10.0 ** ((31.4 - 21.0) / 2.5) * 0.04
    signal = (warp.variance - sky) / sky * sky_flux
    np.testing.assert_allclose(signal[bright], silent.warp(2, "i").image[bright], rtol=0.1)


def test_bright_stars_are_saturated_and_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = empty()
    star = objects({"x": 15650.0, "y": 14240.0, "flux_nJy": 10.0 ** ((31.4 - 16.5) / 2.5)})
    monkeypatch.setattr(scene, "catalogue", lambda band: star)
    warp = scene.warp(0, "i")
    saturated = warp.mask.get("SAT")
    assert saturated[14240 - warp.bbox.y.start, 15650 - warp.bbox.x.start]
    assert 5 < np.count_nonzero(saturated) < 300
    assert np.all(warp.image[saturated] == 15000.0)
    assert np.all(warp.image[~saturated] <= 15000.0)


def test_cosmic_rays_and_columns_are_garbage_under_a_mask() -> None:
    scene = empty(cosmic_ray_density=60.0, n_bad_columns=2)
    for number in range(3):
        warp = scene.warp(number, "i")
        deviation = np.abs(warp.image) / np.sqrt(warp.variance)
        hit, bad = warp.mask.get("CR"), warp.mask.get("BAD")
        assert 20 < np.count_nonzero(hit) < 400
        assert np.unique(np.flatnonzero(bad.any(axis=0))).size <= 2
        assert bad.any(axis=0).sum() * 80 == np.count_nonzero(bad)
        assert np.all(deviation[hit & ~bad] > 15.0)
        assert np.median(deviation[bad]) > 100.0
        assert np.all(deviation[~hit & ~bad] < 6.0)


def test_trails_cross_some_visits_without_a_mask() -> None:
    scene = empty(n_trails=2)
    warps = [scene.warp(number, "i") for number in range(12)]
    excess = [np.count_nonzero(warp.image > 2.5 * np.sqrt(warp.variance)) / warp.image.size for warp in warps]
    assert sum(fraction > 0.02 for fraction in excess) == 2
    assert not any(warp.flagged(["BAD", "SAT", "CR", "NO_DATA"]).any() for warp in warps)
    # A few visits only: at most a third of them.
    few = [empty(n_trails=2, n_visits=3).warp(number, "i") for number in range(3)]
    assert sum(np.mean(warp.image > 2.5 * np.sqrt(warp.variance)) > 0.02 for warp in few) == 1


def test_some_visits_cover_a_part() -> None:
    scene = empty(partial_fraction=0.25)
    boxes = [scene.warp(number, "i").bbox for number in range(12)]
    whole = scene.patch.outer_bbox
    parts = [box for box in boxes if box != whole]
    assert len(parts) == 3
    for box in parts:
        assert whole.contains(box)
        assert 0.25 < box.area / whole.area < 0.85


def test_background_offset() -> None:
    means = [np.mean(empty(background_offset=5.0).warp(t, "i").image) for t in range(6)]
    sky = np.sqrt(np.median(empty().warp(0, "i").variance))
    assert 1.0 < np.std(means) / sky < 12.0
    assert abs(np.mean(empty().warp(0, "i").image)) < 0.1 * sky


def test_psf_that_varies_over_the_patch() -> None:
    scene = empty(psf_fwhm_change=0.2, psf_ellipticity_change=0.1, psf_ellipticity=0.0, seeing=(0.8, 0.8))
    shapes = scene.warp(0, "i").info.psf_shapes
    size = np.sqrt(shapes[..., 0] + shapes[..., 1])
    ellipticity = (shapes[..., 0] - shapes[..., 1]) / (shapes[..., 0] + shapes[..., 1])
    # Centres of the outer of 3 columns are two thirds of the patch apart, those of 2 rows half of it.
    np.testing.assert_allclose(size[:, 2] / size[:, 0], (1 + 0.2 / 3) / (1 - 0.2 / 3), rtol=0.02)
    np.testing.assert_allclose(ellipticity[1] - ellipticity[0], 2 * 0.1 / 2, rtol=0.15)
    constant = empty().warp(0, "i").psf_stamps
    assert np.all(constant == constant[0, 0])


def test_a_visit_is_the_same_in_neighbouring_patches() -> None:
    one, other = (
        Scene(dataclasses.replace(EMPTY, patch_id=patch_id, start=(14200, 15600 + 108 * patch_id)))
        for patch_id in (0, 1)
    )
    for number in (0, 7):
        a, b = one.warp(number, "r"), other.warp(number, "r")
        assert (a.visit, a.day_obs, a.physical_filter) == (b.visit, b.day_obs, b.physical_filter)
        np.testing.assert_array_equal(a.psf_stamps, b.psf_stamps)
        assert np.std(a.image - b.image) > np.std(a.image)
    assert one.patch.index.x + 1 == other.patch.index.x
    assert one.warp(0, "r").visit != one.warp(0, "i").visit


def test_seeds_repeat(scene: Scene, warps: list[Warp]) -> None:
    catalogue, again = simulate_scene(scene.config, "r")
    assert np.all(catalogue == scene.catalogue("r"))
    for a, b in zip(warps, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.psf_stamps, b.psf_stamps)
        assert a.bbox == b.bbox
    other = Scene(dataclasses.replace(scene.config, seed=77)).warp(0, "r")
    assert other.image.shape != warps[0].image.shape or not np.array_equal(other.image, warps[0].image)


def test_render_of_stars_is_the_gaussian_at_pixel_centres() -> None:
    box = Box.factory[100:141, 2000:2061]
    truth = render(objects({"x": 2020.3, "y": 120.0, "flux_nJy": 50.0}), 0.8, box)
    assert truth.shape == (41, 61)
    expected = 50.0 / (2 * np.pi * 0.64) * np.exp(-0.5 * ((1.0 - 0.3) ** 2 + 2.0**2) / 0.64)
    assert truth[22, 21] == pytest.approx(expected)
    assert truth.sum() == pytest.approx(50.0, rel=1e-4)


def test_render_of_galaxies() -> None:
    box = Box.factory[100:221, 2000:2131]
    row = {"x": 2060.4, "y": 155.7, "type": "galaxy", "flux_nJy": 50.0}
    tiny = render(objects(row | {"hlr": 1e-3}), 1.1, box)
    star = render(objects(row | {"type": "star"}), 1.1, box)
    np.testing.assert_allclose(tiny, star, atol=0.002 * star.max())
    large = render(objects(row | {"hlr": 0.8, "axis_ratio": 0.5, "angle": 30.0}), 1.1, box)
    assert large.sum() == pytest.approx(50.0, rel=0.003)
    y, x = np.mgrid[100:221, 2000:2131]
    assert np.sum(large * x) / large.sum() == pytest.approx(2060.4, abs=0.01)
    assert np.sum(large * y) / large.sum() == pytest.approx(155.7, abs=0.01)
    # The major axis points 30 degrees from x towards y.
    dx, dy = x - 2060.4, y - 155.7
    core = large * np.exp(-0.5 * (dx**2 + dy**2) / 36.0)
    xx, yy, xy = np.sum(core * dx**2), np.sum(core * dy**2), np.sum(core * dx * dy)
    assert np.degrees(0.5 * np.arctan2(2 * xy, xx - yy)) == pytest.approx(30.0, abs=0.5)
    # Half of the light is within the half-light radius; the PSF matters little to it.
    wide = render(objects(row | {"hlr": 3.0, "axis_ratio": 1.0}), 1.1, Box.factory[0:311, 1900:2221])
    y, x = np.mgrid[0:311, 1900:2221]
    inside = np.hypot(x - 2060.4, y - 155.7) < 15.0
    assert wide[inside].sum() / 50.0 == pytest.approx(0.5, abs=0.01)


def test_render_and_warps_show_the_same_sky(scene: Scene) -> None:
    # Truth at the PSF of a visit, where that is a Gaussian as wide: the fluxes of the patch's pixels agree.
    quiet = Scene(
        dataclasses.replace(
            scene.config, depth=40.0, sky_magnitude=10.0, n_trails=0, cosmic_ray_density=0.0, n_bad_columns=0
        )
    )
    warp = next(w for w in (quiet.warp(t, "r") for t in range(4)) if w.bbox == quiet.patch.outer_bbox)
    truth = render(quiet.catalogue("r"), 2.0, quiet.patch.outer_bbox)
    coarse = [
        np.add.reduceat(np.add.reduceat(a, [0, 27, 54], 0), [0, 36, 72], 1) for a in (truth, warp.image)
    ]
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.98


def test_files_hold_the_scene(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SceneConfig(seed=9), n_cells=(1, 2), cell_shape=(32, 32), n_visits=2, psf_size=11
    )
    progress: list[tuple[int, int]] = []
    files = write_scene(
        tmp_path / "new" / "dir", config, ["g", "y"], progress=lambda *args: progress.append(args)
    )
    assert [file.name for file in files] == [
        "warp_0_g_2000.fits",
        "warp_0_g_2001.fits",
        "warp_0_y_6000.fits",
        "warp_0_y_6001.fits",
    ]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    scene = Scene(config)
    np.testing.assert_array_equal(fits.getdata(files[3], "IMAGE"), scene.warp(1, "y").image)
    assert fits.getval(files[3], "MJD") == scene.mjd(1, "y")
    truth = Table.read(tmp_path / "new" / "dir" / "truth_0_y.ecsv")
    np.testing.assert_allclose(truth["flux_nJy"], scene.catalogue("y")["flux_nJy"])
    assert truth["x"].unit == u.pix
    assert truth.meta["pixel_scale"] == 0.2


@pytest.mark.parametrize("kernel", ["bilinear", "lanczos3"])
def test_correlated_noise(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"n_cells": (3, 4), "saturation": 1e9, "noise_correlation": kernel}
    scene = empty(**changes)
    galaxy = objects(
        {"x": 15650.0, "y": 14240.0, "type": "galaxy", "hlr": 2.0, "flux_nJy": 3e6, "axis_ratio": 0.7}
    )
    silent = empty(depth=40.0, sky_magnitude=10.0, **changes)
    for one in (scene, silent):
        monkeypatch.setattr(one, "catalogue", lambda band: galaxy)
    warps = [scene.warp(number, "i") for number in range(12)]
    white = empty(n_cells=(3, 4)).warp(0, "i")
    sky = np.sqrt(np.median(white.variance))
    bright, faint, neighbours, blocks = [], [], [], []
    for number, warp in enumerate(warps):
        signal = silent.warp(number, "i").image
        noise = (warp.image - signal) / np.sqrt(warp.variance)
        bright.append(noise[signal > 0.1 * signal.max()])
        faint.append(noise[signal < 0.001 * signal.max()])
        neighbours.append(np.mean(noise[:, 1:] * noise[:, :-1]))
        # Away from the galaxy, the mean of many pixels is as noisy as that of as many detector pixels.
        blocks.append((warp.image - signal)[96:, :].reshape(3, 8, 18, 8).mean(axis=(1, 3)) * 8.0 / sky)
    # The variance plane is the variance of each pixel by itself.
    assert np.concatenate(bright).std() == pytest.approx(1.0, abs=0.05)
    assert np.concatenate(faint).std() == pytest.approx(1.0, abs=0.02)
    assert np.std(np.array(blocks)[:, :, 9:]) == pytest.approx(1.0, abs=0.1)
    assert np.median(warps[0].variance) < 0.95 * sky**2
    # Detectors lie at all angles, and neighbours are correlated the less the more diagonally.
    assert np.mean(neighbours) > (0.15 if kernel == "bilinear" else 0.05)
    # In all other things the visit is what it was.
    assert warps[0].bbox == white.bbox
    np.testing.assert_array_equal(warps[0].psf_stamps, white.psf_stamps)


def test_unknown_noise_correlation() -> None:
    with pytest.raises(
        ValueError, match="no noise correlation 'cubic'; choose from none, bilinear, lanczos3"
    ):
        empty(noise_correlation="cubic")


def test_wrong_psf_is_wider_than_the_stars() -> None:
    right, wrong = (Scene(SceneConfig(seed=5, psf_error=error)).warp(0, "i") for error in (0.0, 0.02))
    np.testing.assert_array_equal(wrong.image, right.image)
    np.testing.assert_allclose(wrong.psf_stamps.sum(axis=(2, 3)), 1.0)
    size = [np.sqrt(warp.info.psf_shapes[0, 0, :2].sum()) for warp in (right, wrong)]
    assert size[1] / size[0] == pytest.approx(1.02, abs=0.002)


@pytest.mark.parametrize("kernel", ["none", "lanczos3"])
def test_unmasked_cosmic_rays_and_where_they_are(kernel: str) -> None:
    changes = {"partial_fraction": 0.5, "noise_correlation": kernel}
    clean, scene = empty(**changes), empty(n_unmasked_cosmic_rays=6, **changes)
    part = n_apart = 0
    for number in range(12):
        warp = scene.warp(number, "i")
        sky = np.sqrt(np.median(empty().warp(0, "i").variance))
        difference = (warp.image - clean.warp(number, "i").image) / sky
        inside = warp.bbox.slice_within(scene.patch.outer_bbox)
        touched = scene.artifacts(number, "i")
        np.testing.assert_array_equal(touched[inside], np.abs(difference) > 0.1)
        assert np.count_nonzero(touched) == np.count_nonzero(touched[inside])
        assert not warp.flagged(["BAD", "SAT", "CR", "NO_DATA"]).any()
        part += warp.bbox != scene.patch.outer_bbox
        # Each has 1 to 5 pixels of 10 to 80 sigma on the detector.
        assert 6 * 10.0 * 0.8 < difference.sum() < 6 * 5 * 80.0
        if kernel == "none":
            assert np.count_nonzero(touched) <= 30
            assert 9.9 < difference[touched[inside]].min() < difference.max() < 80.1
        else:
            assert np.count_nonzero(touched) > 60
        n_apart += scipy.ndimage.label(scipy.ndimage.binary_dilation(touched))[1]
    assert part == 6
    # Few of the 72 overlap, and all lie on the visit.
    assert 60 <= n_apart <= 72
    assert not clean.artifacts(0, "i").any()


def test_where_trails_are() -> None:
    scene, clean = empty(n_trails=2), empty()
    touched = np.array([scene.artifacts(number, "i") for number in range(12)])
    assert sum(one.any() for one in touched) == 2
    for number in np.flatnonzero(touched.any(axis=(1, 2))):
        warp = scene.warp(int(number), "i")
        difference = (warp.image - clean.warp(int(number), "i").image) / np.sqrt(np.median(warp.variance))
        np.testing.assert_array_equal(touched[number], difference > 0.1)


def test_gaps_and_a_missing_corner() -> None:
    scene = empty(n_gaps=1, missing_corner=15, cell_shape=(70, 60))
    widths = []
    for number in range(12):
        warp = scene.warp(number, "i")
        gone = warp.mask.get("NO_DATA")
        np.testing.assert_array_equal(np.isnan(warp.image), gone)
        np.testing.assert_array_equal(np.isnan(warp.variance), gone)
        assert gone[-15:, -15:].all()
        rest = gone[:-15, :-15]
        rows, columns = rest.all(axis=1), rest.all(axis=0)
        assert np.count_nonzero(rest) == np.count_nonzero(rest | rows[:, None] | columns)
        assert rows.any() != columns.any()
        widths.append(max(np.count_nonzero(rows), np.count_nonzero(columns)))
        assert warp.observation(["NO_DATA"]).good.mean() < 0.9
    # Of 8 to 12 arcsec; those at a border are narrower.
    assert 40 <= max(widths) <= 60


def test_background_slope() -> None:
    flat = [empty(n_cells=(4, 3)).warp(t, "i").image for t in range(12)]
    steep = [empty(n_cells=(4, 3), background_slope=3.0).warp(t, "i").image for t in range(12)]
    sky = np.sqrt(np.median(empty().warp(0, "i").variance))
    y, x = np.indices(flat[0].shape)
    slopes = []
    for a, b in zip(flat, steep, strict=True):
        difference = (b - a) / sky
        assert abs(difference.mean()) < 1e-3
        step_y = (difference[-1, 0] - difference[0, 0]) / (159 / 160)
        step_x = (difference[0, -1] - difference[0, 0]) / (107 / 108)
        plane = step_y * (y - 79.5) / 160 + step_x * (x - 53.5) / 108
        np.testing.assert_allclose(difference, plane, atol=1e-3)
        slopes.append((step_y, step_x))
    for one in np.std(slopes, axis=0):
        assert 1.5 < one < 4.5


def test_glow() -> None:
    scene = empty(n_cells=(6, 5), partial_fraction=0.25, psf_size=21, seeing=(0.55, 0.7))
    warps = [scene.warp(number, "i") for number in range(4)]
    middle = warps[1].image.shape[0] // 2
    warps[1].mask.set("SAT", np.indices(warps[1].image.shape)[0] == middle)
    before = [warp.image.copy() for warp in warps]
    box = scene.patch.outer_bbox
    centre = (box.y.start + 110.0, box.x.start + 80.0)
    glowing, truth = add_glow(warps, 0.5, centre, fwhm=60.0)
    assert truth.shape == tuple(box.shape) == (240, 180)
    assert truth[110, 80] == 0.5
    assert truth[140, 80] == truth[110, 50] == pytest.approx(0.25)
    # The flux of a Gaussian is its peak times 2 pi sigma^2; nearly all of it is in the patch.
    assert truth.sum() == pytest.approx(0.5 * 2.0 * np.pi * (60.0 / 2.35482) ** 2, rel=0.003)
    for number, (old, warp, new) in enumerate(zip(before, warps, glowing, strict=True)):
        np.testing.assert_array_equal(warp.image, old)
        expected = truth[warp.bbox.slice_within(box)].copy()
        if number == 1:
            assert expected[middle].max() > 0.1
            expected[middle] = 0.0
        np.testing.assert_allclose(new.image - old, expected, atol=1e-4)
        np.testing.assert_array_equal(new.variance, warp.variance)
    with pytest.raises(ValueError, match="ten times as wide as the widest PSF; make it at least"):
        add_glow(warps, 0.5, centre, fwhm=20.0)
    with pytest.raises(ValueError, match="no visit"):
        add_glow([], 0.5, centre, fwhm=60.0)
