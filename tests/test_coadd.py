# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import astropy.units as u
import numpy as np
import pytest

from lsst.coadd.deepprior.cells import make_cell_psf
from lsst.coadd.deepprior.coadd import MASK_SCHEMA, InputPlanes, make_coadds
from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.warps import Warp
from lsst.images import Box, Mask, MaskPlane, MaskSchema, Polygon
from lsst.images.cells import CellCoadd, CellIJ

# The scene has 2x3 cells of 40x36 pixels.
NY, NX = 80, 108
BAD_PLANES = ("BAD", "SAT", "CR")


def cell(i: int, j: int) -> tuple[slice, slice]:
    return np.s_[40 * i : 40 * i + 40, 36 * j : 36 * j + 36]


def clean(warp: Warp) -> Warp:
    """Return a warp of the whole patch without any defect."""
    whole = warp.patch.outer_bbox
    rng = np.random.default_rng(warp.visit)
    return dataclasses.replace(
        warp,
        image=rng.normal(size=(NY, NX)).astype(np.float32),
        variance=np.full((NY, NX), 2.0, dtype=np.float32),
        mask=Mask(schema=warp.mask.schema, bbox=whole),
        bbox=whole,
    )


@pytest.fixture
def inputs(warps: list[Warp]) -> tuple[list[Warp], InputPlanes]:
    """Three warps: one that is clean, one with masked pixels, one that covers rows 0 to 49 only."""
    first, second, third = (clean(warp) for warp in warps[:3])
    for plane, pixel in (("SAT", (1, 2)), ("CR", (3, 4)), ("CR", (1, 2))):
        pixels = np.zeros((NY, NX), dtype=bool)
        pixels[pixel] = True
        second.mask.set(plane, pixels)
    lower = Box.from_shape((50, NX), start=third.bbox.start)
    third = dataclasses.replace(
        third, image=third.image[:50], variance=third.variance[:50], mask=third.mask[lower], bbox=lower
    )
    planes = InputPlanes(first.patch)
    for warp in (first, second, third):
        planes.add(warp, BAD_PLANES)
    return [first, second, third], planes


@pytest.fixture
def restoration() -> SimpleNamespace:
    """What a restoration of these warps returns, with random pixels; cell (1, 2) is never seen."""
    rng = np.random.default_rng(4)
    n_visits = np.full((NY, NX), 3, dtype=np.int16)
    n_visits[50:] = 2
    n_visits[7, 8] = 0
    n_visits[cell(1, 2)] = 0
    masked, clipped, prior_carried = (np.zeros((NY, NX), dtype=bool) for _ in range(3))
    masked[1, 2] = masked[3, 4] = masked[11, 12] = True
    clipped[5, 6] = True
    prior_carried[9, 10:13] = True
    residual = rng.normal(size=(NY, NX)).astype(np.float32)
    residual[n_visits == 0] = np.nan
    variance = rng.uniform(1.0, 2.0, size=(2, NY, NX)).astype(np.float32)
    residual_psf = np.broadcast_to(np.eye(9), (2, 3, 9, 9)) / 9.0
    residual_psf = np.where(np.arange(6).reshape(2, 3, 1, 1) == 5, np.nan, residual_psf)
    overlap = np.ones((3, 2, 3))
    overlap[2, 1] = 0.25
    weight = rng.uniform(0.5, 1.0, size=(3, 2, 3))
    weight[2, 1] = 0.0
    weight[:, 1, 2] = 0.0
    good_fraction = overlap.copy()
    good_fraction[1, 0, 0] -= 2.0 / 1440.0
    good_fraction[:, 1, 2] = 0.0
    return SimpleNamespace(
        image=rng.normal(size=(NY, NX)).astype(np.float32),
        variance=variance[0],
        target_psf=np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),
        target_sigma=0.8,
        residual=residual,
        residual_variance=variance[1],
        residual_psf=residual_psf,
        noise_realizations=[rng.normal(size=(NY, NX)).astype(np.float32)],
        residual_noise_realizations=[rng.normal(size=(NY, NX)).astype(np.float32)],
        n_visits=n_visits,
        n_good=n_visits.copy(),
        masked=masked,
        clipped=clipped,
        prior_carried=prior_carried,
        cell_weight=weight,
        cell_good_fraction=good_fraction,
        cell_overlap=overlap,
    )


@pytest.fixture
def coadds(
    restoration: Any, inputs: tuple[list[Warp], InputPlanes], scene: Scene, tmp_path: Path
) -> tuple[CellCoadd, CellCoadd]:
    """The two coadds, written and read back."""
    warps, planes = inputs
    made = make_coadds(
        restoration,
        [warp.info for warp in warps],
        planes,
        sky_projection=scene.sky_projection,
        band="r",
        min_visits=3,
        metadata={"DEEPPRIOR VERSION": "0.1", "DEEPPRIOR SEED": 3, "DEEPPRIOR TARGET_FWHM": 2.5},
    )
    result = []
    for name, coadd in zip(("coadd.fits", "residual.fits"), made, strict=True):
        coadd.write(str(tmp_path / name))
        result.append(CellCoadd.read(str(tmp_path / name)))
    return result[0], result[1]


def where(coadd: CellCoadd, plane: str) -> set[tuple[int, int]]:
    """Return the pixels in which a plane is set, without those of the missing cell."""
    found = coadd.mask.get(plane)
    found[cell(1, 2)] = False
    return {(y, x) for y, x in np.argwhere(found).tolist()}


def test_both_coadds_cover_the_patch(coadds: tuple[CellCoadd, CellCoadd], scene: Scene) -> None:
    for coadd in coadds:
        assert coadd.bbox == scene.patch.outer_bbox
        assert coadd.patch == scene.patch
        assert coadd.band == "r"
        assert coadd.unit == u.nJy
        assert coadd.variance.unit == u.nJy**2
        assert coadd.mask.schema == MASK_SCHEMA
        assert coadd.bounds.missing == {CellIJ(i=1, j=2)}
        assert coadd.metadata["DEEPPRIOR VERSION"] == "0.1"
        assert coadd.metadata["DEEPPRIOR SEED"] == 3
        assert coadd.metadata["DEEPPRIOR TARGET_FWHM"] == 2.5
        sky = coadd.sky_projection.pixel_to_sky(x=15650.0, y=14250.0)
        assert sky.separation(scene.sky_projection.pixel_to_sky(x=15650.0, y=14250.0)).arcsec < 1e-6


def test_pixels(coadds: tuple[CellCoadd, CellCoadd], restoration: Any) -> None:
    coadd, residual = coadds
    missing = np.zeros((NY, NX), dtype=bool)
    missing[cell(1, 2)] = True
    np.testing.assert_array_equal(coadd.image.array, np.where(missing, np.nan, restoration.image))
    np.testing.assert_array_equal(residual.image.array, np.where(missing, np.nan, restoration.residual))
    unseen = restoration.n_visits == 0
    np.testing.assert_array_equal(coadd.variance.array, np.where(unseen, np.nan, restoration.variance))
    np.testing.assert_array_equal(
        residual.variance.array, np.where(unseen, np.nan, restoration.residual_variance)
    )
    (noise,) = coadd.noise_realizations
    np.testing.assert_array_equal(noise.array, np.where(missing, np.nan, restoration.noise_realizations[0]))
    (noise,) = residual.noise_realizations
    drawn = restoration.residual_noise_realizations[0]
    np.testing.assert_array_equal(noise.array, np.where(missing, np.nan, drawn))
    # A pixel without data carries the model, but no variance.
    assert coadd.image.array[7, 8] == restoration.image[7, 8]
    assert np.isnan(coadd.variance.array[7, 8])
    assert np.isnan(residual.image.array[7, 8])


def test_mask_planes(coadds: tuple[CellCoadd, CellCoadd]) -> None:
    for coadd in coadds:
        assert where(coadd, "NO_DATA") == {(7, 8)}
        assert coadd.mask.get("NO_DATA")[cell(1, 2)].all()
        assert where(coadd, "SAT") == {(1, 2)}
        assert where(coadd, "CR") == {(1, 2), (3, 4)}
        assert where(coadd, "INTRP") == set()
        assert where(coadd, "CLIPPED") == {(5, 6)}
        assert where(coadd, "REJECTED") == {(1, 2), (3, 4), (5, 6)}
        assert where(coadd, "INEXACT_PSF") == {(1, 2), (3, 4), (5, 6), (11, 12)}
        assert where(coadd, "PRIOR_CARRIED") == {(7, 8), (9, 10), (9, 11), (9, 12)}
        assert where(coadd, "DETECTED") == set()
        few = coadd.mask.get("FEW_VISITS")
        assert few[cell(1, 2)].all()
        assert few.sum() == 40 * 36
        edge = coadd.mask.get("SENSOR_EDGE")
        assert edge[40:, :72].all()
        assert not edge[:40].any()
        assert not edge[cell(1, 2)].any()


def test_mask_fractions(coadds: tuple[CellCoadd, CellCoadd]) -> None:
    pixels = {"rejected": [(1, 2), (3, 4)], "sat": [(1, 2)], "cr": [(1, 2), (3, 4)], "intrp": []}
    for coadd in coadds:
        assert set(coadd.mask_fractions) == set(pixels)
        for name, flagged in pixels.items():
            expected = np.zeros((NY, NX), dtype=np.float32)
            for pixel in flagged:
                expected[pixel] = 1.0 / 3.0
            np.testing.assert_allclose(coadd.mask_fractions[name].array, expected, rtol=1e-6)


def test_psf_of_every_cell(coadds: tuple[CellCoadd, CellCoadd], restoration: Any) -> None:
    coadd, residual = coadds
    for i, j in np.ndindex(2, 3):
        if (i, j) != (1, 2):
            np.testing.assert_array_equal(coadd.psf[CellIJ(i=i, j=j)].array, restoration.target_psf)
            np.testing.assert_array_equal(residual.psf[CellIJ(i=i, j=j)].array, np.eye(9) / 9.0)


def test_provenance(
    coadds: tuple[CellCoadd, CellCoadd], inputs: tuple[list[Warp], InputPlanes], restoration: Any
) -> None:
    warps, _ = inputs
    coadd, residual = (c.provenance for c in coadds)
    for provenance in (coadd, residual):
        assert list(provenance.inputs["visit"]) == [warp.visit for warp in warps]
        assert [row["polygon"].bbox for row in provenance.inputs] == [warp.bbox for warp in warps]
    in_coadd = {(r["visit"], r["cell_i"], r["cell_j"]): r for r in coadd.contributions}
    in_residual = {(r["visit"], r["cell_i"], r["cell_j"]) for r in residual.contributions}
    third = warps[2].visit
    # The visit that ends in the upper cells is in the restored image there, but not in the residual coadd.
    assert set(in_coadd) - in_residual == {(third, 1, 0), (third, 1, 1)}
    assert len(in_coadd) == 15
    row = in_coadd[warps[1].visit, 0, 0]
    assert row["weight"] == restoration.cell_weight[1, 0, 0]
    assert row["unmasked_fraction"] == pytest.approx(1.0 - 2.0 / 1440.0)
    assert row["overlap_fraction"] == 1.0
    assert row["psf_shape_xx"] == pytest.approx(warps[1].info.psf_shapes[0, 0, 0])
    assert not row["psf_shape_flag"]
    row = in_coadd[third, 1, 0]
    assert (row["overlap_fraction"], row["weight"]) == (0.25, 0.0)
    assert not row["overlaps_center"]


def test_provenance_of_a_visit_that_ends_before_its_detector_and_of_one_that_is_not_used(
    restoration: Any, inputs: tuple[list[Warp], InputPlanes], scene: Scene
) -> None:
    warps, planes = inputs
    infos = [warp.info for warp in warps]
    (detector,) = infos[2].detectors
    infos[2] = dataclasses.replace(infos[2], detectors={detector: Polygon.from_box(scene.patch.outer_bbox)})
    restoration.cell_good_fraction[0] = restoration.cell_weight[0] = 0.0
    for coadd in make_coadds(restoration, infos, planes, sky_projection=scene.sky_projection, band="r"):
        assert list(coadd.provenance.inputs["visit"]) == [info.visit for info in infos[1:]]
        rows = [row for row in coadd.provenance.contributions if row["visit"] == infos[2].visit]
        assert [row["overlaps_center"] for row in rows] == [row["cell_i"] == 0 for row in rows]
    assert {row["visit"] for row in coadd.provenance.contributions} == {info.visit for info in infos[1:]}


def test_subimages_can_be_cut_out(coadds: tuple[CellCoadd, CellCoadd]) -> None:
    start = coadds[0].bbox.start
    cutout = coadds[0][Box.from_shape((30, 20), start=(start.y + 45, start.x + 5))]
    assert set(cutout.provenance.contributions["cell_i"]) == {1}
    assert len(cutout.provenance.inputs) == 3


def test_a_cell_that_only_the_border_of_a_visit_reaches(
    restoration: Any, inputs: tuple[list[Warp], InputPlanes], scene: Scene
) -> None:
    # The restored image has the visit, pixel by pixel; the residual coadd has no PSF and so no cell there.
    restoration.n_good[40:50, 72:] = 1
    restoration.cell_good_fraction[2, 1, 2] = 0.25
    restoration.residual[40:50, 72:] = 1.0
    warps, planes = inputs
    infos = [
        dataclasses.replace(w.info, aperture_corrections={"base_PsfFlux_instFlux": np.full((2, 3), 1.0 + t)})
        for t, w in enumerate(warps)
    ]
    coadd, residual = make_coadds(restoration, infos, planes, sky_projection=scene.sky_projection, band="r")
    assert not coadd.bounds.missing
    assert coadd.aperture_corrections["base_PsfFlux_instFlux"].value_in_cell(CellIJ(i=1, j=2)) == 3.0
    np.testing.assert_array_equal(coadd.mask.get("NO_DATA")[40:, 72:].all(axis=1), [False] * 10 + [True] * 30)
    assert residual.bounds.missing == {CellIJ(i=1, j=2)}
    assert np.isnan(residual.image.array[cell(1, 2)]).all()
    assert residual.mask.get("NO_DATA")[cell(1, 2)].all()


def test_planes_of_other_names_and_missing_psf(warps: list[Warp]) -> None:
    warp = clean(warps[0])
    names = ("SATURATED", "COSMIC_RAY", "INTERPOLATED", "DETECTED")
    mask = Mask(schema=MaskSchema([MaskPlane(name, name) for name in names]), bbox=warp.bbox)
    for x, name in enumerate(names):
        pixels = np.zeros((NY, NX), dtype=bool)
        pixels[2, [x, 50]] = True
        mask.set(name, pixels)
    stamps = warp.psf_stamps.copy()
    stamps[0, 1] = np.nan
    image = warp.image.copy()
    image[4, 5], image[4, 40] = np.nan, np.nan
    warp = dataclasses.replace(warp, mask=mask, image=image, psf=make_cell_psf(stamps, warp.patch.cells))
    planes = InputPlanes(warp.patch)
    planes.add(warp, ["SATURATED"])
    found = {name: np.argwhere(pixels).tolist() for name, pixels in planes.planes.items()}
    # The visit has no PSF in the cell of (4, 40) and (2, 50): it is not rejected there, it is not there.
    assert found == {"SAT": [[2, 0]], "CR": [[2, 1]], "INTRP": [[2, 2]], "REJECTED": [[2, 0], [4, 5]]}
    assert np.isnan(planes.fractions["rejected"][cell(0, 1)]).all()
    assert planes.fractions["rejected"][4, 5] == 1.0


def test_arrays_of_another_patch_or_other_visits_are_refused(
    restoration: Any, inputs: tuple[list[Warp], InputPlanes], scene: Scene
) -> None:
    warps, planes = inputs
    infos = [warp.info for warp in warps]
    with pytest.raises(ValueError, match="there are 2 visits and"):
        make_coadds(restoration, infos[:2], planes, sky_projection=scene.sky_projection, band="r")
    restoration.image = restoration.image.T
    with pytest.raises(ValueError, match=r"shape \(108, 80\), its patch \(80, 108\)"):
        make_coadds(restoration, infos, planes, sky_projection=scene.sky_projection, band="r")


def test_aperture_corrections(restoration: Any, inputs: tuple[list[Warp], InputPlanes], scene: Scene) -> None:
    """The residual has the averages of the visits, the restored image the correction of the PSF flux."""
    warps, planes = inputs
    psf, model = "base_PsfFlux_instFlux", "modelfit_CModel_instFlux"
    infos = [
        dataclasses.replace(
            warp.info,
            aperture_corrections={psf: np.full((2, 3), 1.0 + t), model: np.full((2, 3), 5.0 + t)},
        )
        for t, warp in enumerate(warps)
    ]
    coadd, residual = make_coadds(restoration, infos, planes, sky_projection=scene.sky_projection, band="r")
    weight = restoration.cell_weight
    mean = np.sum(weight * np.arange(3.0)[:, np.newaxis, np.newaxis], axis=0)[1, 0] / weight.sum(axis=0)[1, 0]
    first = CellIJ(i=1, j=0)
    assert residual.aperture_corrections[psf].value_in_cell(first) == pytest.approx(1.0 + mean)
    assert residual.aperture_corrections[model].value_in_cell(first) == pytest.approx(5.0 + mean)
    for name in (psf, model):
        assert coadd.aperture_corrections[name].value_in_cell(first) == pytest.approx(1.0 + mean)
        assert CellIJ(i=1, j=2) in coadd.aperture_corrections[name].bounds.missing
