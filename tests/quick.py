# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The restoration task with so few steps that a test can run it again and again."""

from __future__ import annotations

from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig

QUICK = {
    "init": "scratch",
    "base_steps": 20,
    "steps": 2,
    "n_splits": 2,
    "n_variance_draws": 1,
    "device": "cpu",
}


def quick_task(**settings: object) -> DeepPriorCoaddTask:
    """Make the task, with some settings other than `QUICK`."""
    config = DeepPriorCoaddConfig()
    config.update(**(QUICK | settings))
    return DeepPriorCoaddTask(config=config)
