# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Runs the real pipetask, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PIPELINE = "$COADD_DEEPPRIOR_DIR/pipelines/deepPriorCoadd.yaml"

QUICK = [
    argument
    for setting in ("base_steps=20", "steps=2", "n_splits=2", "n_variance_draws=1", "device=cpu")
    for argument in ("-c", f"deepPriorCoadd:{setting}")
]
"""A configuration that shows that everything runs, at no useful quality."""


def command_of(command: str, *arguments: str | Path) -> list[str]:
    """Return the words of a subcommand of pipetask."""
    return [str(Path(sys.executable).with_name("pipetask")), command, *map(str, arguments)]


def pipetask(
    command: str, *arguments: str | Path, timeout: float = 300.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a subcommand of pipetask, with variables in its environment; all output is in ``stdout``."""
    return subprocess.run(
        command_of(command, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | variables,
    )
