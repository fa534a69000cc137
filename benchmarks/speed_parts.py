# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What no quantum shows by itself: ``speed_parts.py REPOSITORY DEVICE CORES`` prints it as JSON.

Single steps and how they grow with the number of visits, the area and the width of the PSF stamps; what they
achieve of the limits of the device; start-up; building of the graph; reading and writing alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_peer import observations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lsst.coadd.deepprior.baselines import AcceleratedSteps, maximum_likelihood_step
from lsst.coadd.deepprior.network import FEATURES, Trunk
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.parallel import use_threads
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.daf.butler import Butler

REPEATS = 7

SHORTEST = 0.2
"""Seconds that a turn takes at least."""

CELL = 128
VISITS, SIDES, STAMPS = (8, 32, 128), (512, 1024, 2048), (31, 41, 61)
"""What growth is fitted to: numbers of visits, sides of patches and widths of PSF stamps in pixels."""

START_UP = (
    "import lsst.images.cells, torch",
    "import lsst.coadd.deepprior.tasks.deep_prior_coadd, lsst.coadd.deepprior.restore, "
    "lsst.coadd.deepprior.weights, lsst.coadd.deepprior.outliers, lsst.coadd.deepprior.batches",
)


class Noise(Sequence[Observation]):
    """Visits of noise with a PSF that changes from cell to cell, made when they are read."""

    def __init__(self, n_visits: int, layout: CellLayout, stamp: int) -> None:
        self._n_visits, self._layout, self._stamp = n_visits, layout, stamp

    def __len__(self) -> int:
        return self._n_visits

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        if not 0 <= index < self._n_visits:
            raise IndexError(index)
        layout, rng = self._layout, np.random.default_rng(index)
        shape = (layout.n_i, layout.n_j)
        widths = 1.5 + 0.7 * rng.random() + np.linspace(0.0, 0.1, shape[0] * shape[1])
        return Observation(
            flux=rng.standard_normal(layout.shape, dtype=np.float32),
            variance=np.ones(layout.shape, dtype=np.float32),
            good=rng.random(layout.shape) > 0.02,
            psf=np.reshape(
                [gaussian_stamp(width, self._stamp) for width in widths], (*shape, *[self._stamp] * 2)
            ),
            origin=(0, 0),
            name=f"visit {index}",
        )


class Work(TorchDispatchMode):
    """Counts floating-point operations and bytes of the operations that are called, on any device.

    Bytes are the sizes of what operations read and write, as if nothing stayed in a cache. Real FFTs count
    2.5 n log2 n, convolutions twice their products, and all else one operation an element.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if torch.is_tensor(x)]
        if not out or func.is_view:
            return result
        read = [x for x in args if torch.is_tensor(x)]
        self.bytes += sum(x.numel() * x.element_size() for x in (*read, *out))
        name = func.overloadpacket.__name__
        if name.startswith("_fft"):
            size = max(x.numel() for x in (*read, *out))
            plane = max(x.shape[-1] * x.shape[-2] for x in (*read, *out))
            self.flops += 2.5 * size * np.log2(plane)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        else:
            self.flops += sum(x.numel() for x in out)
        return result


def seconds(function: Callable[[], Any], device: str) -> float:
    """Return the seconds of a call."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def in_turns(functions: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Return the median seconds of functions that take turns; short ones are called many times in a turn."""
    for function in functions.values():
        function()
    calls = {
        name: max(1, round(SHORTEST / seconds(function, device))) for name, function in functions.items()
    }

    def turn(name: str) -> float:
        return seconds(lambda: [functions[name]() for _ in range(calls[name])], device) / calls[name]

    times = [{name: turn(name) for name in functions} for _ in range(REPEATS)]
    return {name: statistics.median(row[name] for row in times) for name in functions}


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """Fit a power law."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])


def stepper(n_visits: int, side: int, stamp: int, device: str) -> tuple[PatchData, Callable[[], Any]]:
    """Return data, and a function that takes a step of maximum likelihood on them."""
    layout = CellLayout(side // CELL, side // CELL, CELL, CELL)
    data = PatchData(Noise(n_visits, layout, stamp), layout, 0.9, device=device)
    sets = data.sets()
    latent = torch.ones((1, *data.shape), device=device)
    given = data.linearise(sets, latent)
    steps = AcceleratedSteps(latent)
    return data, lambda: steps.step(lambda u: maximum_likelihood_step(u, given))


def growth(device: str) -> dict[str, Any]:
    """Return times of steps, and exponents."""
    cases = {
        **{f"visits {n}": (n, 256, 41) for n in VISITS},
        **{f"side {n}": (2, n, 41) for n in SIDES},
        **{f"stamp {n}": (2, 512, n) for n in STAMPS},
    }
    made = {name: stepper(*case, device)[1] for name, case in cases.items()}
    times = in_turns(made, device)
    return {
        "step seconds": times,
        "visits": exponent(VISITS, [times[f"visits {n}"] for n in VISITS]),
        "area": exponent([n**2 for n in SIDES], [times[f"side {n}"] for n in SIDES]),
        "psf": exponent(STAMPS, [times[f"stamp {n}"] for n in STAMPS]),
    }


def achieved(device: str) -> dict[str, Any]:
    """Return what the kernels of a restoration achieve, and the limits of the device in the same run."""
    side = 1024
    data, step = stepper(2, side, 41, device)
    model = torch.ones((1, *data.shape), device=device)
    sets = data.sets()
    net = Trunk().to(device).eval()
    channels = torch.randn((len(FEATURES), *data.shape), device=device)
    square = torch.randn((2048, 2048), device=device)
    large = torch.randn(2**26, device=device)

    def infer() -> None:
        with torch.no_grad():
            net.tile_by_tile(channels, 0, 0)

    functions = {
        "step of maximum likelihood (base, noise, psf)": step,
        "pass over two visits (statistics, base, fit)": lambda: data.linearise(sets, model),
        "network (fit, noise, psf)": infer,
        "limit of FLOP/s: product of matrices": lambda: square @ square,
        "limit of bytes/s: copy": large.clone,
    }
    times = in_turns(functions, device)
    use_threads(1)  # operations are counted in one thread
    result = {}
    for name, function in functions.items():
        with Work() as work:
            function()
        result[name] = {
            "seconds": times[name],
            "gflops": work.flops / times[name] / 1e9,
            "gbytes": work.bytes / times[name] / 1e9,
        }
    return result


def start_up() -> dict[str, float]:
    """Return median CPU seconds of imports, in turns: of what must be imported, and of our tasks."""
    rows = []
    for _ in range(REPEATS):
        row = []
        for code in START_UP:
            before = os.times()
            subprocess.run([sys.executable, "-c", code], check=True)
            after = os.times()
            row.append(sum(after[2:4]) - sum(before[2:4]))
        rows.append(row)
    alone, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"alone": alone, "ours": ours}


def torch_at_graph() -> bool:
    """Return whether building a graph, which imports the tasks and their configurations, imports torch."""
    tasks = ("deep_prior_coadd", "measure_deep_prior_coadd", "plot_deep_prior_coadd")
    imports = "; ".join(f"import lsst.coadd.deepprior.tasks.{task}" for task in tasks)
    code = f"import sys; {imports}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip() == "True"


def input_output(repo: Path) -> dict[str, float]:
    """Return the seconds to read the warps, and to write the outputs of some quantum again, alone."""
    with Butler.from_config(repo, writeable=True) as butler:
        warps = butler.query_datasets("deep_prior_warp", collections="deepprior/warps")
        started = time.monotonic()
        for ref in warps:
            butler.get(ref)
        read = time.monotonic() - started
        run = f"speed/io-{time.time_ns()}"
        butler.collections.register(run)
        write = 0.0
        for name in ("coadd", "residual", "coadd_outliers", "coadd_metrics"):
            ref = butler.query_datasets(f"deep_prior_{name}", collections="speed/*", find_first=False)[0]
            value = butler.get(ref)
            started = time.monotonic()
            butler.put(value, ref.datasetType, ref.dataId, run=run)
            write += time.monotonic() - started
    return {"read": read, "write": write, "visits": len(warps)}


def main(repo: Path, device: str, cores: int) -> None:
    """Print all numbers."""
    use_threads(cores)  # as in a quantum
    visits, layout = observations(repo)
    statistics_seconds = seconds(lambda: PatchData(visits, layout, 0.9, device=device).sets(), device)
    result = {
        "growth": growth(device),
        "achieved": achieved(device),
        "start-up": start_up(),
        "torch at graph": torch_at_graph(),
        "input and output": input_output(repo) | {"statistics": statistics_seconds},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
