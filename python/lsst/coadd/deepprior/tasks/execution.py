# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""A restoration as a guest of a node that others use too."""

from __future__ import annotations

__all__ = (
    "gpu_peak_bytes",
    "memory_of",
    "open_checkpoint",
    "refined_observations",
    "restore_on_node",
    "run_on_node",
)

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsst.coadd.deepprior import __version__
from lsst.pipe.base import ExecutionResources

from ..devices import choose_device, visible_gpus
from ..fit_checkpoint import FitCheckpoint, inputs_digest
from ..observation import Observation
from ..progress import ProgressLines

if TYPE_CHECKING:
    from ..batches import Batches
    from ..fitted_patch import Progress, RestoreSettings
    from ..operators import CellLayout
    from ..psf_refinement import PsfRefinement
    from ..restore import Restoration
    from ..weights import TrainedNetwork
    from .deep_prior_coadd_config import DeepPriorCoaddConfig


def memory_of(resources: ExecutionResources) -> float | None:
    """Return the memory in bytes that a quantum may take, `None` if nothing is said of it."""
    return None if resources.max_mem is None else float(resources.max_mem.to_value("byte"))


def restore_on_node(
    config: DeepPriorCoaddConfig,
    log: logging.Logger | logging.LoggerAdapter,
    label: str,
    observations: Sequence[Observation],
    layout: CellLayout,
    settings: RestoreSettings,
    network: TrainedNetwork | None,
    checkpoint: Path | None,
) -> tuple[Restoration, PsfRefinement | None, str, Path | None]:
    """Choose a device and restore a patch on it, or on the CPU if the memory of the device does not suffice.

    PSFs that are not known are learned before, on the same device.

    Parameters
    ----------
    config : `~lsst.coadd.deepprior.tasks.deep_prior_coadd_config.DeepPriorCoaddConfig`
        What may be used.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say what is used.
    label : `str`
        What messages call the patch.
    observations, layout, settings, network
        As in `~lsst.coadd.deepprior.restore.restore`.
    checkpoint : `~pathlib.Path` or `None`
        File that a fit keeps its state in.

    Returns
    -------
    restoration : `~lsst.coadd.deepprior.restore.Restoration`
        The restored patch.
    refinement : `~lsst.coadd.deepprior.psf_refinement.PsfRefinement` or `None`
        The PSFs that were learned, if any.
    device : `str`
        Where it was restored.
    own_checkpoint : `~pathlib.Path` or `None`
        ``checkpoint``, if the fit has read or written it.

    Raises
    ------
    RuntimeError
        Raised if a GPU is asked for and there is none, if its memory does not suffice and the CPU may not be
        used, or if the checkpoint is of other inputs or settings, or its directory cannot be made.
    """
    from ..restore import restore

    # The state of a fit belongs to the visits as they are: PSFs that are learned again differ in rounding.
    kept = None
    if checkpoint is not None:
        kept = open_checkpoint(config, log, inputs_digest(observations), settings, checkpoint)

    def restore_on(device: str, progress: Progress, batches: Batches) -> tuple[Any, Any]:
        visits, refinement = refined_observations(config, observations, layout, settings, device, progress)
        restoration = restore(
            visits,
            layout,
            settings,
            network=network,
            device=device,
            progress=progress,
            checkpoint=kept,
            batches=batches,
        )
        return restoration, refinement

    (restoration, refinement), device = run_on_node(config, log, label, restore_on)
    return restoration, refinement, device, None if kept is None else kept.own_file


def run_on_node[T](
    config: DeepPriorCoaddConfig,
    log: logging.Logger | logging.LoggerAdapter,
    label: str,
    work: Callable[[str, Progress, Batches], T],
) -> tuple[T, str]:
    """Choose a device and do some work on it, or on the CPU if the memory of the device does not suffice.

    Parameters
    ----------
    config : `~lsst.coadd.deepprior.tasks.deep_prior_coadd_config.DeepPriorCoaddConfig`
        What may be used.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say what is used.
    label : `str`
        What messages call the patch.
    work : `~collections.abc.Callable`
        The work; called with the device, where to tell the progress, and batches.

    Returns
    -------
    result
        What ``work`` returns.
    device : `str`
        Where it was done.

    Raises
    ------
    RuntimeError
        Raised if a GPU is asked for and there is none, or if its memory does not suffice and the CPU may not
        be used.
    """
    import torch

    from ..batches import Batches, is_out_of_memory
    from ..parallel import keep_freed_memory

    warn = partial(log.warning, "%s: %s.", label)
    device = choose_device(config.device, visible_gpus(warn) if config.device != "cpu" else (), os.getpid())
    log.info("%s: computing on %s.", label, device)
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(config.gpu_memory_fraction, device)
    progress = ProgressLines(lambda line: log.info("%s, %s.", label, line))
    keep_freed_memory()
    try:
        return work(device, progress, Batches(warn)), device
    except RuntimeError as err:
        if device == "cpu" or not config.cpu_fallback or not is_out_of_memory(err):
            raise
        warn(f"the memory of {device} does not suffice; going on on the CPU ({err})")
    # Behind the handler, where nothing refers to what the failed restoration has allocated.
    torch.cuda.empty_cache()
    return work("cpu", progress, Batches(warn)), "cpu"


def gpu_peak_bytes(device: str) -> int:
    """Return the largest number of bytes of a GPU that torch has held in this process, 0 on a CPU.

    Parameters
    ----------
    device : `str`
        Where a quantum was computed.

    Returns
    -------
    n_bytes : `int`
        The number.
    """
    import torch

    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else 0


def refined_observations(
    config: DeepPriorCoaddConfig,
    observations: Sequence[Observation],
    layout: CellLayout,
    settings: RestoreSettings,
    device: str,
    progress: Progress,
) -> tuple[Sequence[Observation], PsfRefinement | None]:
    """Return the visits with the PSFs that are to be used, and how these were learned, if they were.

    Parameters
    ----------
    config : `~lsst.coadd.deepprior.tasks.deep_prior_coadd_config.DeepPriorCoaddConfig`
        What is known of the PSFs.
    observations, layout, device, progress
        As in `~lsst.coadd.deepprior.psf_refinement.refine_psfs`.
    settings : `~lsst.coadd.deepprior.fitted_patch.RestoreSettings`
        The target PSF of the restoration.

    Returns
    -------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    refinement : `~lsst.coadd.deepprior.psf_refinement.PsfRefinement` or `None`
        What was learned.
    """
    from ..psf_refinement import CorrectedObservations, refine_psfs

    if config.psf_mode == "known":
        return observations, None
    refinement = refine_psfs(
        observations,
        layout,
        blind=config.psf_mode == "blind",
        target_fwhm=settings.target_fwhm,
        device=device,
        progress=progress,
    )
    return CorrectedObservations(observations, refinement), refinement


def open_checkpoint(
    config: DeepPriorCoaddConfig,
    log: logging.Logger | logging.LoggerAdapter,
    inputs: str,
    settings: RestoreSettings,
    path: Path,
    **further: Any,
) -> FitCheckpoint:
    """Say what the state of the fit belongs to.

    Parameters
    ----------
    config, log, settings
        As in `restore_on_node`.
    inputs : `str`
        Digest of all visits that the fit depends on.
    path : `~pathlib.Path`
        File that the fit keeps its state in.
    **further
        What else it depends on.

    Returns
    -------
    checkpoint : `~lsst.coadd.deepprior.fit_checkpoint.FitCheckpoint`
        Where the fit keeps its state.

    Raises
    ------
    RuntimeError
        Raised if the directory of the file cannot be made.
    """
    facts: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "inputs": inputs,
        "deepprior_version": __version__,
        **further,
    }
    if config.psf_mode != "known":
        facts["psf_mode"] = config.psf_mode
    try:
        return FitCheckpoint(path, config.checkpoint_every, facts, log)
    except OSError as err:
        raise RuntimeError(f"The directory of the checkpoint cannot be made: {err}") from err
