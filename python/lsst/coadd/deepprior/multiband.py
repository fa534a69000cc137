# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The restoration of all bands of a patch together: from arrays to arrays.

Each band is restored by itself, then they are coupled (`~lsst.coadd.deepprior.coupling`). Variance, noise
realisations and the check of the PSF are those of the coupled images: new noise is drawn in all bands at
once, and all that was done with the data is done with it again.
"""

from __future__ import annotations

__all__ = ("restore_bands",)

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .batches import Batches
from .coupling import BandLight, coupled, typical_ratio
from .fitted_patch import FittedPatch, Progress, RestoreSettings, fit_patch
from .noise import coadd_layers, local_variance
from .noise_correlation import visit_correlations
from .observation import Observation
from .operators import CellLayout
from .patch_data import NothingToRestoreError
from .psf import target_sigma
from .psf_check import InjectedStars, injected_latent, measure_leakage, place_stars
from .restore import Restoration, assemble, restore
from .weights import TrainedNetwork

if TYPE_CHECKING:
    from .fit_checkpoint import FitCheckpoint

_STANDARD = RestoreSettings()

_SEED_OF_BAND = 1_000_003
"""What the seed of the noise grows by from band to band, so that no two have the same."""


def restore_bands(
    observations: Mapping[str, Sequence[Observation]],
    layout: CellLayout,
    settings: RestoreSettings = _STANDARD,
    *,
    coupling: bool = True,
    network: TrainedNetwork | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    checkpoints: Mapping[str, FitCheckpoint] | None = None,
    batches: Batches | None = None,
) -> dict[str, Restoration]:
    """Restore all bands of a patch.

    Parameters
    ----------
    observations : `~collections.abc.Mapping` [`str`, `~collections.abc.Sequence` \
            [`~lsst.coadd.deepprior.observation.Observation`]]
        The visits of each band; indexed one at a time.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    settings : `~lsst.coadd.deepprior.fitted_patch.RestoreSettings`, optional
        Numerical settings.
    coupling : `bool`, optional
        Whether the bands share their structure. Without, or with one band only, the result is that of
        `~lsst.coadd.deepprior.restore.restore` band by band.
    network, device, progress, batches
        As in `~lsst.coadd.deepprior.restore.restore`; a phase is called by its name and the band.
    checkpoints : `~collections.abc.Mapping` [`str`, \
            `~lsst.coadd.deepprior.fit_checkpoint.FitCheckpoint`], optional
        Where the fit of each band keeps its state.

    Returns
    -------
    restorations : `dict` [`str`, `~lsst.coadd.deepprior.restore.Restoration`]
        The result of each band. Coupled bands have one target PSF, by default of half the median seeing of
        the visits of all.

    Raises
    ------
    NothingToRestoreError
        Raised if no visit has a PSF.
    ValueError
        Raised if there is no band or a band has no visit, and by `~lsst.coadd.deepprior.restore.restore`, as
        are other errors.
    """
    if not observations:
        raise ValueError("There is no band to restore.")
    for band, visits in observations.items():
        if len(visits) == 0:
            raise ValueError(f"The {band} band has no visit; leave it out.")
    couple = coupling and len(observations) > 1
    run: Any = restore
    if couple:
        # One that is asked for is checked with the seeing of each band.
        common = None if settings.target_fwhm is not None else _common_sigma(observations)
        run = functools.partial(fit_patch, sigma=common)

    fitted: dict[str, FittedPatch] = {}
    single: dict[str, Restoration] = {}
    for band, visits in observations.items():
        (fitted if couple else single)[band] = run(
            visits,
            layout,
            settings,
            network=network,
            device=device,
            progress=_of_band(progress, band),
            checkpoint=None if checkpoints is None else checkpoints.get(band),
            batches=batches,
        )
    return _finished(fitted, settings, progress) if couple else single


def _of_band(progress: Progress | None, band: str) -> Progress | None:
    """Return a function that calls another with the name of the band behind the phase."""
    if progress is None:
        return None
    return lambda phase, step, n_steps, loss: progress(f"{phase} {band}", step, n_steps, loss)


def _common_sigma(observations: Mapping[str, Sequence[Observation]]) -> float:
    """Return the sigma in pixels of the default target PSF of all bands."""
    seeing = np.array([visit.seeing() for visits in observations.values() for visit in visits])
    seeing = seeing[np.isfinite(seeing)]
    if len(seeing) == 0:
        raise NothingToRestoreError("No visit of any band of the patch has a PSF in any cell.")
    return target_sigma(seeing)


def _finished(
    fitted: Mapping[str, FittedPatch], settings: RestoreSettings, progress: Progress | None
) -> dict[str, Restoration]:
    """Couple bands and work out what is known of their errors."""
    mark = time.monotonic()
    marks = {}

    def end_of(phase: str) -> None:
        nonlocal mark
        marks[phase] = time.monotonic() - mark
        mark = time.monotonic()

    patches, others = _coupled_patches(fitted)
    images = [patch.image(patch.points.latent) for patch in patches]
    for band, image in zip(fitted, images, strict=True):
        if not np.isfinite(image).all():
            raise FloatingPointError(f"The restored image of {band} is not finite; please report this patch.")
    end_of("couple")
    layers = [coadd_layers(patch.data, patch.points.latent) for patch in patches]
    end_of("coadd")
    correlations = [visit_correlations(p.data, p.points.latent) for p in patches]
    differences, residuals = _draws(patches, images, correlations, settings, progress)
    end_of("noise")
    leakage: list[list[dict[str, Any]]] = [[] for _ in patches]
    if settings.check_psf:
        first_draws = [own[0] for own in differences]
        leakage = _leakages(patches, images, correlations, first_draws, settings.seed)
    end_of("psf")
    result = {}
    for place, (band, patch) in enumerate(zip(fitted, patches, strict=True)):
        patch.times.update(marks)
        variance = local_variance(differences[place], images[place], patch.noise)
        result[band] = assemble(
            patch, layers[place], variance, differences[place], residuals[place], leakage[place]
        )
        result[band].metrics["coupled_with"] = others[band]
    return result


def _coupled_patches(fitted: Mapping[str, FittedPatch]) -> tuple[list[FittedPatch], dict[str, list[str]]]:
    """Return the patches of all bands, those that are coupled with the latent images and points that this
    gives them, and the bands with which each is coupled.
    """
    points = coupled([BandLight(patch.data, patch.sets, patch.points.latent) for patch in fitted.values()])
    bands = [band for band, own in zip(fitted, points, strict=True) if own is not None]
    others = {band: [other for other in bands if other != band] if band in bands else [] for band in fitted}
    patches = [
        patch
        if own is None
        else dataclasses.replace(
            patch, points=own, method=f"{patch.method}, coupled with {', '.join(others[band])}"
        )
        for (band, patch), own in zip(fitted.items(), points, strict=True)
    ]
    return patches, others


def _draws(
    patches: Sequence[FittedPatch],
    images: Sequence[np.ndarray],
    correlations: Sequence[np.ndarray],
    settings: RestoreSettings,
    progress: Progress | None,
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Restore new noise on the models themselves; return, of each band, what changes in all realisations, and
    the residuals of those to publish.
    """
    latents = [patch.points.latent for patch in patches]
    differences: list[list[np.ndarray]] = [[] for _ in patches]
    residuals: list[list[np.ndarray]] = [[] for _ in patches]
    n_draws = max(settings.n_variance_draws, settings.n_noise_realizations)
    for draw in range(n_draws):
        seed = settings.seed + 1000 * (draw + 1)
        again = _restored_draw(patches, latents, seed, correlations)
        for place, (patch, latent) in enumerate(zip(patches, again, strict=True)):
            differences[place].append(patch.image(latent) - images[place])
            if draw < settings.n_noise_realizations:
                residual = patch.residual_of(
                    latent, latents[place], _seed_of(seed, place), correlations[place]
                )
                residuals[place].append(residual)
        if progress is not None:
            progress("noise", draw + 1, n_draws, float(np.std(differences[0][-1])))
    return differences, residuals


def _leakages(
    patches: Sequence[FittedPatch],
    images: Sequence[np.ndarray],
    correlations: Sequence[np.ndarray],
    first_draws: Sequence[np.ndarray],
    seed: int,
) -> list[list[dict[str, Any]]]:
    """Restore the first realisation once more, with stars in it; compare them with the target PSF.

    Nothing is restored where there is no room for a star.
    """
    stars = _common_stars(patches, images, seed)
    if len(stars[0].flux) == 0:
        return [[] for _ in patches]
    with_stars = [
        patch.points.latent + injected_latent(patch.data, own)
        for patch, own in zip(patches, stars, strict=True)
    ]
    again = _restored_draw(patches, with_stars, seed + 1000, correlations)
    return [
        measure_leakage(patch.image(latent) - (image + first), own, patch.data.sigma)
        for patch, latent, image, first, own in zip(patches, again, images, first_draws, stars, strict=True)
    ]


def _seed_of(seed: int, place: int) -> int:
    """Return the seed of the noise of a band."""
    return seed + _SEED_OF_BAND * place


def _restored_draw(
    patches: Sequence[FittedPatch],
    latents: Sequence[torch.Tensor],
    seed: int,
    correlations: Sequence[np.ndarray],
) -> list[torch.Tensor]:
    """Draw new noise on models of all bands; return what is restored from them together."""
    lights = []
    for place, (patch, latent) in enumerate(zip(patches, latents, strict=True)):
        noisy, again = patch.drawn(latent, _seed_of(seed, place), correlations[place])
        lights.append(BandLight(noisy, patch.sets, again))
    return [
        light.latent if own is None else own.latent
        for light, own in zip(lights, coupled(lights), strict=True)
    ]


def _common_stars(
    patches: Sequence[FittedPatch], images: Sequence[np.ndarray], seed: int
) -> list[InjectedStars]:
    """Choose stars for all bands, where all have data and are dark, of the typical colours of the patch.

    They have the wanted signal-to-noise ratios in the band of the least depth.
    """
    lights = [BandLight(patch.data, patch.sets, patch.points.latent) for patch in patches]
    depths = [_point_depth(patch) for patch in patches]
    # In the fluxes of the first band; where the data tell no ratio, stars have the same flux.
    ratios = [typical_ratio(light, lights[0]) or 1.0 for light in lights]
    expected = [ratio * depth for ratio, depth in zip(ratios, depths, strict=True)]
    least = int(np.argmin(expected))
    brightest = np.max([image * ratios[least] / r for image, r in zip(images, ratios, strict=True)], axis=0)
    seen = np.all([patch.data.weight.any(axis=0) for patch in patches], axis=0)
    stars = place_stars(patches[least].data, patches[least].observations, brightest, seed, seen)
    return [
        dataclasses.replace(
            stars,
            flux=stars.flux * ratio / ratios[least],
            snr=np.round(stars.snr * snr / expected[least], 1),
        )
        for ratio, snr in zip(ratios, expected, strict=True)
    ]


def _point_depth(patch: FittedPatch) -> float:
    """Return the signal-to-noise ratio of a point of 1 nJy in the middle one of the cells."""
    information = np.zeros(patch.data.weight.shape[1:])
    for weight, visit in zip(patch.data.weight, patch.observations, strict=True):
        information += weight * np.nansum(visit.psf**2, axis=(2, 3))
    return float(np.sqrt(np.median(information[information > 0.0])))
