# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The state of the fit to a patch on disk, so that a job that is killed goes on where it was."""

from __future__ import annotations

__all__ = ("FitCheckpoint", "checkpoint_file", "inputs_digest", "remove_checkpoint")

import contextlib
import glob
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from .checkpoint import DamagedCheckpointError, read_checkpoint, write_checkpoint
from .job_directories import job_directory
from .observation import Observation

if TYPE_CHECKING:
    import torch

_ADVICE = "Remove it to start anew, or choose another checkpoint_dir."

_STATUS = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM has ended, as shells give it."""


def checkpoint_file(directory: str, data_id: Iterable[str | int]) -> Path:
    """Name the file of the fit to one patch and band.

    Parameters
    ----------
    directory : `str`
        Directory of all such files; environment variables and ``~`` in it are replaced.
    data_id : `~collections.abc.Iterable` [`str` or `int`]
        What tells the patch and band from others.

    Returns
    -------
    path : `~pathlib.Path`
        The file.

    Raises
    ------
    RuntimeError
        Raised if an environment variable in ``directory`` is not set.
    """
    name = "_".join(quote(str(part), safe="") for part in data_id)
    return job_directory("checkpoint_dir", directory) / f"{name}.safetensors"


def inputs_digest(observations: Iterable[Observation]) -> str:
    """Compute the SHA-256 of visits: pixels, noise images, PSFs, positions, steps of pixels and names.

    Parameters
    ----------
    observations : `~collections.abc.Iterable` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits, in the order in which they are used.

    Returns
    -------
    digest : `str`
        Changes whenever the visits do.
    """
    digest = hashlib.sha256()
    for one in observations:
        shapes = one.flux.shape, one.psf.shape
        digest.update(repr((one.name, one.origin, one.sampling, *shapes, one.noise is None)).encode())
        for array in (one.flux, one.variance, one.good, one.psf, one.noise):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def remove_checkpoint(path: Path, log: logging.Logger | logging.LoggerAdapter) -> None:
    """Remove the file of a fit whose outputs are stored.

    Outputs that are stored are no failure, so a file that cannot be removed, since another user owns it for
    instance, is worth a warning.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file; it need not be there.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say that it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        log.warning("The outputs are stored, but the checkpoint cannot be removed: %s", err)


class FitCheckpoint:
    """Keeps the state of a fit in a file.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file. Its directory is made if it is not there.
    every : `int`
        Number of steps between two times that it is written.
    facts : `dict`
        What the fit belongs to, inputs and settings, as far as JSON can say it.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say what was written and read.

    Raises
    ------
    OSError
        Raised if the directory cannot be made.
    """

    def __init__(
        self, path: Path, every: int, facts: dict[str, Any], log: logging.Logger | logging.LoggerAdapter
    ) -> None:
        if every < 1:
            raise ValueError(f"A checkpoint can be written every step or less often, not every {every}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._every = every
        self._facts = facts
        self._log = log
        self._lock = threading.Lock()
        self._kept: dict[str, torch.Tensor] | None = None
        self._n_taken = 0
        self._is_own = False

    @property
    def own_file(self) -> Path | None:
        """The file, if it holds a state of this fit, read or written by it (`~pathlib.Path` or `None`)."""
        return self._path if self._is_own else None

    def load(self) -> dict[str, torch.Tensor] | None:
        """Read the state to go on from.

        A damaged file is said to be one, and the fit starts over, since otherwise no retry would ever
        succeed.

        Returns
        -------
        state : `dict` [`str`, `torch.Tensor`] or `None`
            What was given to `keep`, with the number of steps as ``step``; `None` if there is none.

        Raises
        ------
        CheckpointError
            Raised if the state belongs to other inputs or settings.
        """
        for left_over in self._path.parent.glob(f".{glob.escape(self._path.name)}.*"):
            # Of a process that was killed while it wrote; it may belong to others, or the disk be read-only.
            with contextlib.suppress(OSError):
                left_over.unlink()
        try:
            state = read_checkpoint(self._path, self._facts, owner="a fit", advice=_ADVICE)
        except DamagedCheckpointError as err:
            self._log.warning("%s The fit starts over.", str(err).removesuffix(_ADVICE).rstrip())
            return None
        if state is not None:
            self._is_own = True
            self._log.info("The fit goes on after step %d from %s.", int(state["step"]), self._path)
        return state

    def keep(self, step: int, n_steps: int, state: dict[str, torch.Tensor]) -> None:
        """Take the state after a step, and write it if it is time to, or the last step.

        A file that cannot be written is no reason to end a fit: a warning says so.

        Parameters
        ----------
        step, n_steps : `int`
            Number of steps done, and of all.
        state : `dict` [`str`, `torch.Tensor`]
            Copies of all that changes.
        """
        import torch

        self._n_taken += 1
        with self._lock:
            self._kept = state | {"step": torch.tensor(step)}
        if step % self._every == 0 or step == n_steps:
            self._write()
        if step == n_steps:
            self._log.info("The fit has %d steps, %d of them taken in this process.", n_steps, self._n_taken)
            self._n_taken = 0

    def _write(self) -> None:
        """Write the last state that was kept."""
        with self._lock:
            if self._kept is None:
                self._log.info("No step of the fit was taken yet, and no checkpoint is written.")
                return
            try:
                write_checkpoint(self._path, self._kept, self._facts)
            except OSError as err:
                self._log.warning("The checkpoint cannot be written: %s", err)
                return
            self._is_own = True
        self._log.debug("The state of the fit is in %s.", self._path)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Write the last state before SIGTERM ends the process.

        A signal handler of Python waits for the step that is being computed, which may take minutes. So a
        thread waits for the signal instead, and ends the process with the usual status once the file is
        written. Whoever has a handler of their own for SIGTERM keeps it.
        """
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        ):
            yield
            return
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        outer = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(outer)
            os.close(write_end)
            watcher.join()
            os.close(read_end)

    def _watch(self, read_end: int) -> None:
        """Wait for the numbers of signals until the pipe is closed."""
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                try:
                    self._log.warning("SIGTERM: writing the checkpoint %s.", self._path)
                    self._write()
                finally:
                    os._exit(_STATUS)
