# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Progress as lines of text."""

from __future__ import annotations

__all__ = ("ProgressLines", "counted")

import math
import time
from collections.abc import Callable

_INTERVAL = 10.0
"""Seconds between two lines of a phase."""


def counted(number: int, one: str, many: str) -> str:
    """Return a number with what it counts, ``1 patch`` or ``2 patches``.

    Parameters
    ----------
    number : `int`
        The number.
    one, many : `str`
        Singular and plural of what it counts.

    Returns
    -------
    text : `str`
        Both.
    """
    return f"{number} {one if number == 1 else many}"


class ProgressLines:
    """Puts progress into lines, at most one in `_INTERVAL` seconds and phase.

    Parameters
    ----------
    write : `~collections.abc.Callable`
        Called with each line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._phase = ""
        self._started = self._written = 0.0
        self._first = self._last = 0

    def __call__(self, phase: str, step: int, n_steps: int, loss: float = math.nan) -> None:
        """Write a line if it is time for one.

        Parameters
        ----------
        phase : `str`
            What is done, and, with several bands, the band behind it.
        step, n_steps : `int`
            Number of steps done, and of all.
        loss : `float`, optional
            The loss; where the phase is ``noise``, the rms of what the noise changes in nJy.
        """
        now = time.monotonic()
        begins = phase != self._phase or step < self._last
        self._last = step
        if begins:
            self._phase, self._started, self._first = phase, now, step
        elif now < self._written + _INTERVAL and step < n_steps:
            return
        self._written = now
        line = f"{phase}: {step} of {n_steps}"
        if not math.isnan(loss):
            of_noise = phase.split()[0] == "noise"
            line += f", rms {loss:.5g} nJy" if of_noise else f", loss {loss:.5g}"
        if self._first < step < n_steps:
            seconds = (now - self._started) / (step - self._first) * (n_steps - step)
            line += f", {seconds:.0f} s left"
        self._write(line)
