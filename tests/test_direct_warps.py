# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The part of the reader of afw warps that works on arrays; `test_direct_warps_afw` has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lsst.coadd.deepprior.direct_warps import (
    MaskBits,
    PatchGeometry,
    assemble_warp,
    cells_of_patch,
    stack_stamps,
)
from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.stack_imports import import_from_stack
from lsst.coadd.deepprior.warps import InvalidWarpError
from lsst.images import YX, Box, Image, Polygon
from lsst.images.cells import CellIJ

DATA_ID = {"instrument": "Cam", "visit": 77, "physical_filter": "r_1", "band": "r", "day_obs": 20250102}


@pytest.fixture
def geometry(scene: Scene) -> PatchGeometry:
    """A patch of 2x3 cells of 40x36 pixels."""
    return PatchGeometry(patch=scene.patch, sky_projection=scene.sky_projection)


def patch_box(geometry: PatchGeometry, y: tuple[int, int], x: tuple[int, int]) -> Box:
    """Return a box by its rows and columns, counted from the lower left corner of the patch."""
    start = geometry.patch.cells.bbox.start
    return Box.factory[start.y + y[0] : start.y + y[1], start.x + x[0] : start.x + x[1]]


def peaked_stamps() -> np.ndarray:
    stamps = np.ones((2, 3, 3, 3))
    stamps[..., 1, 1] = 4.0
    return stamps


def parts(geometry: PatchGeometry, bbox: Box, **changes: Any) -> dict[str, Any]:
    """Return the parts of a warp of random pixels that covers a box."""
    rng = np.random.default_rng(3)
    image, variance = rng.normal(size=(2, *bbox.shape)).astype(np.float32)
    return {
        "image": Image(image, bbox=bbox),
        "variance": Image(1.0 + variance**2, bbox=bbox),
        "masks": [MaskBits(np.zeros(tuple(bbox.shape), dtype=np.int32), {"BAD": 0}, bbox)],
        "psf": peaked_stamps(),
    } | changes


def test_what_lies_beyond_the_patch_is_cut_off(geometry: PatchGeometry) -> None:
    """The exposure reaches 7 rows below the patch and 11 columns beyond its right border."""
    bbox = patch_box(geometry, (-7, 50), (20, 108 + 11))
    given = parts(geometry, bbox)
    noise = [Image(np.arange(57 * 99, dtype=np.float32).reshape(57, 99), bbox=bbox)]
    outlines = {3: Polygon.from_box(bbox)}
    factors = {"f_instFlux": np.full((2, 3), 1.1)}
    warp = assemble_warp(
        DATA_ID, geometry, noise=noise, detectors=outlines, aperture_corrections=factors, **given
    )
    assert warp.bbox == patch_box(geometry, (0, 50), (20, 108))
    np.testing.assert_array_equal(warp.image, given["image"].array[7:, :88])
    np.testing.assert_array_equal(warp.variance, given["variance"].array[7:, :88])
    np.testing.assert_array_equal(warp.noise[0], noise[0].array[7:, :88])
    assert warp.observation(()).origin == (0, 20)
    assert warp.label == "Cam visit 77"
    assert (warp.band, warp.physical_filter, warp.day_obs) == ("r", "r_1", 20250102)
    assert warp.detectors == outlines
    assert warp.aperture_corrections == factors
    assert warp.sky_projection is geometry.sky_projection


def test_mask_planes_go_by_their_names(geometry: PatchGeometry) -> None:
    """Bit 31 is the sign bit; the artifact mask numbers its planes differently and covers fewer pixels."""
    bbox = patch_box(geometry, (-5, 40), (-3, 60))
    bits = np.zeros((45, 63), dtype=np.int32)
    bits[5 + 1, 3 + 2] = 1 << 4  # CR, row 1 and column 2 of the patch
    bits[5 + 3, 3 + 4] = np.int32(-(2**31)) | 1
    bits[0, 0] = 1 << 7  # outside of the patch
    planes = {"BAD": 0, "CR": 4, "DETECTED": 7, "UNMASKEDNAN": 31, "SAT": 9}
    small = patch_box(geometry, (10, 30), (5, 25))
    artifacts = np.zeros((20, 20), dtype=np.int32)
    artifacts[2, 1] = 1 << 4 | 1 << 5
    masks = [
        MaskBits(bits, planes, bbox),
        MaskBits(artifacts, {"CLIPPED": 4, "CR": 5}, small),
        MaskBits(artifacts, {"ELSEWHERE": 4}, patch_box(geometry, (300, 320), (0, 20))),
    ]
    warp = assemble_warp(DATA_ID, geometry, **parts(geometry, bbox, masks=masks))
    found = {
        name: set(map(tuple, np.argwhere(warp.mask.get(name)).tolist())) for name in warp.mask.schema.names
    }
    assert found == {
        "BAD": {(3, 4)},
        "CR": {(1, 2), (12, 6)},
        "UNMASKEDNAN": {(3, 4)},
        "CLIPPED": {(12, 6)},
    }


def test_pixels_made_of_masked_ones_are_bad(geometry: PatchGeometry) -> None:
    bbox = patch_box(geometry, (0, 40), (0, 50))
    bits = np.zeros((40, 50), dtype=np.int32)
    bits[9, 9] = 2
    fraction = np.zeros((40, 50), dtype=np.float32)
    fraction[1, 2], fraction[3, 4], fraction[5, 6] = 0.3, 0.30001, np.nan
    given = parts(geometry, bbox, masks=[MaskBits(bits, {"BAD": 1}, bbox)])
    warp = assemble_warp(
        DATA_ID, geometry, masked_fraction=Image(fraction, bbox=bbox), max_masked_fraction=0.3, **given
    )
    assert set(map(tuple, np.argwhere(warp.mask.get("BAD")).tolist())) == {(3, 4), (5, 6), (9, 9)}


def test_cells_without_psf_are_missing(geometry: PatchGeometry) -> None:
    psf = peaked_stamps()
    psf[1, 0] = np.nan
    warp = assemble_warp(DATA_ID, geometry, **parts(geometry, geometry.patch.cells.bbox, psf=psf))
    np.testing.assert_array_equal(warp.has_psf, [[1, 1, 1], [0, 1, 1]])
    nowhere = parts(geometry, geometry.patch.cells.bbox, psf=np.full((2, 3, 1, 1), np.nan))
    assert not assemble_warp(DATA_ID, geometry, **nowhere).observation(()).good.any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": ((90, 100), (0, 50))}, "has no pixel in common with patch 0"),
        ({"noise": ((0, 30), (0, 50))}, "Cam visit 77: the noise image 0 covers"),
        ({"masked_fraction": ((0, 40), (1, 50))}, "Cam visit 77: the masked fraction covers"),
        ({"variance": ((0, 40), (0, 49))}, "Cam visit 77: the variance covers"),
        ({"missing": "day_obs"}, "does not say the day_obs of the warp"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    geometry: PatchGeometry, changes: dict[str, Any], reason: str
) -> None:
    bbox = patch_box(geometry, *changes.get("bbox", ((0, 40), (0, 50))))
    given = parts(geometry, bbox)
    for name in changes.keys() & {"noise", "masked_fraction", "variance"}:
        other = patch_box(geometry, *changes[name])
        plane = Image(np.ones(tuple(other.shape), dtype=np.float32), bbox=other)
        given[name] = [plane] if name == "noise" else plane
    data_id = {key: value for key, value in DATA_ID.items() if key != changes.get("missing")}
    with pytest.raises(InvalidWarpError) as caught:
        assemble_warp(data_id, geometry, **given)
    assert reason in str(caught.value)


def test_stamps_of_different_sizes_are_centred(geometry: PatchGeometry) -> None:
    """afw's stamps need be neither square nor symmetric around the pixel (0, 0)."""
    wide = np.arange(1.0, 13.0).reshape(3, 4)
    spoiled = np.ones((1, 1))
    spoiled[0, 0] = np.nan
    one = Box.from_shape((1, 1))
    stamps = [
        (wide, Box.factory[-1:2, -2:2]),
        None,
        (spoiled, one),
        (np.zeros((1, 1)), one),
        (np.full((1, 1), 7.0), one),
        None,
    ]
    stack = stack_stamps(stamps, geometry.patch.cells)
    assert stack.shape == (2, 3, 5, 5)
    np.testing.assert_array_equal(stack[0, 0, 1:4, 0:4], wide)
    assert stack[0, 0].sum() == wide.sum()
    assert stack[1, 1, 2, 2] == stack[1, 1].sum() == 7.0
    missing = np.isnan(stack).all(axis=(2, 3))
    np.testing.assert_array_equal(missing, [[0, 1, 1], [1, 0, 1]])
    nothing = stack_stamps([None] * 6, geometry.patch.cells)
    assert nothing.shape == (2, 3, 1, 1)
    assert np.isnan(nothing).all()


def test_cells_of_a_patch_leave_out_its_border() -> None:
    outer = Box.factory[95 : 95 + 130, 295 : 295 + 94]
    grid = cells_of_patch(outer, YX(y=40, x=28), 5)
    assert grid.bbox == Box.factory[100:220, 300:384]
    assert grid.grid_size == CellIJ(i=3, j=3)
    with pytest.raises(ValueError, match="not a whole number of cells of 28x40 pixels"):
        cells_of_patch(outer, YX(y=40, x=28), 4)


@pytest.mark.parametrize(
    ("module", "product"),
    [
        ("lsst.afw.no_such_part", "afw"),
        ("lsst.pex.no_such_part", "pex_no_such_part"),
        ("lsst.no_such_product", "no_such_product"),
    ],
)
def test_missing_packages_are_named_with_what_to_do(module: str, product: str) -> None:
    with pytest.raises(ImportError) as caught:
        import_from_stack(module)
    message = str(caught.value)
    assert message.startswith(f"{module} cannot be imported")
    assert f"the product {product} of" in message
    assert "'setup lsst_distrib'" in message
