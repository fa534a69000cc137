# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that makes the source list of a restored patch."""

from __future__ import annotations

__all__ = ("MeasureDeepPriorCoaddConfig", "MeasureDeepPriorCoaddConnections", "MeasureDeepPriorCoaddTask")

from lsst.images.cells import CellCoadd
from lsst.pex.config import Field, RangeField
from lsst.pipe.base import PipelineTask, PipelineTaskConfig, PipelineTaskConnections, Struct
from lsst.pipe.base.connectionTypes import Input, Output

from ..progress import counted
from .geometry import pixel_to_sky, plain_coadd


class MeasureDeepPriorCoaddConnections(
    PipelineTaskConnections, dimensions=("tract", "patch", "band", "skymap")
):
    """Inputs and outputs of `MeasureDeepPriorCoaddTask`."""

    coadd = Input(
        doc="The restored image.",
        name="deep_prior_coadd",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    residual = Input(
        doc="Coadd of data minus model.",
        name="deep_prior_residual",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    sources = Output(
        doc="Sources of the restored image and of the residual, measured on both.",
        name="deep_prior_coadd_sources",
        storageClass="ArrowAstropy",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    measure_coadd = Output(
        doc="Restored image plus residual, for measurement tasks that read one image only.",
        name="deep_prior_measure_coadd",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )

    def __init__(self, *, config: MeasureDeepPriorCoaddConfig) -> None:
        if not config.write_measure_coadd:
            del self.measure_coadd


class MeasureDeepPriorCoaddConfig(PipelineTaskConfig, pipelineConnections=MeasureDeepPriorCoaddConnections):
    """Configuration of `MeasureDeepPriorCoaddTask`."""

    min_snr = RangeField(
        dtype=float,
        doc="Smallest ratio of a source's flux to its error, from the noise of the data. It is also the "
        "height of a peak above the saddle to a brighter one that makes it a source of its own, as the flux "
        "of a point source with that peak. Below 4, noise begins to enter the catalogue.",
        default=5.0,
        min=0.0,
        inclusiveMin=False,
    )
    min_rise = RangeField(
        dtype=float,
        doc="Smallest height of a peak of the restored image above the saddle to a brighter one, in standard "
        "deviations of the restored image (its variance plane), that makes it a source of its own. Smaller "
        "values split more close pairs and break more galaxies into pieces.",
        default=2.5,
        min=0.0,
    )
    threshold = RangeField(
        dtype=float,
        doc="Surface brightness of the restored image at which sources end, in units of the peak of a point "
        "source whose flux is one standard error of the data. It is below 1 because the restored image is "
        "much less noisy than the data; faint wings that it cuts off are missing from a source's shape.",
        default=0.7,
        min=0.0,
        inclusiveMin=False,
    )
    psf_error = RangeField(
        dtype=float,
        doc="Share of a neighbour's light under a source that errors of the PSF may have put there. What is "
        "fainter than min_snr times this share is taken for a trace of the neighbour, not for a source.",
        default=0.02,
        min=0.0,
    )
    write_measure_coadd = Field[bool](
        doc="Whether the restored image plus the residual is written as deep_prior_measure_coadd. Fluxes in "
        "it are those of the data, its PSF is inexact where the residual matters.",
        default=False,
    )


class MeasureDeepPriorCoaddTask(PipelineTask):
    """Detect sources on a restored image and measure them so that the prior cancels."""

    ConfigClass = MeasureDeepPriorCoaddConfig
    _DefaultName = "measureDeepPriorCoadd"
    config: MeasureDeepPriorCoaddConfig

    def run(self, *, coadd: CellCoadd, residual: CellCoadd) -> Struct:
        """Make the source list of a patch.

        Parameters
        ----------
        coadd : `lsst.images.cells.CellCoadd`
            The restored image of the patch.
        residual : `lsst.images.cells.CellCoadd`
            Coadd of data minus model of the same patch.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            ``sources`` (`astropy.table.Table`): see `~lsst.coadd.deepprior.measure.measure_sources`.  If
            the configuration asks for it, ``measure_coadd`` (`lsst.images.cells.CellCoadd`): see
            `~lsst.coadd.deepprior.measure_coadd.make_measure_coadd`.
        """
        from ..deblend import DetectionSettings
        from ..measure import MeasureInputs, measure_sources
        from ..measure_coadd import make_measure_coadd

        plain, target_sigma = plain_coadd(coadd, residual)
        inner = coadd.patch.inner_bbox
        inputs = MeasureInputs(
            model=coadd.image.array,
            model_variance=coadd.variance.array,
            target_sigma=target_sigma,
            coadd=plain,
            planes={name: coadd.mask.get(name) for name in ("SAT", "CLIPPED", "PRIOR_CARRIED")},
            origin=(coadd.bbox.y.start, coadd.bbox.x.start),
            inner=(slice(inner.y.start, inner.y.stop), slice(inner.x.start, inner.x.stop)),
        )
        settings = DetectionSettings(
            min_snr=self.config.min_snr,
            min_rise=self.config.min_rise,
            threshold=self.config.threshold,
            psf_error=self.config.psf_error,
        )
        sources = measure_sources(inputs, pixel_to_sky(coadd.sky_projection), settings)
        self.metadata["n_sources"] = len(sources)
        label = f"tract {coadd.tract}, patch {coadd.patch.id}, {coadd.band} band"
        self.log.info("%s: %s.", label, counted(len(sources), "source", "sources"))
        result = Struct(sources=sources)
        if self.config.write_measure_coadd:
            result.measure_coadd = make_measure_coadd(coadd, residual, plain)
        return result
