# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that restores a patch on finer pixels than its warps have."""

from __future__ import annotations

__all__ = ("FinerDeepPriorCoaddConfig", "FinerDeepPriorCoaddConnections", "FinerDeepPriorCoaddTask")

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsst.pipe.base import NoWorkFound, Struct
from lsst.pipe.base.connectionTypes import Input

from ..finer_skymap_dataset import FINER_SKYMAP_DATASET_TYPE, FINER_SKYMAP_STORAGE_CLASS
from ..finer_warps import FinerWarps, normal_skymap
from ..warps import Warp
from .deep_prior_coadd import DeepPriorCoaddTask
from .deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from .finer_inputs import FinerConfig, check_lookups, look_up_in_normal_skymap

if TYPE_CHECKING:
    from ..weights import TrainedNetwork

_LOG = logging.getLogger(__name__)


class FinerDeepPriorCoaddConnections(
    DeepPriorCoaddConnections, dimensions=("tract", "patch", "band", "skymap")
):
    """Inputs and outputs of `FinerDeepPriorCoaddTask`: the outputs have the finer skymap of the quantum."""

    finer_skymap = Input(
        doc="What deepprior finer-skymap has registered: the skymap has finer pixels than its warps.",
        name=FINER_SKYMAP_DATASET_TYPE,
        storageClass=FINER_SKYMAP_STORAGE_CLASS,
        dimensions=("skymap",),
    )

    def __init__(self, *, config: FinerDeepPriorCoaddConfig) -> None:
        super().__init__(config=config)
        self._oversampling = config.oversampling
        self._other_skymaps: set[str] = set()
        look_up_in_normal_skymap(self, config.oversampling)

    def adjustQuantum(self, inputs: Any, outputs: Any, label: str, data_id: Any) -> Any:  # noqa: N802
        """Leave out patches without warps, and skymaps that are finer by another factor."""
        skymap, oversampling = str(data_id["skymap"]), self._oversampling
        if normal_skymap(skymap, oversampling) is None:
            message = (
                f"The pixels of the skymap {skymap} are not {oversampling} times finer than those of warps; "
                f"deepprior finer-skymap --oversampling {oversampling} registers a skymap of such pixels."
            )
            # The graph builder shows why a quantum has no work only at level DEBUG.
            if skymap not in self._other_skymaps:
                self._other_skymaps.add(skymap)
                _LOG.info(message)
            raise NoWorkFound(message)
        check_lookups(inputs, data_id)
        return super().adjustQuantum(inputs, outputs, label, data_id)


class FinerDeepPriorCoaddConfig(
    DeepPriorCoaddConfig, FinerConfig, pipelineConnections=FinerDeepPriorCoaddConnections
):
    """Configuration of `FinerDeepPriorCoaddTask`; what is in pixels is in pixels of the coadds, but for
    ``cell_size``, which is in those of the warps.
    """

    def validate(self) -> None:
        """Check what `DeepPriorCoaddConfig` does, and that no PSFs are to be learned."""
        super().validate()
        if self.psf_mode != "known":
            raise ValueError(
                f"psf_mode = {self.psf_mode!r} works on the pixels of the warps only; on finer pixels it "
                "must be 'known'."
            )


class FinerDeepPriorCoaddTask(DeepPriorCoaddTask):
    """Restore a patch on finer pixels than its warps have, for a skymap of its own."""

    ConfigClass = FinerDeepPriorCoaddConfig
    _DefaultName = "deepPriorCoadd"
    config: FinerDeepPriorCoaddConfig

    def run(
        self,
        *,
        warps: Sequence[Warp],
        network: TrainedNetwork | None = None,
        n_threads: int = 1,
        memory_bytes: float | None = None,
        checkpoint: Path | None = None,
    ) -> Struct:
        """Restore a patch on finer pixels.

        Parameters
        ----------
        warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.Warp`]
            Visits of one patch and band, on their own pixels.
        network, n_threads, memory_bytes, checkpoint
            As those of `DeepPriorCoaddTask.run`.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            As that of `DeepPriorCoaddTask.run`, on finer pixels; the metadata of the coadds and the metrics
            say how much finer, as ``oversampling``.
        """
        oversampling = self.config.oversampling
        result = super().run(
            warps=FinerWarps(warps, oversampling),
            network=network,
            n_threads=n_threads,
            memory_bytes=memory_bytes,
            checkpoint=checkpoint,
        )
        for coadd in (result.coadd, result.residual):
            coadd.metadata["oversampling"] = oversampling
        result.metrics["oversampling"] = oversampling
        return result
