# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The warp-file format itself; what users see of refusals is in test_ingest.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from lsst.coadd.deepprior.cells import make_cell_psf
from lsst.coadd.deepprior.simulate import Scene, SceneConfig
from lsst.coadd.deepprior.warp_file_header import night_of
from lsst.coadd.deepprior.warp_files import InvalidWarpFileError, read_warp_file, write_warp_file
from lsst.coadd.deepprior.warps import Warp
from lsst.images import Box


@pytest.fixture(scope="module")
def square_scene() -> Scene:
    return Scene(SceneConfig(seed=7, n_cells=(3, 2), cell_shape=(30, 30), psf_size=15, partial_fraction=1.0))


@pytest.fixture(scope="module")
def warp(square_scene: Scene) -> Warp:
    """A warp of a part of 3x2 cells, with a noise image."""
    all_warps = (square_scene.warp(number, "r") for number in range(12))
    warp = next(warp for warp in all_warps if warp.bbox.y.start > 14230 and warp.bbox.y.stop == 14290)
    noise = np.random.default_rng(1).normal(size=warp.image.shape).astype(np.float32)
    return dataclasses.replace(warp, noise=(noise,))


def cells_reached(warp: Warp) -> np.ndarray:
    pixels = np.zeros(tuple(warp.patch.outer_bbox.shape), dtype=bool)
    pixels[warp.bbox.slice_within(warp.patch.outer_bbox)] = True
    return pixels.reshape(3, 30, 2, 30).any(axis=(1, 3))


def test_round_trip(warp: Warp, tmp_path: Path) -> None:
    path = tmp_path / "warp.fits"
    write_warp_file(path, warp, exposure_time=30.0, mjd=60999.6)
    content = read_warp_file(path)
    header = content.header
    assert (header.instrument, header.visit, header.band) == (warp.instrument, warp.visit, "r")
    assert (header.physical_filter, header.exposure_time, header.mjd) == ("r_sim", 30.0, 60999.6)
    assert (header.skymap, header.tract, header.patch) == ("deepprior_sim", 9, 0)
    assert header.bbox == warp.bbox
    assert header.cells == warp.patch.cells
    assert header.day_obs == 20251120
    assert header.timespan is not None
    assert (header.timespan.end - header.timespan.begin).to_value("s") == pytest.approx(30.0, abs=1e-6)
    np.testing.assert_array_equal(content.image, warp.image)
    np.testing.assert_array_equal(content.variance, warp.variance)
    np.testing.assert_array_equal(content.noise, warp.noise[0])
    assert content.mask == dataclasses.replace(warp, mask=content.mask).mask
    for plane in ("BAD", "SAT", "CR", "NO_DATA"):
        np.testing.assert_array_equal(content.mask.get(plane), warp.mask.get(plane))
    assert warp.mask.get("BAD").any()
    # All stamps are one, so the file holds one; cells that the warp does not reach have none after reading.
    assert content.psf.shape == (15, 15)
    back = content.to_warp(warp.patch, warp.sky_projection)
    np.testing.assert_allclose(back.psf_stamps[back.has_psf][0], warp.psf_stamps[0, 0], atol=1e-8)
    np.testing.assert_array_equal(back.has_psf, cells_reached(warp))
    assert not back.has_psf.all()


def test_wcs_is_that_of_the_tract(warp: Warp, tmp_path: Path) -> None:
    path = tmp_path / "warp.fits"
    write_warp_file(path, warp)
    x, y = 15640.25, 14277.5
    expected = warp.sky_projection.pixel_to_sky(x=x, y=y)
    assert read_warp_file(path).header.wcs.pixel_to_world(x, y).separation(expected) < 1e-6 * u.arcsec
    # The header of the pixels alone, without LTV, is right for viewers.
    header = fits.getheader(path, "IMAGE")
    assert (header["LTV1"], header["LTV2"]) == (-warp.bbox.x.start, -warp.bbox.y.start)
    sky = WCS(header).pixel_to_world(x - warp.bbox.x.start, y - warp.bbox.y.start)
    assert sky.separation(expected) < 1e-6 * u.arcsec


def test_psf_of_each_cell(warp: Warp, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    stamps = rng.uniform(0.5, 1.0, size=(3, 2, 9, 9))
    stamps[0, 1] = np.nan
    moved = Box.from_shape(warp.image.shape, start=warp.patch.outer_bbox.start)
    warp = dataclasses.replace(
        warp,
        bbox=moved,
        mask=warp.mask.view(yx0=moved.start),
        psf=make_cell_psf(stamps, warp.patch.cells),
    )
    path = tmp_path / "warp.fits"
    write_warp_file(path, warp)
    content = read_warp_file(path)
    assert content.header.psf_cells == (3, 2)
    back = content.to_warp(warp.patch, warp.sky_projection)
    expected = cells_reached(warp)
    assert expected[0].all()
    expected[0, 1] = False
    np.testing.assert_array_equal(back.has_psf, expected)
    sums = stamps.sum(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(back.psf_stamps[expected], (stamps / sums)[expected], atol=1e-7)


def test_cells_without_psf_stay_without(warp: Warp, tmp_path: Path) -> None:
    """Also where all others share one stamp."""
    missing = tuple(np.argwhere(cells_reached(warp))[0])
    stamps = warp.psf_stamps.copy()
    stamps[missing] = np.nan
    path = tmp_path / "warp.fits"
    write_warp_file(path, dataclasses.replace(warp, psf=make_cell_psf(stamps, warp.patch.cells)))
    expected = cells_reached(warp)
    expected[missing] = False
    assert expected.any()
    back = read_warp_file(path).to_warp(warp.patch, warp.sky_projection)
    np.testing.assert_array_equal(back.has_psf, expected)


def test_infinite_pixels_become_nan(warp: Warp, tmp_path: Path) -> None:
    image, variance = warp.image.copy(), warp.variance.copy()
    image[1, 2], image[3, 4] = np.inf, -np.inf
    variance[5, 6] = np.inf
    path = tmp_path / "warp.fits"
    write_warp_file(path, dataclasses.replace(warp, image=image, variance=variance))
    content = read_warp_file(path)
    assert np.argwhere(np.isnan(content.image)).tolist() == [[1, 2], [3, 4]]
    assert np.argwhere(np.isnan(content.variance)).tolist() == [[5, 6]]


def test_mask_bits_are_named_by_keywords_alone(warp: Warp, tmp_path: Path) -> None:
    path = tmp_path / "warp.fits"
    write_warp_file(path, warp)
    with fits.open(path, mode="update") as hdus:
        mask = hdus["MASK"]
        for name in ("MP_BAD", "MP_SAT", "MP_CR", "MP_NO_DATA"):
            del mask.header[name]
        mask.header["MP_CR"] = 31
        mask.header["HIERARCH MP_A_RATHER_LONG_NAME"] = 3
        mask.data[:] = 0
        mask.data[0, 0] = np.int32(-(2**31))
        mask.data[0, 1] = 8
        mask.data[0, 2] = 16
    found = read_warp_file(path).mask
    assert list(found.schema.names) == ["CR", "A_RATHER_LONG_NAME", "NO_DATA"]
    for x, plane in enumerate(found.schema.names):
        assert np.argwhere(found.get(plane)).tolist() == [[0, x]]


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64])
def test_masks_of_any_integer_type(dtype: type, warp: Warp, tmp_path: Path) -> None:
    """The highest bit is a bit like others, and bits beyond 31, which no keyword can name, count too."""
    path = tmp_path / "warp.fits"
    write_warp_file(path, warp)
    highest = np.iinfo(dtype).bits - 1
    with fits.open(path, mode="update") as hdus:
        header = hdus["MASK"].header
        header["MP_CR"] = min(highest, 31)
        pixels = np.zeros(warp.image.shape, dtype=dtype)
        pixels[0, 0] = np.array(1 << highest, dtype=np.uint64).astype(dtype)
        hdus["MASK"] = fits.ImageHDU(pixels, header, name="MASK")
    found = read_warp_file(path).mask
    assert found.get("CR").sum() == (highest < 32)
    assert found.get("NO_DATA").sum() == (highest > 31)


def test_a_file_does_not_fit_another_number_of_cells(warp: Warp, tmp_path: Path) -> None:
    stamps = np.random.default_rng(3).uniform(0.5, 1.0, size=(3, 2, 9, 9))
    path = tmp_path / "warp.fits"
    write_warp_file(path, dataclasses.replace(warp, psf=make_cell_psf(stamps, warp.patch.cells)))
    other = Scene(SceneConfig(n_cells=(2, 2), cell_shape=(45, 45)))
    with pytest.raises(InvalidWarpFileError, match=rf"{path}: it has PSF stamps for \(3, 2\) cells"):
        read_warp_file(path).to_warp(other.patch, other.sky_projection)


def test_nights_end_at_noon() -> None:
    assert night_of(61000.0) == 20251120  # 2025-11-21 00:00 TAI
    assert night_of(61000.499) == 20251120
    assert night_of(61000.501) == 20251121


def test_what_the_format_cannot_hold(scene: Scene, warp: Warp, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cells that are not square"):
        write_warp_file(tmp_path / "a.fits", scene.warp(0, "r"))
    with pytest.raises(ValueError, match="more than one noise image"):
        write_warp_file(tmp_path / "a.fits", dataclasses.replace(warp, noise=(warp.image, warp.image)))
    assert not list(tmp_path.iterdir())
