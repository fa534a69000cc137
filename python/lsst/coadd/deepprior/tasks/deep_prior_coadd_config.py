# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What the task that restores a patch reads and writes, and what may be set."""

from __future__ import annotations

__all__ = ("DeepPriorCoaddConfig", "DeepPriorCoaddConnections")

from lsst.pex.config import ChoiceField, Field, ListField, RangeField
from lsst.pipe.base import PipelineTaskConfig
from lsst.pipe.base.connectionTypes import Output, PrerequisiteInput

from ..network_dataset import NETWORK_DATASET_TYPE, NETWORK_STORAGE_CLASS
from ..numerical_settings import MAX_SEED
from ..psf import SAMPLED_FWHM
from .direct_warp_inputs import DirectWarpConfig, DirectWarpConnections


class DeepPriorCoaddConnections(DirectWarpConnections, dimensions=("tract", "patch", "band", "skymap")):
    """Inputs and outputs of `~lsst.coadd.deepprior.tasks.deep_prior_coadd.DeepPriorCoaddTask`."""

    network = PrerequisiteInput(
        doc="Trained network, where the configuration asks for one. Like other packages of weights it has no "
        "dimensions: it works in pixels and in units of the noise, and knows neither the instrument nor the "
        "band. Which one is used is a matter of the input collections.",
        name=NETWORK_DATASET_TYPE,
        storageClass=NETWORK_STORAGE_CLASS,
        dimensions=(),
    )
    coadd = Output(
        doc="The restored image with its variance, masks, PSF (the target PSF) and provenance.",
        name="deep_prior_coadd",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    residual = Output(
        doc="Coadd of data minus model, with the PSF and variance of the plain coadd.",
        name="deep_prior_residual",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    outliers = Output(
        doc="What single visits show and the sky does not, CLIPPED in the coadds: transients, satellites.",
        name="deep_prior_coadd_outliers",
        storageClass="ArrowAstropy",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    visit_psfs = Output(
        doc="PSF of each visit as it was learned, with psf_mode = refine or blind: a one-visit cell coadd "
        "that has the PSF, the projection and the provenance of the visit, and quality flags in its "
        "metadata, but no pixels: all are NaN.",
        name="deep_prior_visit_psf",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "skymap", "visit", "instrument"),
        multiple=True,
    )
    metrics = Output(
        doc="Numbers of the run: losses, PSFs, noise, times.",
        name="deep_prior_coadd_metrics",
        storageClass="StructuredDataDict",
        dimensions=("tract", "patch", "band", "skymap"),
    )

    def __init__(self, *, config: DeepPriorCoaddConfig) -> None:
        super().__init__(config=config)
        if not config.network_from_butler:
            del self.network
        if config.psf_mode == "known":
            del self.visit_psfs


class DeepPriorCoaddConfig(
    DirectWarpConfig, PipelineTaskConfig, pipelineConnections=DeepPriorCoaddConnections
):
    """Configuration of `~lsst.coadd.deepprior.tasks.deep_prior_coadd.DeepPriorCoaddTask`."""

    init = ChoiceField[str](
        doc="What the network starts from.",
        default="pretrained",
        optional=False,
        allowed={
            "pretrained": "A trained network is used as it is, without a step of fitting. Patches that lie "
            "outside of what it was trained on take the scratch start, with a warning.",
            "scratch": "A network with random weights is fitted to the visits of the patch, which takes "
            "longer and needs no training.",
        },
    )
    network_from_butler = Field[bool](
        doc="Whether the trained network is the dataset deep_prior_network of the input collections, and not "
        "the one that comes with the package.",
        default=False,
    )
    psf_mode = ChoiceField[str](
        doc="What is known of the PSFs of the visits.",
        default="known",
        optional=False,
        allowed={
            "known": "The PSFs that come with the warps are taken as they are.",
            "refine": "They are nearly right: a small correction of each is learned from the visits, and "
            "with it the flux scale, the shift and the background of each visit relative to the others.",
            "blind": "No more than the FWHM of each is near: the PSFs are learned from the visits, and the "
            "rest as with refine. What the PSFs of all visits have in common needs stars in the patch, at "
            "least 5 above a signal-to-noise ratio of 50.",
        },
    )
    target_fwhm_arcsec = RangeField(
        dtype=float,
        doc="FWHM in arcsec of the PSF of the restored image. Without it (and without target_fwhm_pixels) it "
        "is half the median seeing of the visits, at most 0.9 of the best, and at least 2 pixels. A narrower "
        "PSF shows more detail, which relies more on the prior; below "
        f"{SAMPLED_FWHM} pixels the pixels do not sample it any more.",
        default=None,
        optional=True,
        min=0.0,
        inclusiveMin=False,
    )
    target_fwhm_pixels = RangeField(
        dtype=float,
        doc="The same in pixels; only one of the two can be set.",
        default=None,
        optional=True,
        min=SAMPLED_FWHM,
    )
    bad_mask_planes = ListField[str](
        doc="Mask planes of a warp whose pixels are not used. Planes that a warp does not have are ignored, "
        "since warps of different origin name them differently. Interpolated pixels are among them because "
        "they repeat what their neighbours say.",
        default=[
            "BAD",
            "CLIPPED",
            "COSMIC_RAY",
            "CR",
            "EDGE",
            "INTERPOLATED",
            "INTRP",
            "NO_DATA",
            "SAT",
            "SATURATED",
            "SUSPECT",
            "UNMASKEDNAN",
            "UNMASKED_NAN",
        ],
    )
    base_steps = RangeField(
        dtype=int,
        doc="Number of steps of the maximum-likelihood image that the network corrects. With fewer steps "
        "bright stars stay wider than the target PSF. A trained network knows images of the number of steps "
        "that it was trained with alone, 240 for that of the package; with others the start is scratch.",
        default=240,
        min=1,
    )
    steps = RangeField(
        dtype=int,
        doc="Number of steps of the fit of the network from scratch. With 0 that start makes no network, and "
        "its result is the maximum-likelihood image that the network would correct.",
        default=400,
        min=0,
    )
    refresh_every = RangeField(
        dtype=int,
        doc="Number of steps between two passes over all visits, in which outliers are found anew. Smaller "
        "values cost time and gain little.",
        default=25,
        min=1,
    )
    learning_rate = RangeField(
        dtype=float,
        doc="Largest learning rate of the fit. The fit stops with an error if it diverges; lower it then.",
        default=2e-3,
        min=0.0,
        inclusiveMin=False,
    )
    n_splits = RangeField(
        dtype=int,
        doc="Number of ways in which the fit from scratch splits the visits into those that the network "
        "reads and those it is judged by, which is what keeps it from fitting noise. More splits give a "
        "better result and take more time and memory; with up to four visits there are only as many as "
        "visits.",
        default=24,
        min=1,
    )
    huber_delta = RangeField(
        dtype=float,
        doc="Deviation of a pixel from the model, in standard deviations, above which it counts linearly and "
        "not quadratically, so that unmasked cosmic rays and trails lose their weight.",
        default=1.5,
        min=0.0,
        inclusiveMin=False,
    )
    psf_error = RangeField(
        dtype=float,
        doc="Relative error of the PSF models, which is added to the noise in proportion to the flux, "
        "so that the cores of bright stars are not taken for outliers.",
        default=0.01,
        min=0.0,
    )
    n_variance_draws = RangeField(
        dtype=int,
        doc="Least number of times that simulated noise is restored for the variance plane, whose relative "
        "error falls with its root; each costs about a third of what the base image does.",
        default=4,
        min=1,
    )
    n_noise_realizations = RangeField(
        dtype=int,
        doc="Number of noise realisations that are stored with the restored image and the residual, with the "
        "correlation between pixels of the warps. More than n_variance_draws cost more draws.",
        default=1,
        min=0,
    )
    check_psf = Field[bool](
        doc="Whether stars are injected into the visits and their PSF on the restored image is compared with "
        "the advertised one, for the metrics. It costs as much as one more noise realisation.",
        default=True,
    )
    min_visits = RangeField(
        dtype=int,
        doc="Cells in which fewer visits have a good pixel get the plane FEW_VISITS. It has no effect on the "
        "rejection of outliers, which takes at least three visits that cover as much of the cell as any "
        "visit does.",
        default=3,
        min=1,
    )
    seed = RangeField(
        dtype=int,
        doc="Seed of all random numbers. The same inputs, configuration and seed give the same result.",
        default=1,
        min=0,
        max=MAX_SEED,
    )
    device = ChoiceField[str](
        doc="Where to compute.",
        default="auto",
        optional=False,
        allowed={
            "auto": "A GPU if torch finds one, otherwise the CPU. Of the GPUs that the batch system has "
            "given to the job it is the one with the largest part of its memory free.",
            "cpu": "The CPU, with as many threads as the quantum was given cores.",
            "cuda": "A GPU, chosen in the same way; without one the task fails.",
        },
    )
    gpu_memory_fraction = RangeField(
        dtype=float,
        doc="Part of the memory of a GPU that a quantum may take. Set it to 0.5 where two quanta share a "
        "GPU, so that none takes what the other needs. A fit for which it does not suffice goes on with "
        "fewer splits of the visits at a time.",
        default=1.0,
        min=0.0,
        max=1.0,
        inclusiveMin=False,
        inclusiveMax=True,
    )
    cpu_fallback = Field[bool](
        doc="Whether a quantum for which the memory of the GPU does not suffice in any way is restored on "
        "the CPU, which takes much longer. Otherwise it fails.",
        default=True,
    )
    checkpoint_dir = Field[str](
        doc="Directory in which the fit from scratch keeps its state, one file a patch and band, so that a "
        "quantum that was killed goes on where it was when it is run again. It must outlive the job, and be "
        "seen by whatever node takes the retry. Environment variables in it are those of the job. The file "
        "is removed once the outputs are stored. Without a directory nothing is kept.",
        default=None,
        optional=True,
    )
    checkpoint_every = RangeField(
        dtype=int,
        doc="Number of steps of the fit between two times that its state is written; SIGTERM has it written "
        "at once. The state has a few MB, whatever the size of the patch.",
        default=25,
        min=1,
    )
    cache_gib = RangeField(
        dtype=float,
        doc="Memory in GiB that pixels of warps may take between two passes over the visits. Warps that do "
        "not fit go to cache_dir or are read again in each pass, so that any number of visits can be "
        "restored. Without a number it is a quarter of the memory that the quantum may take (that of the "
        "machine unless pipetask says otherwise), and at most 1.5 GiB, which hold 15 visits of a patch of "
        "3400 pixels.",
        default=None,
        optional=True,
        min=0.0,
    )
    cache_dir = Field[str](
        doc="Directory on a disk of the node that keeps pixels of warps which do not fit in cache_gib, "
        "9 bytes a pixel, while the quantum runs; it must not be in memory, as /tmp is on some systems. "
        "Reading them there takes some per cent of the time of reading the warps. Environment variables in "
        "it are those of the job. Without a directory, or without room there, warps are read again.",
        default=None,
        optional=True,
    )

    def validate(self) -> None:
        """Check that fields do not contradict each other, and that mask planes are names."""
        super().validate()
        if self.network_from_butler and self.init != "pretrained":
            raise ValueError("network_from_butler needs init = 'pretrained'.")
        if self.target_fwhm_arcsec is not None and self.target_fwhm_pixels is not None:
            raise ValueError("Set target_fwhm_arcsec or target_fwhm_pixels, not both.")
        # A list field takes a text for the list of its letters.
        if any(len(plane) < 2 for plane in self.bad_mask_planes):
            raise ValueError(
                f"bad_mask_planes = {list(self.bad_mask_planes)} are letters and not names; give a list, "
                "such as \"['SAT', 'BAD']\"."
            )
