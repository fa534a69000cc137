# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps in a repository that are poor, wrong or damaged; each case is a patch beside a good one.

All that `deepprior ingest` refuses is tested with ingest; here is one such file, and what it would refuse is
put into the repository directly.
"""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner, Result
from run_pipetask import PIPELINE, QUICK, pipetask

from lsst.coadd.deepprior.cells import make_cell_psf
from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.ingest import ingest_warp_files
from lsst.coadd.deepprior.simulate import Scene, SceneConfig, write_scene
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler
from lsst.images import Box, Image
from lsst.images.cells import CellCoadd

GOOD, ALL_NAN, ALL_MASKED, NOTHING, VARIANCE, PSF_SIZES, ONE_IN_CELL, ONE_VISIT = range(8)
PSF_NAN, UNIT, TRUNCATED, UNWRITABLE = range(8, 12)

N_VISITS = 3
TRAINED_STEPS = 240
"""Steps of maximum likelihood that the network of the package was trained with."""
INFINITE = np.s_[12:16, 20:23]
BLOCKS = {"zero": np.s_[3:8, 40:44], "negative": np.s_[10:14, 5:9], "nan": np.s_[20:25, 30:36]}


def scene(patch: int) -> Scene:
    return Scene(
        SceneConfig(
            seed=8,
            patch_id=patch,
            n_cells=(1, 2),
            cell_shape=(32, 32),
            start=(14200, 15600 + 64 * patch),
            n_visits=N_VISITS,
            psf_size=15,
            partial_fraction=0.0,
            n_trails=0,
        )
    )


def masked(warp: Warp) -> Warp:
    mask = warp.mask.copy()
    mask.set("BAD", np.ones(tuple(warp.bbox.shape), dtype=bool))
    return dataclasses.replace(warp, mask=mask)


def left_cell(warp: Warp) -> Warp:
    """Cut a warp to the left one of the two cells."""
    start = warp.bbox.start
    bbox = Box.factory[start.y : start.y + 32, start.x : start.x + 32]
    return dataclasses.replace(
        warp, image=warp.image[:, :32], variance=warp.variance[:, :32], mask=warp.mask[bbox], bbox=bbox
    )


def poor_variance(warp: Warp) -> Warp:
    variance = warp.variance.copy()
    for (_, block), value in zip(BLOCKS.items(), (0.0, -1.0, np.nan), strict=True):
        variance[block] = value
    return dataclasses.replace(warp, variance=variance)


def rebuilt(warp: Warp, **changes: object) -> CellCoadd:
    """Make a coadd of a warp with parts that `Warp` would refuse."""
    coadd = warp.to_cell_coadd()
    parts = {
        "image": coadd.image,
        "mask": coadd.mask,
        "variance": coadd.variance,
        "sky_projection": coadd.sky_projection,
        "band": coadd.band,
        "psf": coadd.psf,
        "patch": coadd.patch,
        "provenance": coadd.provenance,
    } | changes
    return CellCoadd(parts.pop("image"), **parts)


def spoiled_warps() -> dict[tuple[int, int], CellCoadd]:
    """Make the warps that replace good ones, by patch and number of the visit."""
    changed = {
        (ALL_NAN, 0): lambda w: dataclasses.replace(w, image=np.full_like(w.image, np.nan)),
        (ALL_MASKED, 1): masked,
        (PSF_SIZES, 2): lambda w: dataclasses.replace(
            w, psf=make_cell_psf(w.psf_stamps[:, :, 2:-2, 2:-2].copy(), w.patch.cells)
        ),
    }
    for number in range(N_VISITS):
        changed[NOTHING, number] = masked
        changed[VARIANCE, number] = poor_variance
    for number in range(1, N_VISITS):
        changed[ONE_IN_CELL, number] = left_cell
    result = {
        (patch, number): change(scene(patch).warp(number, "r")).to_cell_coadd()
        for (patch, number), change in changed.items()
    }

    warp = scene(PSF_NAN).warp(1, "r")
    stamps = warp.psf_stamps.copy()
    stamps[0, 1, 4, 4] = np.nan
    result[PSF_NAN, 1] = rebuilt(warp, psf=make_cell_psf(stamps, warp.patch.cells))
    warp = scene(UNIT).warp(1, "r")
    result[UNIT, 1] = rebuilt(
        warp,
        image=Image(warp.image, bbox=warp.bbox, unit=u.uJy, sky_projection=warp.sky_projection),
        variance=Image(warp.variance, bbox=warp.bbox, unit=u.uJy**2),
    )
    return result


def data_id(patch: int) -> dict[str, object]:
    return {"skymap": "deepprior_sim", "tract": 9, "patch": patch, "band": "r"}


def run_patches(repo: Path, patches: list[int], output_run: str) -> subprocess.CompletedProcess[str]:
    where = f"skymap = 'deepprior_sim' AND tract = 9 AND patch IN ({', '.join(map(str, patches))})"
    return pipetask(
        "run",
        *(
            "-b",
            repo,
            "-i",
            "bad/warps,deepprior/warps",
            "--output-run",
            output_run,
            "-p",
            PIPELINE,
            "-d",
            where,
        ),
        *("--register-dataset-types", *QUICK, "-c", f"deepPriorCoadd:base_steps={TRAINED_STEPS}"),
    )


@pytest.fixture(scope="module")
def repo_with_spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one patch for each case."""
    directory = tmp_path_factory.mktemp("bad_input")
    files = []
    for patch in range(UNWRITABLE + 1):
        files += write_scene(directory, scene(patch).config, ["r"])[: 1 if patch == ONE_VISIT else N_VISITS]
        if patch == ONE_VISIT:
            with fits.open(files[-1], mode="update") as hdus:
                hdus["IMAGE"].data[INFINITE] = np.inf
    repo = directory / "repo"
    ingest_warp_files(repo, files)
    butler = Butler.from_config(repo, run="bad/warps", collections="deepprior/warps", writeable=True)
    visits = {}
    for (patch, number), coadd in spoiled_warps().items():
        row = coadd.provenance.inputs[0]
        visits[patch, number] = int(row["visit"])
        butler.put(
            coadd,
            "deep_prior_warp",
            data_id(patch) | {"instrument": str(row["instrument"]), "visit": int(row["visit"])},
        )
    warp = scene(TRUNCATED).warp(2, "r")
    uri = butler.getURI(
        "deep_prior_warp", data_id(TRUNCATED) | {"instrument": warp.instrument, "visit": warp.visit}
    )
    path = Path(uri.ospath)
    path.write_bytes(path.read_bytes()[:6000])
    # A file where a directory must be made: unlike permissions, this also stops root.
    blocked = repo / "test" / "wrong" / "deep_prior_coadd" / "9" / str(UNWRITABLE)
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    return repo


@pytest.fixture(scope="module")
def refused(
    repo_with_spoiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Path, tuple[int, int]]:
    """What `deepprior ingest` says of a bad file, the file, and the number of warps before and after."""
    directory = tmp_path_factory.mktemp("refused")
    file = write_scene(directory, scene(UNWRITABLE + 1).config, ["r"])[0]
    with fits.open(file, mode="update") as hdus:
        hdus["IMAGE"].header["BUNIT"] = "adu"
    before = n_warps(repo_with_spoiled)
    result = CliRunner().invoke(main, ["ingest", str(repo_with_spoiled), str(file)])
    return result, file, (before, n_warps(repo_with_spoiled))


def n_warps(repo: Path) -> int:
    with Butler.from_config(repo, collections="deepprior/warps") as butler:
        return len(butler.query_datasets("deep_prior_warp"))


@pytest.fixture(scope="module")
def poor(
    repo_with_spoiled: Path, refused: tuple[Result, Path, tuple[int, int]]
) -> tuple[subprocess.CompletedProcess[str], Butler]:
    """The run over patches that must not fail, after a bad file was refused, and its outputs."""
    result = run_patches(repo_with_spoiled, list(range(ONE_VISIT + 1)), "test/poor")
    return result, Butler.from_config(repo_with_spoiled, collections="test/poor")


@pytest.fixture(scope="module")
def wrong(repo_with_spoiled: Path) -> tuple[subprocess.CompletedProcess[str], Butler]:
    """The run over patches that must fail, beside a good one, and its outputs."""
    result = run_patches(repo_with_spoiled, [GOOD, PSF_NAN, UNIT, TRUNCATED, UNWRITABLE], "test/wrong")
    return result, Butler.from_config(repo_with_spoiled, collections="test/wrong")


def test_refused_file_leaves_the_repository_usable(
    refused: tuple[Result, Path, tuple[int, int]], poor: tuple[subprocess.CompletedProcess[str], Butler]
) -> None:
    result, file, (before, after) = refused
    assert result.exit_code == 1
    assert f"Error: {file}: " in result.output
    assert "adu" in result.output
    assert before == after
    assert poor[0].returncode == 0, poor[0].stdout
    assert poor[1].exists("deep_prior_coadd", data_id(GOOD))


def test_poor_warps_do_not_fail(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    result, butler = poor
    assert result.returncode == 0, result.stdout
    for patch in range(ONE_VISIT + 1):
        for dataset_type in ("deep_prior_coadd", "deep_prior_coadd_sources", "deep_prior_coadd_plot"):
            exists = bool(butler.exists(dataset_type, data_id(patch)))
            assert exists == (patch != NOTHING), (patch, dataset_type)


@pytest.mark.parametrize(("patch", "number"), [(ALL_NAN, 0), (ALL_MASKED, 1)])
def test_useless_warp_is_left_out(
    poor: tuple[subprocess.CompletedProcess[str], Butler], patch: int, number: int
) -> None:
    result, butler = poor
    visit = scene(patch).warp(number, "r").visit
    assert f"visit {visit} has no usable pixel in the patch and is left out" in result.stdout
    used = butler.get("deep_prior_coadd", data_id(patch)).provenance.inputs["visit"]
    assert len(used) == N_VISITS - 1
    assert visit not in used


def test_nothing_usable_is_no_work(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    assert "None of the 3 warps has a usable pixel." in poor[0].stdout


def test_pixels_without_variance_are_no_data(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    coadd = poor[1].get("deep_prior_coadd", data_id(VARIANCE))
    no_data = coadd.mask.get("NO_DATA")
    for name, block in BLOCKS.items():
        assert no_data[block].all(), name
        assert np.isnan(coadd.variance.array[block]).all(), name
        assert np.isfinite(coadd.image.array[block]).all(), name
    assert no_data.mean() < 0.2


def test_stamps_of_different_size(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    residual = poor[1].get("deep_prior_residual", data_id(PSF_SIZES))
    assert len(residual.provenance.inputs) == N_VISITS
    assert np.isfinite(
        residual.psf.compute_kernel_image(x=residual.bbox.x.start, y=residual.bbox.y.start).array
    ).all()


def test_cell_with_one_visit(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    coadd = poor[1].get("deep_prior_coadd", data_id(ONE_IN_CELL))
    contributions = coadd.provenance.contributions
    assert np.sum(contributions["cell_j"] == 0) == N_VISITS
    assert np.sum(contributions["cell_j"] == 1) == 1
    assert np.isfinite(coadd.image.array).all()


def test_single_visit(poor: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    coadd = poor[1].get("deep_prior_coadd", data_id(ONE_VISIT))
    assert len(coadd.provenance.inputs) == 1
    assert np.isfinite(coadd.image.array).all()
    assert coadd.mask.get("NO_DATA")[INFINITE].all()
    assert coadd.mask.get("NO_DATA").mean() < 0.2
    metrics = poor[1].get("deep_prior_coadd_metrics", data_id(ONE_VISIT))
    assert metrics["method"] == "pretrained network"
    assert metrics["network"]["conditions"]["n_visits"] == 1.0


def test_wrong_warps_fail_alone(wrong: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    result, butler = wrong
    assert result.returncode == 1, result.stdout
    assert butler.exists("deep_prior_coadd_plot", data_id(GOOD))
    for patch in (PSF_NAN, UNIT, TRUNCATED, UNWRITABLE):
        for dataset_type in ("deep_prior_coadd", "deep_prior_residual", "deep_prior_coadd_plot"):
            if (patch, dataset_type) == (UNWRITABLE, "deep_prior_residual"):
                continue  # pipe_base writes the outputs of a quantum in any order, this one maybe first
            assert not butler.exists(dataset_type, data_id(patch)), (patch, dataset_type)


@pytest.mark.parametrize(
    ("patch", "number", "reason"),
    [
        (PSF_NAN, 1, "the PSF stamp of cell (0, 1) is finite only in part"),
        (UNIT, 1, "its pixels are in uJy, not nJy"),
        (TRUNCATED, 2, "does not match size recorded"),
    ],
)
def test_wrong_warp_is_named(
    wrong: tuple[subprocess.CompletedProcess[str], Butler], patch: int, number: int, reason: str
) -> None:
    warp = scene(patch).warp(number, "r")
    lines = [
        line
        for line in wrong[0].stdout.splitlines()
        if "cannot be used" in line and f"patch: {patch}," in line
    ]
    assert lines
    assert f"visit: {warp.visit}" in lines[0]
    assert reason in lines[0]


def test_unwritable_output_is_named(wrong: tuple[subprocess.CompletedProcess[str], Butler]) -> None:
    assert f"test/wrong/deep_prior_coadd/9/{UNWRITABLE}" in wrong[0].stdout
