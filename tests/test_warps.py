# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
from typing import Any

import astropy.units as u
import numpy as np
import pytest

from lsst.coadd.deepprior.cells import cover_with_cells, cut_into_cells, make_cell_psf
from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.warps import InvalidWarpError, Warp
from lsst.images import YX, Box, Image, Mask, MaskPlane, MaskSchema, Polygon
from lsst.images.cells import CellCoadd, CellIJ


@pytest.fixture
def warp(scene: Scene) -> Warp:
    """A warp of 50x70 flat pixels inside of a patch of 80x108, whose cell (1, 2) has no PSF."""
    patch = scene.patch
    start = patch.cells.bbox.start
    bbox = Box.from_shape((50, 70), start=YX(y=start.y + 25, x=start.x + 10))
    stamps = np.zeros((2, 3, 5, 7))[..., 1:6]
    stamps[:, :, 1:4, 1:4] = 0.5
    stamps[:, :, 2, 2] = 3.0
    stamps[1, 2] = np.nan
    schema = MaskSchema([MaskPlane("BAD", "Bad."), MaskPlane("CR", "Cosmic ray."), MaskPlane("OK", "Fine.")])
    rng = np.random.default_rng(8)
    return Warp(
        instrument="Cam",
        visit=77,
        physical_filter="r_1",
        band="r",
        day_obs=20250102,
        image=rng.normal(size=(50, 70)).astype(np.float32),
        variance=rng.uniform(1.0, 2.0, size=(50, 70)).astype(np.float32),
        mask=Mask(schema=schema, bbox=bbox),
        bbox=bbox,
        psf=make_cell_psf(stamps, patch.cells),
        sky_projection=scene.sky_projection,
        patch=patch,
        detectors={3: Polygon.from_box(bbox)},
    )


def changed(warp: Warp, **changes: Any) -> Warp:
    return dataclasses.replace(warp, **changes)


def test_good_pixels_are_all_but_the_cell_without_psf(warp: Warp) -> None:
    # The warp's box starts at (25, 10) of the patch, cell (1, 2) at (40, 72).
    expected = np.zeros((50, 70), dtype=bool)
    expected[40 - 25 :, 72 - 10 :] = True
    np.testing.assert_array_equal(warp.unusable(["BAD", "CR"]), expected)


def test_every_kind_of_bad_pixel_is_unusable(warp: Warp) -> None:
    image, variance, mask = warp.image.copy(), warp.variance.copy(), warp.mask.copy()
    image[0, 1], image[0, 2] = np.nan, np.inf
    variance[1, :5] = [np.nan, np.inf, 0.0, -1.0, -np.inf]
    planes = {}
    for x, plane in enumerate(("BAD", "CR", "OK")):
        planes[plane] = np.zeros((50, 70), dtype=bool)
        planes[plane][2, x] = True
        mask.set(plane, planes[plane])
    bad = changed(warp, image=image, variance=variance, mask=mask)
    found = bad.unusable(["CR", "BAD", "NOT_A_PLANE"]) & ~warp.unusable([])
    assert {tuple(index) for index in np.argwhere(found).tolist()} == {
        (0, 1),
        (0, 2),
        *((1, x) for x in range(5)),
        (2, 0),
        (2, 1),
    }
    np.testing.assert_array_equal(bad.flagged(["CR"]), planes["CR"])


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("value", [1e9, 1e30, 3e38])
def test_pixels_marked_by_a_huge_variance_are_unusable(warp: Warp, rows: int, value: float) -> None:
    """They may be most of the box; the core of a bright star, with the noise of its photons, stays."""
    variance = warp.variance.copy()
    variance[:rows] = value
    variance[45, 5] = 5e4
    expected = warp.unusable([])
    expected[:rows] = True
    np.testing.assert_array_equal(changed(warp, variance=variance).unusable([]), expected)


@pytest.mark.parametrize("n_marked", [0, 5])
@pytest.mark.parametrize("rows", [4, 40])
def test_pixels_without_data_and_with_next_to_no_variance_are_unusable(
    warp: Warp, rows: int, n_marked: int
) -> None:
    """They may be most of the box, and others may be marked by a huge variance."""
    image, variance = warp.image.copy(), warp.variance.copy()
    image[:rows], variance[:rows] = 0.0, 1e-12
    variance[rows : rows + n_marked] = 1e30
    variance[45, 5] = 5e4
    expected = warp.unusable([])
    expected[: rows + n_marked] = True
    np.testing.assert_array_equal(changed(warp, image=image, variance=variance).unusable([]), expected)


def test_observation_lies_at_its_place_in_the_patch(warp: Warp) -> None:
    observation = warp.observation(["BAD"])
    assert observation.origin == (25, 10)
    assert observation.name == "Cam visit 77"
    np.testing.assert_array_equal(observation.good, ~warp.unusable(["BAD"]))
    np.testing.assert_array_equal(observation.has_psf, [[True, True, True], [True, True, False]])
    np.testing.assert_allclose(observation.psf[0, 1].sum(), 1.0)
    assert observation.psf[0, 1, 2, 2] == pytest.approx(3.0 / 7.0)


def test_cell_coadd_round_trip(warp: Warp, tmp_path: Any) -> None:
    mask = warp.mask.copy()
    mask.set("CR", np.arange(3500).reshape(50, 70) % 11 == 0)
    image = warp.image.copy()
    image[3, 4] = np.nan
    noise = np.random.default_rng(9).normal(size=(50, 70)).astype(np.float32)
    factors = {"f_instFlux": np.array([[1.0, 1.1, 1.2], [np.nan, 1.3, 1.4]])}
    warp = changed(warp, mask=mask, image=image, noise=(noise,), aperture_corrections=factors)
    warp.to_cell_coadd().write(str(tmp_path / "warp.fits"))
    coadd = CellCoadd.read(str(tmp_path / "warp.fits"))
    back = Warp.from_cell_coadd(coadd)
    for name in ("instrument", "visit", "detectors", "physical_filter", "band", "day_obs", "bbox", "patch"):
        assert getattr(back, name) == getattr(warp, name), name
    np.testing.assert_array_equal(back.image, warp.image)
    np.testing.assert_array_equal(back.variance, warp.variance)
    np.testing.assert_array_equal(back.noise[0], noise)
    np.testing.assert_array_equal(back.mask.get("CR"), mask.get("CR"))
    # A CellCoadd has no corrections where it has no PSF.
    np.testing.assert_array_equal(
        back.aperture_corrections["f_instFlux"], [[1.0, 1.1, 1.2], [np.nan, 1.3, np.nan]]
    )
    # A CellCoadd holds the PSF of the cells that it reaches: here all of them.
    np.testing.assert_allclose(back.psf_stamps, warp.psf_stamps, rtol=1e-12)
    sky, expected = (w.sky_projection.pixel_to_sky(x=15700.0, y=14250.0) for w in (back, warp))
    assert sky.separation(expected) < 1e-6 * u.arcsec


def test_cell_coadd_provenance(warp: Warp) -> None:
    image = warp.image.copy()
    image[0, 0] = np.nan
    provenance = changed(warp, image=image).to_cell_coadd().provenance
    (row,) = provenance.inputs
    assert (row["instrument"], row["visit"], row["detector"], row["day_obs"]) == ("Cam", 77, 3, 20250102)
    assert row["polygon"].bbox == warp.bbox
    rows = {(r["cell_i"], r["cell_j"]): r for r in provenance.contributions}
    assert set(rows) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    # Cells are 40x36 pixels; the warp covers rows 25-74 and columns 10-79 of the patch.
    assert rows[0, 0]["overlap_fraction"] == pytest.approx(15 * 26 / 1440)
    assert rows[0, 0]["unmasked_fraction"] == pytest.approx((15 * 26 - 1) / 1440)
    assert rows[1, 1]["overlap_fraction"] == pytest.approx(35 * 36 / 1440)
    assert [bool(rows[cell]["overlaps_center"]) for cell in ((0, 0), (1, 0), (1, 1), (0, 2))] == [
        False,
        True,
        True,
        False,
    ]


def test_detectors_share_the_cells_of_a_visit(warp: Warp, tmp_path: Any) -> None:
    # Detector 5 covers columns 10 to 49 of the patch, detector 2 the others; detector 9 lies elsewhere.
    y, x = warp.bbox.y, warp.bbox.x
    boxes = {
        5: Box.factory[y.start : y.stop, x.start : x.start + 40],
        2: Box.factory[y.start : y.stop, x.start + 40 : x.stop],
        9: Box.factory[y.stop + 5 : y.stop + 9, x.start : x.stop],
    }
    outlines = {detector: Polygon.from_box(box) for detector, box in boxes.items()}
    warp = changed(warp, detectors=outlines)
    warp.to_cell_coadd().write(str(tmp_path / "warp.fits"))
    coadd = CellCoadd.read(str(tmp_path / "warp.fits"))
    assert Warp.from_cell_coadd(coadd).detectors == outlines
    assert {int(row["detector"]): row["polygon"] for row in coadd.provenance.inputs} == outlines
    rows = {(r["cell_i"], r["cell_j"], r["detector"]): r for r in coadd.provenance.contributions}
    # Cells are 40x36 pixels: columns 36 to 71 are shared, 14 and 22 columns.
    assert set(rows) == {(0, 0, 5), (0, 1, 5), (0, 1, 2), (0, 2, 2), (1, 0, 5), (1, 1, 5), (1, 1, 2)}
    for name in ("overlap_fraction", "unmasked_fraction"):
        assert rows[1, 1, 5][name] == pytest.approx(35 * 14 / 1440)
        assert rows[1, 1, 2][name] == pytest.approx(35 * 22 / 1440)
        assert rows[0, 2, 2][name] == pytest.approx(15 * 8 / 1440)
    assert [bool(rows[1, 1, detector]["overlaps_center"]) for detector in (5, 2)] == [False, True]


def test_no_cell_is_lost_between_the_outlines_of_detectors(warp: Warp) -> None:
    far = Polygon.from_box(Box.from_shape((3, 3)))
    lower = Polygon.from_box(
        Box.factory[warp.bbox.y.start : warp.bbox.y.start + 10, warp.bbox.x.start : warp.bbox.x.stop]
    )
    rows = changed(warp, detectors={4: far, 8: lower}).to_cell_coadd().provenance.contributions
    # The lower one covers the first row of cells in part, and the second one not at all.
    detectors = {(row["cell_i"], row["cell_j"]): row["detector"] for row in rows}
    assert detectors == {(0, 0): 8, (0, 1): 8, (0, 2): 8, (1, 0): 4, (1, 1): 4}
    fractions = {(row["cell_i"], row["cell_j"]): row["overlap_fraction"] for row in rows}
    assert fractions[1, 1] == pytest.approx(35 * 36 / 1440)


def test_psf_shapes_are_adaptive_moments(warp: Warp, scene: Scene) -> None:
    y, x = np.mgrid[-12:13, -12:13]
    xx, yy, xy = 6.0, 4.0, 1.0
    inverse = np.linalg.inv([[xx, xy], [xy, yy]])
    stamp = np.exp(-0.5 * (inverse[0, 0] * x**2 + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y**2))
    stamps = np.broadcast_to(stamp, (2, 3, 25, 25)).copy()
    stamps[0, 1] = np.nan
    shapes = changed(warp, psf=make_cell_psf(stamps, scene.patch.cells)).info.psf_shapes
    np.testing.assert_allclose(shapes[1, 1], [xx, yy, xy], rtol=1e-3)
    assert np.isnan(shapes[0, 1]).all()


def test_a_cell_whose_stamp_is_nan_is_missing_even_if_not_declared(warp: Warp) -> None:
    psf = warp.psf
    stamps = np.array([[psf[CellIJ(i=0, j=j)].array for j in range(3)]] * 2)
    undeclared = make_cell_psf(stamps, warp.patch.cells)
    undeclared[CellIJ(i=1, j=0)].array[...] = np.nan
    np.testing.assert_array_equal(changed(warp, psf=undeclared).has_psf, [[1, 1, 1], [0, 1, 1]])


def moved_mask(warp: Warp) -> Mask:
    return Mask(schema=warp.mask.schema, bbox=Box.from_shape((50, 70)))


def psf_with(warp: Warp, shape: tuple[int, int] = (5, 5), **pixels: float) -> Any:
    stamps = np.ones((2, 3, *shape))
    stamps[..., shape[0] // 2, shape[1] // 2] = 4.0
    stamps[0, 1] = pixels.get("fill", 1.0)
    stamps[0, 1, 0, 0] = pixels.get("corner", 1.0)
    return make_cell_psf(stamps, warp.patch.cells)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            lambda w: {"aperture_corrections": {"f": np.ones((3, 2))}},
            "the aperture correction f has the shape (3, 2)",
        ),
        (lambda w: {"image": w.image[1:]}, "the image has the shape (49, 70)"),
        (lambda w: {"variance": w.variance.T}, "the variance has the shape (70, 50)"),
        (lambda w: {"noise": (w.image, w.image[:, 1:])}, "the noise image 1 has the shape"),
        (lambda w: {"image": w.image.astype(int)}, "not of a floating-point type"),
        (lambda w: {"mask": moved_mask(w)}, "the mask covers"),
        (lambda w: {"psf": psf_with(w, corner=np.nan)}, "stamp of cell (0, 1) is finite only in part"),
        (lambda w: {"psf": psf_with(w, corner=-24.0)}, "stamp of cell (0, 1) has the sum 0"),
        (lambda w: {"psf": psf_with(w, fill=0.01)}, "stamp of cell (0, 1) has 81% of its light in one pixel"),
        (lambda w: {"psf": psf_with(w, corner=-13.0)}, "has a negative part of 54% of its positive part"),
        (lambda w: {"psf": psf_with(w)}, "stamp of cell (0, 1) is flat"),
        (lambda w: {"psf": psf_with(w, (1, 1))}, "has 100% of its light in one pixel"),
        (lambda w: {"psf": psf_with(w, (4, 4))}, "even size"),
        (lambda w: {"psf": psf_with(w, (5, 7))}, "not square"),
        (
            lambda w: {"bbox": Box.from_shape((50, 70)), "mask": moved_mask(w)},
            "leaves that of patch 0",
        ),
        (
            lambda w: {
                "patch": w.patch.model_copy(
                    update={"cells": cover_with_cells(w.patch.cells.bbox, YX(y=20, x=36))}
                )
            },
            "another cell grid",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(warp: Warp, changes: Any, reason: str) -> None:
    with pytest.raises(InvalidWarpError) as caught:
        changed(warp, **changes(warp))
    assert str(caught.value).startswith("Cam visit 77: ")
    assert reason in str(caught.value)


def test_only_one_visit_in_njy_with_a_band_is_a_warp(warp: Warp) -> None:
    coadd = warp.to_cell_coadd()

    def rebuilt(**changes: Any) -> CellCoadd:
        parts = {
            "image": coadd.image,
            "mask": coadd.mask,
            "variance": coadd.variance,
            "band": "r",
            "psf": coadd.psf,
            "patch": coadd.patch,
            "provenance": coadd.provenance,
        } | changes
        return CellCoadd(parts.pop("image"), sky_projection=coadd.sky_projection, **parts)

    assert Warp.from_cell_coadd(rebuilt()).visit == 77
    other_unit = Image(coadd.image.array, bbox=coadd.bbox, unit=u.uJy)
    other_variance = Image(coadd.variance.array, bbox=coadd.bbox, unit=u.uJy**2)
    with pytest.raises(InvalidWarpError, match="Cam visit 77: its pixels are in uJy, not nJy"):
        Warp.from_cell_coadd(rebuilt(image=other_unit, variance=other_variance))
    with pytest.raises(InvalidWarpError, match="Cam visit 77: its band is not known"):
        Warp.from_cell_coadd(rebuilt(band=None))
    with pytest.raises(InvalidWarpError, match="provenance"):
        Warp.from_cell_coadd(rebuilt(provenance=None))
    provenance = coadd.provenance
    provenance.inputs.add_row(provenance.inputs[0])
    provenance.inputs["visit"][1] = 78
    with pytest.raises(InvalidWarpError, match="Cam visit 77: not a one-visit coadd"):
        Warp.from_cell_coadd(rebuilt(provenance=provenance))


def test_cells_cover_a_box_from_its_lower_left_corner() -> None:
    grid = cover_with_cells(Box.factory[100:201, -7:32], YX(y=50, x=13))
    assert grid.bbox == Box.factory[100:250, -7:32]
    assert grid.grid_size == CellIJ(i=3, j=3)


@pytest.mark.parametrize(
    ("shape", "most", "cell"),
    [
        ((4200, 4200), 150, (150, 150)),
        ((3400, 4100), 150, (136, 100)),
        ((190, 180), 64, (38, 60)),
        ((181, 179), 64, (64, 64)),  # primes
    ],
)
def test_cells_do_not_reach_beyond_a_patch_that_they_can_divide(
    shape: tuple[int, int], most: int, cell: tuple[int, int]
) -> None:
    bbox = Box.from_shape(shape, start=(120, -130))
    grid = cut_into_cells(bbox, most)
    assert grid.cell_shape == YX(y=cell[0], x=cell[1])
    assert grid.bbox.start == bbox.start
    assert (grid.bbox == bbox) == (shape != (181, 179))
    assert grid.bbox.contains(bbox)
