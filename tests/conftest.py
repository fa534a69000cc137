# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Small simulated scenes, as warps, as warp files and as a repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from quick import quick_task

from lsst.coadd.deepprior.ingest import ingest_warp_files
from lsst.coadd.deepprior.simulate import Scene, SceneConfig, write_scene
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler
from lsst.daf.butler.tests import addDatasetType
from lsst.pipe.base import Struct


@pytest.fixture(scope="session")
def scene() -> Scene:
    """A scene of 2x3 cells that are not square, with a visit that covers it only in part."""
    return Scene(SceneConfig(seed=5, n_cells=(2, 3), cell_shape=(40, 36), n_visits=4, psf_size=21))


@pytest.fixture(scope="session")
def warps(scene: Scene) -> list[Warp]:
    """The r-band visits of the scene; they must not be changed."""
    return [scene.warp(number, "r") for number in range(scene.config.n_visits)]


@pytest.fixture(scope="session")
def restored(warps: list[Warp]) -> Struct:
    """The r-band visits restored by `quick.quick_task`; it must not be changed."""
    return quick_task().run(warps=warps)


@pytest.fixture(scope="session")
def warp_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Warp files of two patches of 2x3 cells and two bands, three visits each; they must not be changed."""
    outdir = tmp_path_factory.mktemp("warp_files")
    files = []
    for patch_id in (0, 1):
        config = SceneConfig(
            seed=6,
            patch_id=patch_id,
            n_cells=(2, 3),
            cell_shape=(32, 32),
            start=(14200, 15600 + 96 * patch_id),
            n_visits=3,
            psf_size=15,
        )
        files += write_scene(outdir, config, ["r", "i"])
    return files


@pytest.fixture(scope="session")
def repo(warp_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that holds these files; it must not be changed."""
    path = tmp_path_factory.mktemp("repo") / "repo"
    ingest_warp_files(path, warp_files)
    return path


@pytest.fixture(scope="module")
def butler(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Butler:
    """A repository with the warps of the shared one that the tests of a module may write to."""
    path = tmp_path_factory.mktemp("tasks") / "repo"
    shutil.copytree(repo, path)
    butler = Butler.from_config(path, run="deepprior/warps", writeable=True)
    for name, storage_class in {
        "deep_prior_coadd": "CellCoadd",
        "deep_prior_residual": "CellCoadd",
        "deep_prior_coadd_outliers": "ArrowAstropy",
        "deep_prior_coadd_metrics": "StructuredDataDict",
        "deep_prior_coadd_sources": "ArrowAstropy",
        "deep_prior_coadd_plot": "Plot",
    }.items():
        addDatasetType(butler, name, {"tract", "patch", "band", "skymap"}, storage_class)
    return butler
