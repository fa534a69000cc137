# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What is accepted of warp files, as users of ``deepprior ingest`` see it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner, Result

from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.ingest import DATASET_TYPE, DEFAULT_RUN
from lsst.coadd.deepprior.simulate import SceneConfig, write_scene
from lsst.coadd.deepprior.warp_files import read_warp_file
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler, DatasetRef, DatasetType
from lsst.images import Box
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

# The files of the fixture hold 2x3 cells of 32 pixels: 64 rows and 96 columns.
NY, NX = 64, 96


def ingest(repo: Path, *files: Path, options: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(main, ["ingest", str(repo), *map(str, files), *options])


def refs(repo: Path, run: str = DEFAULT_RUN) -> list[DatasetRef]:
    with Butler.from_config(str(repo)) as butler:
        return butler.query_datasets(DATASET_TYPE, run, find_first=False, explain=False)


def stored(repo: Path, **data_id: str | int) -> Warp:
    with Butler.from_config(str(repo), collections=DEFAULT_RUN) as butler:
        return Warp.from_cell_coadd(butler.get(DATASET_TYPE, data_id))


def edited(source: Path, target: Path, edit: Callable[[fits.HDUList], object]) -> Path:
    """Copy a warp file with a change."""
    with fits.open(source) as hdus:
        edit(hdus)
        hdus.writeto(target)
    return target


def on_sky(warp: Warp, x: float, y: float) -> UnitVector3d:
    sky = warp.sky_projection.pixel_to_sky(x=x, y=y)
    return UnitVector3d(LonLat.fromRadians(sky.ra.rad, sky.dec.rad))


def one_line(result: Result) -> str:
    """Return the message of a refused call, after checking that it is one line and the last one."""
    assert result.exit_code == 1, result.output
    *_, message = result.output.strip().splitlines()
    assert message.startswith("Error: "), result.output
    assert "Traceback" not in result.output
    return message


def header(hdu: str, **cards: object) -> Callable[[fits.HDUList], object]:
    return lambda hdus: hdus[hdu].header.update(cards)


def without(hdu: str, *keywords: str) -> Callable[[fits.HDUList], object]:
    def edit(hdus: fits.HDUList) -> None:
        for keyword in keywords:
            del hdus[hdu].header[keyword]

    return edit


def data(hdu: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[fits.HDUList], object]:
    def edit(hdus: fits.HDUList) -> None:
        hdus[hdu].data = change(hdus[hdu].data)

    return edit


def added(name: str, array: np.ndarray, **cards: object) -> Callable[[fits.HDUList], object]:
    return lambda hdus: hdus.append(fits.ImageHDU(array, fits.Header(cards), name=name))


def with_corner(psf: np.ndarray, value: float) -> np.ndarray:
    psf[0, 0] = value
    return psf


def many(psf: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(psf, (*shape, *psf.shape)).copy()


@pytest.fixture(scope="module")
def accepted(warp_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of files with every kind of pixel that must be accepted as no data."""
    tmp_path = tmp_path_factory.mktemp("accepted")

    def flux(a: np.ndarray) -> np.ndarray:
        a[3, 4:7] = [np.nan, np.inf, -np.inf]
        return a

    def variance(a: np.ndarray) -> np.ndarray:
        a[5, 10:15] = [np.nan, 0.0, -1.0, np.inf, -np.inf]
        return a

    def no_data(hdus: fits.HDUList) -> None:
        hdus["IMAGE"].data = flux(hdus["IMAGE"].data)
        hdus["VARIANCE"].data = variance(hdus["VARIANCE"].data)
        hdus["MASK"].data[:] = 0

    def all_masked(hdus: fits.HDUList) -> None:
        hdus["MASK"].data[:] = 1 << hdus["MASK"].header["MP_BAD"]

    def per_cell(hdus: fits.HDUList) -> None:
        stamps = many(hdus["PSF"].data[3:-3, 3:-3], (2, 3))
        stamps[0, 1, 4, 4] *= 2.0
        stamps[1, 2] = np.nan
        hdus["PSF"].data = stamps
        hdus["MASK"].data[:] = 0
        hdus.append(fits.ImageHDU(np.arange(NY * NX, dtype=np.float32).reshape(NY, NX), name="NOISE"))

    files = [
        edited(warp_files[0], tmp_path / "no_data.fits", no_data),
        edited(warp_files[1], tmp_path / "all_masked.fits", all_masked),
        edited(full_coverage(warp_files[3:6]), tmp_path / "per_cell.fits", per_cell),
    ]
    repo = tmp_path / "repo"
    result = ingest(repo, *files)
    assert result.exit_code == 0, result.output
    assert "3 warps of 1 patch ingested" in result.output
    return repo


def full_coverage(files: list[Path]) -> Path:
    """Return the first of some files that covers its patch as a whole."""
    return next(file for file in files if fits.getdata(file, "IMAGE").shape == (NY, NX))


def test_bad_pixels_are_no_data(accepted: Path) -> None:
    warp = stored(accepted, instrument="DeepPriorSim", visit=3000, skymap="deepprior_sim", tract=9, patch=0)
    unusable = {(3, 4), (3, 5), (3, 6), *((5, x) for x in range(10, 15))}
    assert {tuple(index) for index in np.argwhere(warp.unusable(["BAD", "SAT", "CR"])).tolist()} == unusable
    assert np.isnan(warp.image[3, 4:7]).all()
    assert not np.isinf(warp.variance).any()


def test_an_all_masked_file_is_kept_without_good_pixels(accepted: Path) -> None:
    warp = stored(accepted, instrument="DeepPriorSim", visit=3001, skymap="deepprior_sim", tract=9, patch=0)
    assert warp.mask.get("BAD").all()
    assert not warp.observation(["BAD"]).good.any()


def test_psf_stamps_of_cells_and_noise_are_kept(accepted: Path, warp_files: list[Path]) -> None:
    file = full_coverage(warp_files[3:6])
    visit = fits.getval(file, "VISIT")
    warp = stored(accepted, instrument="DeepPriorSim", visit=visit, skymap="deepprior_sim", tract=9, patch=0)
    np.testing.assert_array_equal(warp.has_psf, [[True, True, True], [True, True, False]])
    stamp = fits.getdata(file, "PSF")[3:-3, 3:-3].astype(float)
    np.testing.assert_allclose(warp.psf_stamps[1, 0], stamp / stamp.sum(), rtol=1e-6)
    stamp[4, 4] *= 2.0
    np.testing.assert_allclose(warp.psf_stamps[0, 1], stamp / stamp.sum(), rtol=1e-6)
    np.testing.assert_array_equal(warp.noise[0], np.arange(NY * NX).reshape(NY, NX))
    # Cell (1, 2) has no PSF, so its pixels are not good.
    np.testing.assert_array_equal(warp.unusable([])[32:, 64:], True)
    assert not warp.unusable([])[:32].any()


def test_content_of_several_patches_and_bands(repo: Path, warp_files: list[Path]) -> None:
    assert len(refs(repo)) == len(warp_files) == 12
    for file in warp_files:
        with fits.open(file) as hdus:
            primary = hdus["PRIMARY"].header
            warp = stored(
                repo,
                instrument=primary["INSTRUME"],
                visit=primary["VISIT"],
                skymap=primary["SKYMAP"],
                tract=primary["TRACT"],
                patch=primary["PATCH"],
            )
            np.testing.assert_array_equal(warp.image, hdus["IMAGE"].data)
            np.testing.assert_array_equal(warp.variance, hdus["VARIANCE"].data)
            for plane in ("BAD", "SAT", "CR", "NO_DATA"):
                expected = (hdus["MASK"].data >> hdus["MASK"].header[f"MP_{plane}"]) & 1
                np.testing.assert_array_equal(warp.mask.get(plane), expected)
            start = (-hdus["IMAGE"].header["LTV2"], -hdus["IMAGE"].header["LTV1"])
            assert warp.bbox == Box.from_shape(hdus["IMAGE"].shape, start=start)
            assert warp.patch.cells.bbox.start == (14200, 15600 + 96 * primary["PATCH"])
            assert tuple(warp.patch.cells.cell_shape) == (32, 32)
            assert (warp.band, warp.physical_filter) == (primary["BAND"], primary["FILTER"])


def test_dimension_records(repo: Path) -> None:
    with Butler.from_config(str(repo)) as butler:
        (skymap,) = butler.query_dimension_records("skymap")
        (tract,) = butler.query_dimension_records("tract")
        patches = butler.query_dimension_records("patch", order_by="patch")
        visits = butler.query_dimension_records("visit", order_by="visit")
        filters = butler.query_dimension_records("physical_filter")
        warp = Warp.from_cell_coadd(butler.get(refs(repo)[0]))
    # A saved quantum graph accepts no NULL in any of these.
    assert skymap.name == "deepprior_sim"
    assert len(skymap.hash) == 20
    assert [(patch.cell_y, patch.cell_x) for patch in patches] == [(14200 // 64, 162), (14200 // 64, 163)]
    assert [(visit.id, visit.name) for visit in visits] == [
        (number, str(number)) for band in (3000, 4000) for number in range(band, band + 3)
    ]
    assert visits[0].physical_filter == "r_sim"
    assert visits[0].exposure_time == 30.0
    assert visits[0].timespan.begin.tai.mjd == pytest.approx(61041.22 - 15.0 / 86400.0, abs=1e-7)
    assert visits[0].day_obs == 20251231
    assert {record.name: record.band for record in filters} == {"r_sim": "r", "i_sim": "i"}

    inside, outside = [15600.0, 15695.0], [15599.0, 15696.0]
    assert all(patches[0].region.contains(on_sky(warp, x, 14263.0)) for x in inside)
    assert not any(patches[0].region.contains(on_sky(warp, x, 14263.0)) for x in outside)
    assert all(tract.region.contains(on_sky(warp, x, 14263.0)) for x in (15600.0, 15791.0))
    assert not any(tract.region.contains(on_sky(warp, 15700.0, y)) for y in (14199.0, 14264.0))


def test_a_second_run_skips_and_more_files_are_added(warp_files: list[Path], tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert "3 warps of 1 patch ingested" in ingest(repo, *warp_files[:3]).output
    first = {ref.id for ref in refs(repo)}
    result = ingest(repo, *warp_files[:3])
    assert result.exit_code == 0
    assert "0 warps of 1 patch ingested" in result.output
    assert "3 were there already" in result.output
    assert {ref.id for ref in refs(repo)} == first
    result = ingest(repo, *warp_files)
    assert "9 warps of 2 patches ingested" in result.output
    assert "3 were there already" in result.output
    assert len(refs(repo)) == 12
    # The visits of the first call have grown into the second patch.
    with Butler.from_config(str(repo)) as butler:
        (visit,) = butler.query_dimension_records("visit", visit=3001, instrument="DeepPriorSim")
        warps = [Warp.from_cell_coadd(butler.get(ref)) for ref in refs(repo) if ref.dataId["visit"] == 3001]
        assert {warp.patch.id for warp in warps} == {0, 1}
        for warp in warps:
            assert visit.region.contains(on_sky(warp, warp.bbox.x.center, warp.bbox.y.center))
        (tract,) = butler.query_dimension_records("tract")
        assert all(tract.region.contains(p.region) for p in butler.query_dimension_records("patch"))


@pytest.mark.parametrize(
    "visit", [{"name": "MC_O_20251231_000123"}, {"name": "3000", "target_name": "COSMOS"}]
)
def test_regions_that_the_repository_had_before_stay(
    visit: dict[str, str], warp_files: list[Path], tmp_path: Path
) -> None:
    """Those of a visit that was defined from raw data, and of the tract of a registered sky map."""
    repo = tmp_path / "repo"
    Butler.makeRepo(str(repo))
    corners = ((10.0, 10.0), (11.0, 10.0), (10.0, 11.0))
    region = ConvexPolygon([UnitVector3d(LonLat.fromDegrees(*corner)) for corner in corners])
    instrument = {"instrument": "DeepPriorSim"}
    of_visit = {"id": 3000, "physical_filter": "r_sim", "day_obs": 20251231, "region": region}
    with Butler.from_config(str(repo), writeable=True) as butler:
        for element, row in (
            ("instrument", {"name": "DeepPriorSim"}),
            ("physical_filter", instrument | {"name": "r_sim", "band": "r"}),
            ("day_obs", instrument | {"id": 20251231}),
            ("visit", instrument | of_visit | visit),
            ("skymap", {"name": "deepprior_sim", "hash": b"of its definition"}),
            ("tract", {"skymap": "deepprior_sim", "id": 9, "region": region}),
        ):
            butler.registry.insertDimensionData(element, row)
    result = ingest(repo, warp_files[0])
    assert result.exit_code == 0, result.output
    with Butler.from_config(str(repo)) as butler:
        for element in ("visit", "tract"):
            (record,) = butler.query_dimension_records(element)
            assert record.region == region


@pytest.mark.parametrize(
    "edit",
    [
        data("IMAGE", lambda a: a + (a == a[1, 2])),
        data("VARIANCE", lambda a: a * 1.0001),
        data("MASK", lambda a: a ^ 1),
        data("PSF", lambda a: with_corner(a, 0.001)),
        added("NOISE", np.zeros((NY, NX))),
    ],
)
def test_other_content_for_a_stored_visit_is_refused(
    edit: Callable[[fits.HDUList], object], warp_files: list[Path], tmp_path: Path
) -> None:
    source = full_coverage(warp_files[:3])
    repo = tmp_path / "repo"
    assert ingest(repo, source).exit_code == 0
    bad = edited(source, tmp_path / "bad.fits", edit)
    message = one_line(ingest(repo, bad, warp_files[3]))
    assert str(bad) in message
    assert "holds another warp of DeepPriorSim visit" in message
    assert len(refs(repo)) == 1
    # Into another collection it may go.
    assert ingest(repo, bad, options=("--run", "u/someone/warps")).exit_code == 0
    assert len(refs(repo, "u/someone/warps")) == 1


def bare(
    target: Path, visit: int, x0: int | None, y0: int | None, shape: tuple[int, int], **cards: object
) -> Path:
    """Write a file with the keywords that must be there, and none else."""
    primary = fits.PrimaryHDU()
    primary.header.update(INSTRUME="Cam", VISIT=visit, BAND="i", FILTER="i one", **cards)
    image_header = fits.Header()
    image_header.update(
        CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=30.0, CRVAL2=-20.0, CD1_1=-7e-5, CD2_2=7e-5, BUNIT="nJy"
    )
    image_header["CRPIX1"] = 101.0 - (x0 or 0)
    image_header["CRPIX2"] = 201.0 - (y0 or 0)
    if x0 is not None:
        image_header["LTV1"] = -x0
    if y0 is not None:
        image_header["LTV2"] = -y0
    psf = np.zeros((5, 5), dtype=np.float32)
    psf[1:4, 1:4] = 7.0
    pixels = np.full(shape, float(visit), dtype=np.float32)
    fits.HDUList(
        [
            primary,
            fits.ImageHDU(pixels, image_header, name="IMAGE"),
            fits.ImageHDU(np.zeros(shape, dtype=np.int32), name="MASK"),
            fits.ImageHDU(np.ones(shape, dtype=np.float32), name="VARIANCE"),
            fits.ImageHDU(psf, name="PSF"),
        ]
    ).writeto(target)
    return target


def test_defaults_of_files_with_no_more_than_they_must_have(tmp_path: Path) -> None:
    files = [
        bare(tmp_path / "a.fits", 1, None, None, (120, 130)),
        bare(tmp_path / "b.fits", 2, -20, 10, (150, 40)),
        bare(tmp_path / "c.fits", 3, 100, 100, (30, 60)),
    ]
    repo = tmp_path / "repo"
    assert ingest(repo, *files).exit_code == 0
    boxes = {1: Box.factory[0:120, 0:130], 2: Box.factory[10:160, -20:20], 3: Box.factory[100:130, 100:160]}
    for visit, box in boxes.items():
        warp = stored(repo, instrument="Cam", visit=visit, skymap="deepprior", tract=0, patch=0)
        assert warp.bbox == box
        assert np.all(warp.image == visit)
        # The union box from (0, -20) to (160, 160) is cut into cells of 150 pixels.
        assert warp.patch.cells.bbox == Box.factory[0:300, -20:280]
        assert tuple(warp.patch.cells.cell_shape) == (150, 150)
        assert warp.patch.inner_bbox == warp.patch.outer_bbox
        assert warp.day_obs == 19700101
        np.testing.assert_allclose(warp.psf_stamps[warp.has_psf].sum(axis=(1, 2)), 1.0)
    # Only the cells that a file reaches have a PSF.
    np.testing.assert_array_equal(warp.has_psf, [[True, True], [False, False]])
    sky = warp.sky_projection.pixel_to_sky(x=100.0, y=200.0)
    assert (sky.ra.deg, sky.dec.deg) == pytest.approx((30.0, -20.0), abs=1e-10)
    # The grid of the patch is now settled: what lies on it may be added, what leaves it may not.
    assert ingest(repo, bare(tmp_path / "d.fits", 4, 270, 290, (10, 10))).exit_code == 0
    bad = bare(tmp_path / "e.fits", 5, 270, 290, (11, 10))
    message = one_line(ingest(repo, bad))
    assert str(bad) in message
    assert "leave patch 0 of tract 0 in skymap deepprior" in message
    assert len(refs(repo)) == 4


@pytest.mark.parametrize("name", ["", " ", 65 * "s"])
def test_a_skymap_that_cannot_be_so_called(tmp_path: Path, name: str) -> None:
    repo = tmp_path / "repo"
    file = bare(tmp_path / "a.fits", 1, 0, 0, (20, 30))
    assert f"{name!r} is no name of a skymap" in one_line(ingest(repo, file, options=("--skymap", name)))
    assert not repo.exists()


def test_grid_of_a_stored_tract_binds_its_other_patches(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, bare(tmp_path / "a.fits", 1, 0, 0, (20, 30), PATCH=4)).exit_code == 0
    bad = edited(
        bare(tmp_path / "b.fits", 2, 500, 0, (20, 30), PATCH=5),
        tmp_path / "bad.fits",
        header("IMAGE", CRVAL2=-20.0001),
    )
    assert "pixel grid" in one_line(ingest(repo, bad))
    assert ingest(repo, tmp_path / "b.fits").exit_code == 0
    # Another skymap is another sky.
    assert ingest(repo, bad, options=("--skymap", "elsewhere")).exit_code == 0
    grids = {
        ref.dataId["patch"]: stored(repo, **ref.dataId.required).patch.cells.bbox.start
        for ref in refs(repo)
        if ref.dataId["skymap"] == "deepprior"
    }
    assert grids == {4: (0, 0), 5: (0, 500)}


def test_files_without_cell_grid_take_that_of_their_neighbours(tmp_path: Path) -> None:
    grid = {"CELLSZ": 20, "PATX0": -10, "PATY0": 0, "PATNX": 50, "PATNY": 40}
    files = [
        bare(tmp_path / "a.fits", 1, 0, 0, (20, 30)),
        bare(tmp_path / "b.fits", 2, 5, 10, (20, 30), **grid),
    ]
    repo = tmp_path / "repo"
    assert ingest(repo, *files).exit_code == 0
    for visit in (1, 2):
        warp = stored(repo, instrument="Cam", visit=visit, skymap="deepprior", tract=0, patch=0)
        # 50 columns are two and a half cells.
        assert warp.patch.cells.bbox == Box.factory[0:40, -10:50]


@pytest.mark.parametrize("mjd", [41000.0, 88000.0])
def test_exposures_of_the_first_and_last_years_are_held(mjd: float, tmp_path: Path) -> None:
    file = bare(tmp_path / "a.fits", 2**63 - 1, 0, 0, (20, 30), MJD=mjd, EXPTIME=1e7)
    result = ingest(tmp_path / "repo", file)
    assert result.exit_code == 0, result.output
    with Butler.from_config(str(tmp_path / "repo")) as butler:
        (visit,) = butler.query_dimension_records("visit")
    assert (visit.timespan.end - visit.timespan.begin).sec == pytest.approx(1e7)


def test_two_instruments_may_use_the_same_visit_number(tmp_path: Path) -> None:
    files = [
        bare(tmp_path / "a.fits", 1, 0, 0, (20, 30)),
        edited(
            bare(tmp_path / "b.fits", 1, 0, 0, (20, 30)),
            tmp_path / "c.fits",
            header("PRIMARY", INSTRUME="OtherCam"),
        ),
    ]
    repo = tmp_path / "repo"
    assert ingest(repo, *files).exit_code == 0
    assert {ref.dataId["instrument"] for ref in refs(repo)} == {"Cam", "OtherCam"}


def test_a_repository_that_cannot_be_written(warp_files: list[Path], tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0]).exit_code == 0
    # What stands where the next dataset is to go cannot be overwritten, whoever runs the test.
    night = read_warp_file(warp_files[1]).header.day_obs
    (repo / DEFAULT_RUN / DATASET_TYPE / "9" / "0" / str(night)).write_text("in the way")
    message = one_line(ingest(repo, warp_files[1]))
    assert str(repo) in message
    assert "cannot be read and written" in message
    assert len(refs(repo)) == 1


def test_a_dataset_type_or_collection_of_another_kind(warp_files: list[Path], tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0]).exit_code == 0
    with Butler.from_config(str(repo), writeable=True) as butler:
        butler.registry.registerCollection("a/tag")
    message = one_line(ingest(repo, warp_files[1], options=("--run", "a/tag")))
    assert "a/tag" in message
    assert len(refs(repo)) == 1
    taken = tmp_path / "taken"
    Butler.makeRepo(str(taken))
    with Butler.from_config(str(taken), writeable=True) as butler:
        other = DatasetType(DATASET_TYPE, ["visit"], "CellCoadd", universe=butler.dimensions)
        butler.registry.registerDatasetType(other)
    message = one_line(ingest(taken, warp_files[0]))
    assert f"{taken} cannot take warps" in message
    assert DATASET_TYPE in message


def test_the_installed_command(warp_files: list[Path], tmp_path: Path) -> None:
    def run(*files: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lsst.coadd.deepprior.cli", "ingest", str(tmp_path / "repo")]
        return subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)

    bad = edited(warp_files[1], tmp_path / "bad.fits", without("PRIMARY", "VISIT"))
    result = run(warp_files[0], bad)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        f"Error: {bad}: the keyword VISIT is missing from the primary header."
    )
    assert not (tmp_path / "repo").exists()
    result = run(warp_files[0], warp_files[2])
    assert result.returncode == 0, result.stderr
    assert "2 warps of 1 patch ingested into deepprior/warps" in result.stdout
    assert "writing: 2 of 2 files" in result.stderr
    assert len(refs(tmp_path / "repo")) == 2


def test_a_file_of_another_psf_size_may_join(warp_files: list[Path], tmp_path: Path) -> None:
    other = write_scene(
        tmp_path / "other",
        SceneConfig(seed=6, n_cells=(2, 3), cell_shape=(32, 32), n_visits=4, psf_size=11),
        ["z"],
    )
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0], *other).exit_code == 0
    sizes = {stored(repo, **ref.dataId.required).psf_stamps.shape[-1] for ref in refs(repo)}
    assert sizes == {11, 15}
