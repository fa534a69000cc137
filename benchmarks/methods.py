# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The methods of the benchmark and the settings that are tried; run as a script, one run of one of them.

``python methods.py SCENE METHOD SETTINGS OUTPUT`` reads a scene file, runs a method at one or more settings
(a JSON list of strings), and writes one ``.npz`` file of images, and of time and memory as JSON text.
"""

from __future__ import annotations

__all__ = ("METHODS", "OURS", "Method")

import dataclasses
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cache import NETWORK

Outputs = dict[str, dict[str, Any]]
"""By setting: ``image`` and ``psf`` and, for some, ``seconds``, a source list and other arrays."""

_PACKAGE = "lsst.coadd.deepprior."

_STARRED = (
    Path(__file__).with_name("starred_runner.py"),
    Path(__file__).with_name(".starred_venv") / "bin" / "python",
)
"""Script and interpreter of STARRED."""

OURS = ("scratch", "pretrained", "refined")
"""The methods of this software."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method and the grid of its settings.

    Parameters
    ----------
    label : `str`
        What tables call it.
    modules : `tuple` [`str`, ...]
        Modules of the package whose code, with all that they import from it, makes the result.
    run : `~collections.abc.Callable`
        Function of a scene and the settings wanted.
    grid : `tuple` [`str`, ...]
        Settings; one, ``""``, where there is nothing to tune.
    families : `tuple` [`str`, ...]
        Families on which it runs; all if none is named.
    whole : `bool`
        Whether it takes the whole patch, and not `scenes.CUTOUT` alone.
    files : `tuple` [`pathlib.Path`, ...]
        Other files that it needs, and whose content makes the result.
    """

    label: str
    modules: tuple[str, ...]
    run: Callable[[Any, Sequence[str]], Outputs]
    grid: tuple[str, ...] = ("",)
    families: tuple[str, ...] = ()
    whole: bool = True
    files: tuple[Path, ...] = ()

    def is_for(self, family: str) -> bool:
        """Return whether it runs on a family."""
        return not self.families or family in self.families


def _peer(image: Any) -> dict[str, Any]:
    return {"image": image.image, "psf": image.psf}


def _linear(name: str) -> Callable[[Any, Sequence[str]], Outputs]:
    """Wrap a coadd without settings."""

    def run(scene: Any, settings: Sequence[str]) -> Outputs:
        from scenes import TARGET_SIGMA

        function = getattr(importlib.import_module(_PACKAGE + "linear_coadds"), name)
        return {"": _peer(function(scene.observations, scene.layout, TARGET_SIGMA))}

    return run


def _by_steps(module: str, name: str, **fixed: Any) -> Callable[[Any, Sequence[str]], Outputs]:
    """Wrap a method that gives the images of several numbers of steps in one run."""

    def run(scene: Any, settings: Sequence[str]) -> Outputs:
        from scenes import TARGET_SIGMA

        function = getattr(importlib.import_module(_PACKAGE + module), name)
        steps = [int(setting.split("=")[1]) for setting in settings]
        images = function(scene.observations, scene.layout, TARGET_SIGMA, steps=steps, **fixed)
        return {setting: _peer(images[step]) for setting, step in zip(settings, steps, strict=True)}

    return run


def _rubin(scene: Any, settings: Sequence[str]) -> Outputs:
    """Run Rubin's deconvolution of the coadd once for each choice of footprints."""
    from scenes import TARGET_SIGMA

    from lsst.coadd.deepprior.deconvolution import coadd_deconvolution

    outputs: Outputs = {}
    for footprints in dict.fromkeys(setting.split(", ")[0] for setting in settings):
        chosen = [setting for setting in settings if setting.startswith(footprints)]
        numbers = {setting: int(setting.split("=")[1]) for setting in chosen if "=" in setting}
        where = (scene.observations, scene.layout, TARGET_SIGMA)
        kept = footprints == "footprints"
        if numbers:
            peers = coadd_deconvolution(*where, steps=list(numbers.values()), footprints=kept)
            outputs |= {setting: _peer(peers[steps]) for setting, steps in numbers.items()}
        for setting in set(chosen) - set(numbers):
            (peer,) = coadd_deconvolution(*where, footprints=kept).values()
            outputs[setting] = _peer(peer)
    return outputs


def _starlet(scene: Any, settings: Sequence[str]) -> Outputs:
    """Run the starlet method once a setting."""
    from scenes import TARGET_SIGMA

    from lsst.coadd.deepprior.deconvolution import starlet_map

    outputs: Outputs = {}
    for setting in settings:
        strength, steps = (part.split("=")[1] for part in setting.split(", "))
        peer = starlet_map(
            scene.observations, scene.layout, TARGET_SIGMA, strength=float(strength), steps=int(steps)
        )
        outputs[setting] = _peer(peer)
    return outputs


def _restore(scene: Any, settings: Sequence[str], *, pretrained: bool, refined: bool = False) -> Outputs:
    """Restore with this software, and measure sources on model and residual."""
    from scenes import TARGET_SIGMA

    from lsst.coadd.deepprior.fitted_patch import RestoreSettings
    from lsst.coadd.deepprior.measure import MeasureInputs, measure_sources
    from lsst.coadd.deepprior.plain_coadd import Coadd
    from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA
    from lsst.coadd.deepprior.restore import restore

    start: dict[str, Any] = {}
    if pretrained:
        from lsst.coadd.deepprior.weights import packaged_network

        start["network"] = packaged_network()
    wanted = RestoreSettings(target_fwhm=TARGET_SIGMA * FWHM_PER_SIGMA, check_psf=False)
    visits = scene.observations
    if refined:
        from lsst.coadd.deepprior.psf_refinement import CorrectedObservations, refine_psfs

        visits = CorrectedObservations(
            visits, refine_psfs(visits, scene.layout, target_fwhm=wanted.target_fwhm)
        )
    result = restore(visits, scene.layout, wanted, **start)
    memory = peak_memory()
    plain = Coadd(
        result.image,
        result.target_sigma,
        result.residual,
        result.residual_variance,
        result.residual_psf,
    )
    (y, x), (ny, nx) = scene.start, scene.layout.shape
    inputs = MeasureInputs(
        model=result.image,
        model_variance=result.variance,
        target_sigma=result.target_sigma,
        coadd=plain,
        planes={"CLIPPED": result.clipped, "PRIOR_CARRIED": result.prior_carried},
        origin=scene.start,
        inner=(slice(y, y + ny), slice(x, x + nx)),
    )
    sources = measure_sources(inputs, lambda x, y: (x, y))
    columns = {name: np.asarray(sources[name], dtype=float) for name in ("x", "y", "flux", "flux_err")}
    seconds = result.metrics["seconds"]
    return {
        "": {
            "image": result.image,
            "psf": result.target_psf,
            "model_plus_residual": np.where(plain.good, plain.image, np.nan),
            "residual": result.residual,
            "seconds": seconds["total"] - seconds["noise"],
            "seconds_with_noise": seconds["total"],
            "memory": memory,
            "phases": seconds,
            "method": result.metrics["method"],
            **columns,
        }
    }


def _starred(scene: Any, settings: Sequence[str]) -> Outputs:
    """Run STARRED in its own environment on the cutout."""
    from scenes import CUTOUT, TARGET_SIGMA

    from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, carry_kernel

    shape = (len(scene.observations), *scene.layout.shape)
    data, variance, good = np.zeros(shape), np.ones(shape), np.zeros(shape, dtype=bool)
    kernels = []
    for index, visit in enumerate(scene.observations):
        (y, x), (ny, nx) = visit.origin, visit.flux.shape
        for target, values in ((data, visit.flux), (variance, visit.variance), (good, visit.good)):
            target[index, y : y + ny, x : x + nx] = values
        kernels.append(carry_kernel(visit.psf[tuple(np.argwhere(visit.has_psf)[0])], TARGET_SIGMA))
    cut = (slice(None), *CUTOUT)
    used = good[cut].any(axis=(1, 2))
    arrays = {
        "data": np.where(good, data, 0.0)[cut][used],
        "variance": np.where(good, variance, 1.0)[cut][used],
        "good": good[cut][used],
        "narrow_psf": np.array(kernels)[used],
    }
    outputs: Outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "cutout.npz"), Path(folder, "result.npz")
        with source.open("wb") as file:
            np.savez(file, allow_pickle=False, target_fwhm=TARGET_SIGMA * FWHM_PER_SIGMA, **arrays)
        for setting in settings:
            strength = setting.split("=")[1]
            options = ["--lambda-scales", strength, "--lambda-hf", strength]
            command = [str(_STARRED[1]), str(_STARRED[0]), str(source), str(result), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError((done.stderr.strip().splitlines() or ["STARRED failed"])[-1])
            with np.load(result) as found:
                image = np.full(scene.layout.shape, np.nan, dtype=np.float32)
                image[CUTOUT] = found["image"]
                numbers = {name: float(found[name]) for name in ("seconds", "cpu_seconds")}
                memory = float(found["peak_memory"]) / 2**20
                outputs[setting] = {"image": image, "psf": found["psf"], "memory": memory, **numbers}
    return outputs


def _scratch(scene: Any, settings: Sequence[str]) -> Outputs:
    return _restore(scene, settings, pretrained=False)


def _pretrained(scene: Any, settings: Sequence[str]) -> Outputs:
    return _restore(scene, settings, pretrained=True)


def _refined(scene: Any, settings: Sequence[str]) -> Outputs:
    return _restore(scene, settings, pretrained=True, refined=True)


def _steps(*numbers: int) -> tuple[str, ...]:
    return tuple(f"steps={number}" for number in numbers)


METHODS: dict[str, Method] = {
    "coadd": Method("inverse-variance coadd", ("linear_coadds",), _linear("inverse_variance_coadd")),
    "best_visit": Method("best-seeing visit", ("linear_coadds",), _linear("best_seeing_visit")),
    "proper_coadd": Method("proper coadd", ("linear_coadds",), _linear("proper_coadd")),
    "richardson_lucy": Method(
        "Richardson-Lucy, multi-frame",
        ("deconvolution",),
        _by_steps("deconvolution", "richardson_lucy"),
        _steps(5, 10, 15, 20, 30, 50, 100, 200, 400),
    ),
    "starlet": Method(
        "starlet-L1 MAP",
        ("deconvolution",),
        _starlet,
        tuple(f"strength={strength}, steps=100" for strength in ("1", "3", "5", "10")),
    ),
    "coadd_deconvolution": Method(
        "deconvolution of the coadd (Rubin)",
        ("deconvolution",),
        _rubin,
        (
            "footprints, stopped by its own rule",
            *(f"{kept}, {steps}" for kept in ("footprints", "everywhere") for steps in _steps(10, 30, 100)),
        ),
    ),
    "paper_form": Method(
        "the paper's form",
        ("paper_form",),
        _by_steps("paper_form", "paper_form", seed=1),
        _steps(25, 50, 100, 200, 400),
        families=("standard",),
    ),
    "starred": Method(
        "STARRED",
        ("psf",),
        _starred,
        tuple(f"lambda={strength}" for strength in ("0.1", "0.3", "1")),
        families=("standard",),
        whole=False,
        files=_STARRED,
    ),
    "scratch": Method("this software, scratch", ("restore", "measure"), _scratch),
    "pretrained": Method(
        "this software, pretrained", ("restore", "measure", "weights"), _pretrained, files=(NETWORK,)
    ),
    "refined": Method(
        "this software, pretrained, with learned PSFs",
        ("restore", "measure", "weights", "psf_refinement"),
        _refined,
        families=("wrong_psf",),
        files=(NETWORK,),
    ),
}
"""The methods by name (`dict` [`str`, `Method`])."""


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def _main(scene_file: Path, name: str, settings: list[str], output: Path) -> None:
    import torch
    from scenes import BenchScene

    method = METHODS[name]
    torch.set_num_threads(1)
    for module in method.modules:
        importlib.import_module(_PACKAGE + module)
    scene = BenchScene.load(scene_file)
    before = peak_memory()
    wall, cpu = time.monotonic(), time.process_time()
    outputs = method.run(scene, settings)
    numbers: dict[str, Any] = {
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory": peak_memory(),
        "memory_before": before,
    }
    arrays: dict[str, Any] = {}
    for index, setting in enumerate(settings):
        for key, value in outputs[setting].items():
            if isinstance(value, np.ndarray):
                arrays[f"{index}/{key}"] = value
            else:
                numbers[key] = value
    with output.open("wb") as file:
        np.savez(file, allow_pickle=False, numbers=json.dumps(numbers), **arrays)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
