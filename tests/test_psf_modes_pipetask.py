# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""PSFs that are learned, through the task and through pipetask."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_pipetask import PIPELINE, QUICK, pipetask

from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler

REFINE = PIPELINE.replace("deepPriorCoadd.yaml", "refinePsfs.yaml")


def test_known_psfs_have_no_further_output(warps: list[Warp]) -> None:
    config = DeepPriorCoaddConfig()
    assert "visit_psfs" not in DeepPriorCoaddConnections(config=config).outputs
    config.psf_mode = "refine"
    assert "visit_psfs" in DeepPriorCoaddConnections(config=config).outputs


@pytest.mark.parametrize(("init", "base_steps"), [("scratch", 20), ("pretrained", 240)])
def test_task(warps: list[Warp], init: str, base_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    config = DeepPriorCoaddConfig()
    config.update(init=init, base_steps=base_steps, steps=2, n_splits=2, n_variance_draws=1, device="cpu")
    config.psf_mode = "refine"
    with caplog.at_level(logging.WARNING):
        result = DeepPriorCoaddTask(config=config).run(warps=warps)
    assert init in result.metrics["method"]
    assert len(result.visit_psfs) == len(warps)
    seconds = result.metrics["seconds"]
    assert 0.0 < seconds["refine"] < seconds["task"] - seconds["total"]
    numbers = result.metrics["psf_refinement"]
    assert yaml.safe_load(yaml.safe_dump(numbers)) == numbers
    assert set(numbers["visits"]) == {warp.label for warp in warps}
    assert not numbers["anchored"]
    assert numbers["n_stars"] == 0
    assert f"of {numbers['n_candidates']} bright points fewer than 5 are stars of one shape" in caplog.text
    for psf, warp in zip(result.visit_psfs, warps, strict=True):
        assert psf.metadata["psf_mode"] == "refine"
        assert psf.metadata["psf_not_anchored"] == int(not numbers["anchored"])
        assert psf.provenance.inputs[0]["visit"] == warp.visit
        assert np.isnan(psf.image.array).all()
        for cell in warp.psf.bounds.cell_indices():
            assert psf.psf[cell].array.sum() == pytest.approx(1.0)
            assert psf.psf[cell].array.min() >= 0.0
    assert result.coadd.metadata["psf_mode"] == "refine"


def test_pipetask(repo: Path, tmp_path: Path) -> None:
    own = tmp_path / "repo"
    shutil.copytree(repo, own)
    result = pipetask(
        *("run", "-b", own, "-i", "deepprior/warps", "-o", "u/test/psfs", "--register-dataset-types"),
        *(*QUICK, "-p", f"{REFINE}#restoration", "-d", "skymap='deepprior_sim' AND band='r' AND patch=0"),
    )
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(own, collections="u/test/psfs")
    refs = butler.query_datasets("deep_prior_visit_psf")
    assert len(refs) == 3
    for ref in refs:
        psf = butler.get(ref.makeComponentRef("psf"))
        warp = Warp.from_cell_coadd(butler.get("deep_prior_warp", ref.dataId, collections="deepprior/warps"))
        assert psf.grid == warp.psf.grid
        assert psf.kernel_bbox == warp.psf.kernel_bbox
        whole = butler.get(ref)
        assert whole.metadata["psf_mode"] == "refine"
        assert whole.provenance.inputs[0]["visit"] == ref.dataId["visit"]
    metrics = butler.get("deep_prior_coadd_metrics", skymap="deepprior_sim", tract=9, patch=0, band="r")
    assert set(metrics["psf_refinement"]) == {"anchored", "n_stars", "n_candidates", "visits"}
