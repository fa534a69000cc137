# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""All bands of a patch together, through the task and through pipetask."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from run_pipetask import QUICK, pipetask

from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.coadd.deepprior.tasks.multiband_deep_prior_coadd import (
    DeepPriorMultibandCoaddConfig,
    DeepPriorMultibandCoaddTask,
)
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler
from lsst.pipe.base import NoWorkFound
from lsst.pipe.base.testUtils import lintConnections

MULTIBAND = "$COADD_DEEPPRIOR_DIR/pipelines/multibandDeepPriorCoadd.yaml"

QUICK_SETTINGS: dict[str, Any] = {
    "base_steps": 10,
    "steps": 2,
    "n_splits": 2,
    "n_variance_draws": 1,
    "check_psf": False,
    "device": "cpu",
}


def quick_task(**settings: Any) -> DeepPriorMultibandCoaddTask:
    config = DeepPriorMultibandCoaddConfig()
    config.update(**(QUICK_SETTINGS | settings))
    return DeepPriorMultibandCoaddTask(config=config)


@pytest.fixture(scope="module")
def by_band(scene: Scene, warps: list[Warp]) -> dict[str, list[Warp]]:
    """Visits of two bands: four of the one and two of the other."""
    return {"r": warps, "g": [scene.warp(number, "g") for number in range(2)]}


def without_data(warp: Warp) -> Warp:
    mask = warp.mask.copy()
    mask.set("BAD", np.ones(warp.image.shape, dtype=bool))
    return dataclasses.replace(warp, mask=mask)


def test_connections() -> None:
    lintConnections(DeepPriorMultibandCoaddConfig().ConnectionsClass)
    connections = DeepPriorMultibandCoaddConfig().ConnectionsClass(config=DeepPriorMultibandCoaddConfig())
    assert connections.dimensions == {"tract", "patch", "skymap"}
    single = DeepPriorCoaddConfig().ConnectionsClass(config=DeepPriorCoaddConfig())
    for name in single.outputs:
        one, other = getattr(single, name), getattr(connections, name)
        assert dataclasses.replace(one, multiple=True) == other
    assert connections.outputs - single.outputs == {"picture"}


STARTS = pytest.mark.parametrize(
    ("init", "base_steps", "method"), [("pretrained", 240, "pretrained"), ("scratch", 10, "scratch")]
)


@STARTS
def test_bands_share_one_target(
    by_band: dict[str, list[Warp]], init: str, base_steps: int, method: str
) -> None:
    result = quick_task(init=init, base_steps=base_steps).run(warps=by_band)
    assert list(result.bands) == ["g", "r"]
    targets = {one.coadd.metadata["target_fwhm_arcsec"] for one in result.bands.values()}
    assert len(targets) == 1
    assert result.bands["g"].metrics["coupled_with"] == ["r"]
    assert result.bands["g"].coadd.metadata["coupled_with"] == "r"
    assert result.bands["g"].coadd.band == "g"
    assert len(result.bands["g"].coadd.provenance.inputs) == 2
    assert method in result.bands["r"].metrics["method"]
    assert "coupled with g" in result.bands["r"].metrics["method"]


@STARTS
def test_without_coupling_it_is_the_task_of_one_band(
    by_band: dict[str, list[Warp]], init: str, base_steps: int, method: str
) -> None:
    result = quick_task(coupling=False, init=init, base_steps=base_steps).run(warps=by_band)
    for band, warps in by_band.items():
        config = DeepPriorCoaddConfig()
        config.update(**(QUICK_SETTINGS | {"init": init, "base_steps": base_steps}))
        single = DeepPriorCoaddTask(config=config).run(warps=warps)
        own = result.bands[band]
        assert method in own.metrics["method"]
        for name in ("coadd", "residual"):
            one, other = getattr(single, name), getattr(own, name)
            for plane in ("image", "variance"):
                np.testing.assert_array_equal(getattr(one, plane).array, getattr(other, plane).array)
            np.testing.assert_array_equal(one.mask.array, other.mask.array)
            np.testing.assert_array_equal(one.noise_realizations[0].array, other.noise_realizations[0].array)
        assert own.metrics["coupled_with"] == []


def test_band_without_data_is_left_out(
    by_band: dict[str, list[Warp]], caplog: pytest.LogCaptureFixture
) -> None:
    blind = {"r": by_band["r"], "g": [without_data(warp) for warp in by_band["g"]]}
    with caplog.at_level(logging.WARNING):
        result = quick_task().run(warps=blind)
    assert list(result.bands) == ["r"]
    assert "The g band is left out: None of the 2 warps has a usable pixel." in caplog.text
    assert result.bands["r"].metrics["coupled_with"] == []
    with pytest.raises(NoWorkFound, match="No band has a warp with a usable pixel"):
        quick_task().run(warps={"g": blind["g"]})


def test_psfs_that_are_learned(by_band: dict[str, list[Warp]]) -> None:
    result = quick_task(psf_mode="refine").run(warps=by_band)
    for band, one in result.bands.items():
        assert len(one.visit_psfs) == len(by_band[band])
        assert "psf_refinement" in one.metrics
        seconds = one.metrics["seconds"]
        assert 0.0 < seconds["refine"] < seconds["task"] - seconds["total"]


def test_fits_go_on_where_they_were(by_band: dict[str, list[Warp]], tmp_path: Path) -> None:
    files = {band: tmp_path / f"{band}.fit" for band in by_band}
    task = quick_task(init="scratch", steps=3, checkpoint_every=1)
    first = task.run(warps=by_band, checkpoints=files)
    assert all(file.is_file() for file in files.values())
    assert {band: one.checkpoint for band, one in first.bands.items()} == files
    without_fit = quick_task(init="scratch", steps=0).run(warps=by_band, checkpoints=files)
    assert [one.checkpoint for one in without_fit.bands.values()] == [None, None]
    again = task.run(warps=by_band, checkpoints=files)
    for band, one in first.bands.items():
        np.testing.assert_allclose(
            again.bands[band].coadd.image.array, one.coadd.image.array, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(RuntimeError, match="coupled_bands"):
        task.run(warps={"r": by_band["r"]}, checkpoints=files)
    # The visits of the other band are a part of the target PSF.
    fewer = by_band | {"g": by_band["g"][:1]}
    with pytest.raises(RuntimeError, match="inputs"):
        task.run(warps=fewer, checkpoints={"r": files["r"]})


def test_pipetask(repo: Path, tmp_path: Path) -> None:
    own = tmp_path / "repo"
    shutil.copytree(repo, own)
    arguments = ["-b", own, "-i", "deepprior/warps", "-o", "u/test/bands", "--register-dataset-types"]
    chosen = ["-d", "skymap='deepprior_sim' AND patch=0", "-c", "deepPriorMultibandCoadd:check_psf=False"]
    quick = [word.replace("deepPriorCoadd", "deepPriorMultibandCoadd") for word in QUICK]
    result = pipetask("run", *arguments, *quick, "-p", f"{MULTIBAND}#catalogue", *chosen)
    assert result.returncode == 0, result.stdout
    assert "Executed 3 quanta successfully, 0 failed" in result.stdout
    butler = Butler.from_config(own, collections="u/test/bands")
    patch = {"skymap": "deepprior_sim", "tract": 9, "patch": 0}
    for band in ("r", "i"):
        coadd = butler.get("deep_prior_coadd", patch, band=band)
        assert coadd.band == band
        assert np.isfinite(coadd.image.array).all()
        assert len(butler.get("deep_prior_coadd_sources", patch, band=band).colnames) > 20
        assert "deep_prior_residual" in {
            ref.datasetType.name for ref in butler.query_datasets("deep_prior_residual", data_id=patch)
        }
    metrics = butler.get("deep_prior_coadd_metrics", patch, band="r")
    assert metrics["coupled_with"] == ["i"]
    picture = matplotlib.image.imread(butler.getURI("deep_prior_rgb", patch).ospath)
    assert picture.ndim == 3
    # Of a patch of 96 pixels each is shown as a square of 8 by 8.
    assert picture.shape[1] == 8 * coadd.image.array.shape[1]
