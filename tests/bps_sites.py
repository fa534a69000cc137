# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Parsl sites whose manager listens on the loopback interface, for the tests."""

from __future__ import annotations

from lsst.ctrl.bps.parsl.sites import Local, Slurm


class LoopbackLocal(Local):
    """This machine."""

    def get_executors(self) -> list:
        executors = super().get_executors()
        for executor in executors:
            executor.address = "127.0.0.1"
            executor.all_addresses = {"127.0.0.1"}
        return executors


class LoopbackSlurm(Slurm):
    """A Slurm on this machine."""

    def get_address(self) -> str:
        return "127.0.0.1"
