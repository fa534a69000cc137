# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Time of another method on the visits of a repository: ``speed_peer.py REPOSITORY METHOD CORES``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from methods import METHODS, peak_memory
from scenes import TARGET_SIGMA

from lsst.coadd.deepprior.baselines import maximum_likelihood_step, robust_start
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.parallel import use_threads
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.coadd.deepprior.warp_streams import cell_layout
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler

SETTINGS = {
    "coadd": "",
    "richardson_lucy": "steps=160",
    "richardson_lucy_direct": "steps=160",
    "starlet": "strength=3, steps=100",
    "coadd_deconvolution": "everywhere, steps=100",
    "starred": "lambda=0.3",
}
"""Settings of equal work."""


def observations(repo: Path) -> tuple[list[Observation], CellLayout]:
    """Read all warps of a repository."""
    bad = DeepPriorCoaddConfig().bad_mask_planes
    visits = []
    with Butler.from_config(repo, collections="deepprior/warps") as butler:
        for ref in butler.query_datasets("deep_prior_warp"):
            warp = Warp.from_cell_coadd(butler.get(ref))
            visits.append(warp.observation(bad))
    return visits, cell_layout(warp.patch.cells)


def richardson_lucy_direct(scene: Any, settings: Sequence[str]) -> None:
    """Take the steps of Richardson-Lucy without statistics: each passes over all visits."""
    steps = int(settings[0].removeprefix("steps="))
    data = PatchData(scene.observations, scene.layout, TARGET_SIGMA)
    sets = data.sets()
    latent, _ = robust_start(data, sets)
    for _ in range(steps):
        latent = maximum_likelihood_step(latent, data.linearise(sets, latent))


def main(repo: Path, name: str, cores: int) -> None:
    """Run the method and print its seconds and memory."""
    use_threads(cores)  # as in a quantum
    visits, layout = observations(repo)
    scene = SimpleNamespace(observations=visits, layout=layout)
    method = richardson_lucy_direct if name == "richardson_lucy_direct" else METHODS[name].run
    if name == "coadd":  # the imports
        method(SimpleNamespace(observations=visits[:1], layout=layout), (SETTINGS[name],))
    started, cpu = time.monotonic(), time.process_time()
    method(scene, (SETTINGS[name],))
    numbers = {"total": time.monotonic() - started, "cpu": time.process_time() - cpu}
    print(json.dumps(numbers | {"peak_gb": peak_memory() * 2**20 / 1e9, "setting": SETTINGS[name]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
