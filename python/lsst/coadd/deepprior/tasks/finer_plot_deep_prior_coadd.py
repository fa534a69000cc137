# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that draws the figure of a patch that was restored on finer pixels."""

from __future__ import annotations

__all__ = (
    "FinerPlotDeepPriorCoaddConfig",
    "FinerPlotDeepPriorCoaddConnections",
    "FinerPlotDeepPriorCoaddTask",
)

from typing import Any

from lsst.images.cells import CellCoadd

from ..direct_warps import PatchGeometry
from ..finer_warps import coarser_geometry, finer_warp
from ..warps import Warp
from .finer_inputs import FinerConfig, check_lookups, look_up_in_normal_skymap
from .plot_deep_prior_coadd import (
    PlotDeepPriorCoaddConfig,
    PlotDeepPriorCoaddConnections,
    PlotDeepPriorCoaddTask,
)


class FinerPlotDeepPriorCoaddConnections(
    PlotDeepPriorCoaddConnections, dimensions=("tract", "patch", "band", "skymap")
):
    """Inputs and outputs of `FinerPlotDeepPriorCoaddTask`."""

    def __init__(self, *, config: FinerPlotDeepPriorCoaddConfig) -> None:
        super().__init__(config=config)
        look_up_in_normal_skymap(self, config.oversampling)

    def adjustQuantum(self, inputs: Any, outputs: Any, label: str, data_id: Any) -> Any:  # noqa: N802
        """Leave out patches whose warps are not among the input collections."""
        check_lookups(inputs, data_id)
        return super().adjustQuantum(inputs, outputs, label, data_id)


class FinerPlotDeepPriorCoaddConfig(
    PlotDeepPriorCoaddConfig, FinerConfig, pipelineConnections=FinerPlotDeepPriorCoaddConnections
):
    """Configuration of `FinerPlotDeepPriorCoaddTask`."""


class FinerPlotDeepPriorCoaddTask(PlotDeepPriorCoaddTask):
    """Draw the figure of a patch that was restored on finer pixels than its warps have."""

    ConfigClass = FinerPlotDeepPriorCoaddConfig
    _DefaultName = "plotDeepPriorCoadd"
    config: FinerPlotDeepPriorCoaddConfig

    def _warp_geometry(self, coadd: CellCoadd) -> PatchGeometry:
        """Return where the patch lies in the pixels of the warps."""
        return coarser_geometry(coadd.patch, coadd.sky_projection, self.config.oversampling)

    def _shown_warp(self, warp: Warp) -> Warp:
        """Return a warp in the pixels of the coadd."""
        return finer_warp(warp, self.config.oversampling)
