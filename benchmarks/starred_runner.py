# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Deconvolve one cutout of several visits with STARRED, a peer of the restoration.

STARRED (Michalewicz et al. 2023, JOSS 8, 5340; Millon et al. 2024, AJ 168, 55) fits ``data_i = s_i * h`` to
all visits at once, with an L1 penalty on the starlet coefficients of ``h``.  Without a catalogue of point
sources it is used in its extended mode: stars are part of the background ``h``.  Three choices are ours:

- ``h >= 0`` is a bound of its L-BFGS-B optimiser, which starts from the positive part of the plain coadd.
  With its default instead, a penalty of strength 100 on negative pixels, a scene of 64 x 64 pixels was far
  from the minimum after 1000 steps of L-BFGS-B and after 3000 of AdaBelief (by more than 6 dB in PSNR).
- The starlet weights come from the noise of all visits together, not from that of visit 0 alone, which may
  be partial.
- Shift, rotation and sky level of the visits are fixed at zero: warps are aligned and sky-subtracted.

The target PSF is that with which the caller made ``narrow_psf``: STARRED's own is a Gaussian of FWHM 2 pixels
(sigma 0.849), but without point sources nothing in it depends on that.  The grid is that of the data
(subsampling 1).  Light from outside the cutout ends up along its border: give it a margin.

It runs in the environment that ``starred_environment.sh`` makes, so this file imports nothing of the package.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from starred.deconvolution.deconvolution import setup_model
from starred.deconvolution.loss import Loss
from starred.deconvolution.parameters import ParametersDeconv
from starred.optim.optimization import Optimizer
from starred.utils.noise_utils import propagate_noise

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))

NOISE_SAMPLES = 500
"""Noise images behind the weights of the starlet coefficients, as in STARRED's own procedure."""

MASKED_VARIANCE = 1e12
"""Variance of a masked pixel in units of the typical variance; its flux is set to zero."""


def check_input(data: np.ndarray, variance: np.ndarray, good: np.ndarray, narrow_psf: np.ndarray) -> None:
    """Check the shapes and values of a cutout (see `deconvolve`)."""
    if data.ndim != 3 or data.shape[1] != data.shape[2]:
        raise ValueError(f"STARRED takes square cutouts (visit, y, x), not {data.shape}; cut squares.")
    if variance.shape != data.shape or good.shape != data.shape:
        raise ValueError(f"data {data.shape}, variance {variance.shape} and good {good.shape} must be alike.")
    n_visits, size = data.shape[:2]
    k = narrow_psf.shape[-1]
    if narrow_psf.shape != (n_visits, k, k) or k % 2 == 0 or k > size:
        raise ValueError(
            f"narrow_psf must be ({n_visits}, k, k) with an odd k of at most {size}, not {narrow_psf.shape}."
        )
    if not np.all(np.isfinite(narrow_psf)):
        raise ValueError("narrow_psf is not finite; leave out visits without a PSF.")
    if not good.any(axis=(1, 2)).all():
        raise ValueError("A visit has no good pixel; leave it out.")
    if not np.all(np.isfinite(data[good])) or not np.all(variance[good] > 0.0):
        raise ValueError("A good pixel has a flux that is not finite or a variance that is not positive.")


def starlet_weights(
    model: Any, sigma_2: np.ndarray, covered: np.ndarray, start: dict[str, Any]
) -> np.ndarray:
    """Return the noise of the starlet coefficients, (scale, y, x), which scales the penalty.

    STARRED takes visit 0 as typical of all.  Here the typical visit has the PSF of visit 0, but the noise
    with which that many visits would make a coadd as deep as the real one, so that masks and partial visits
    enter as they do in the data term.

    Parameters
    ----------
    model : `starred.deconvolution.deconvolution.Deconv`
        Model.
    sigma_2 : `numpy.ndarray`, (visit, y, x)
        Variance, huge where masked.
    covered : `numpy.ndarray`, (y, x), bool
        Pixels that are good in any visit; the others get the median noise.
    start : `dict`
        First parameters of the model.
    """
    variance = len(sigma_2) / np.sum(1.0 / sigma_2, axis=0)
    noise = np.sqrt(np.where(covered, variance, np.median(variance[covered])))
    visits = np.broadcast_to(noise, sigma_2.shape)
    return np.asarray(
        propagate_noise(model, visits, start, method="MC", num_samples=NOISE_SAMPLES, seed=1)[0]
    )


def deconvolve(
    data: np.ndarray,
    variance: np.ndarray,
    good: np.ndarray,
    narrow_psf: np.ndarray,
    *,
    lambda_scales: float,
    lambda_hf: float,
    iterations: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """Deconvolve one cutout.

    Parameters
    ----------
    data, variance : `numpy.ndarray`, (visit, y, x)
        Flux in nJy and its variance in nJy^2; square.
    good : `numpy.ndarray`, (visit, y, x), bool
        Pixels that may be used.
    narrow_psf : `numpy.ndarray`, (visit, k, k)
        Kernel s of each visit with ``g * s = PSF``, g the target; k odd and no larger than the cutout.
    lambda_scales, lambda_hf : `float`
        Strength of the penalty on all starlet scales but the finest, and on the finest.
    iterations : `int`
        Largest number of steps of the optimiser.

    Returns
    -------
    image : `numpy.ndarray`, (y, x), float32
        Image in nJy at the target PSF, NaN where no visit has a good pixel.
    fit : `dict` [`str`, `float`]
        ``chi2``, the mean of the squared residuals over the variance of all good pixels, and ``steps``, which
        the optimiser took.

    Raises
    ------
    ValueError
        Raised if the shapes do not fit, or if the input is not finite where it is used.
    RuntimeError
        Raised if STARRED returns an image that is not finite.
    """
    check_input(data, variance, good, narrow_psf)
    order = np.argsort(np.sum(narrow_psf**2, axis=(1, 2)))
    order = np.roll(order, -(len(order) // 2))  # the visit of median sharpness first
    data, variance, good, narrow_psf = (array[order] for array in (data, variance, good, narrow_psf))

    unit = float(np.sqrt(np.median(variance[good])))
    flux = np.where(good, data, 0.0) / unit
    sigma_2 = np.where(good, variance / unit**2, MASKED_VARIANCE)

    nothing = np.zeros(0)
    model, start, upper, lower, fixed = setup_model(
        flux, sigma_2, jnp.asarray(narrow_psf), nothing, nothing, 1, initial_a=np.zeros(0)
    )
    coadd = np.sum(flux / sigma_2, axis=0) / np.sum(1.0 / sigma_2, axis=0)
    start["kwargs_background"]["h"] = np.maximum(coadd, 0.0).ravel()
    lower["kwargs_background"]["h"] = [0.0] * flux[0].size
    still = np.zeros(len(flux))
    fixed["kwargs_analytic"].update(dx=still, dy=still, alpha=still, c_x=nothing, c_y=nothing, a=nothing)
    fixed["kwargs_background"]["mean"] = still
    parameters = ParametersDeconv(start, fixed, upper, lower)
    loss = Loss(
        flux,
        model,
        parameters,
        sigma_2,
        regularization_strength_scales=lambda_scales,
        regularization_strength_hf=lambda_hf,
        W=starlet_weights(model, sigma_2, good.any(axis=0), start),
    )
    optimiser = Optimizer(loss, parameters, method="l-bfgs-b")
    _, _, report, _ = optimiser.minimize(maxiter=iterations, maxfun=2 * iterations, ftol=0.0, gtol=0.0)
    best = parameters.best_fit_values(as_kwargs=True)
    size = data.shape[1]
    image = np.asarray(best["kwargs_background"]["h"], dtype=np.float32).reshape(size, size) * unit
    if not np.all(np.isfinite(image)):
        raise RuntimeError("STARRED returned an image that is not finite; look at the input of this cutout.")
    residual = np.asarray(model.model(best)) - flux
    chi2 = float(np.mean(residual[good] ** 2 / sigma_2[good]))
    return np.where(good.any(axis=0), image, np.nan), {"chi2": chi2, "steps": report["stat"].iter_num}


def target_stamp(fwhm: float) -> np.ndarray:
    """Return the target Gaussian at pixel centres out to 5 sigma, of unit sum, (k, k)."""
    sigma = fwhm / FWHM_PER_SIGMA
    grid = np.arange(-math.ceil(5.0 * sigma), math.ceil(5.0 * sigma) + 1)
    row = np.exp(-0.5 * (grid / sigma) ** 2)
    return np.outer(row, row) / row.sum() ** 2


def main() -> None:
    """Read a cutout, deconvolve it, and write the image, its PSF, the cost and the settings.

    INPUT holds ``data``, ``variance`` and ``good`` (visit, y, x), ``narrow_psf`` (visit, k, k), made for a
    Gaussian target of FWHM ``target_fwhm`` in pixels.  OUTPUT holds ``image`` (y, x) in nJy, ``psf`` (k, k),
    ``seconds`` and ``cpu_seconds`` (of the fit with its compilation), ``peak_memory`` in bytes and
    ``settings`` (JSON).
    """
    parser = argparse.ArgumentParser(description="Deconvolve a cutout of several visits with STARRED.")
    parser.add_argument("input", type=Path, metavar="INPUT.npz")
    parser.add_argument("output", type=Path, metavar="OUTPUT.npz")
    parser.add_argument("--lambda-scales", type=float, default=0.1)
    parser.add_argument("--lambda-hf", type=float, default=0.1)
    parser.add_argument("--iterations", type=int, default=300)
    arguments = parser.parse_args()
    settings: dict[str, Any] = {
        "lambda_scales": arguments.lambda_scales,
        "lambda_hf": arguments.lambda_hf,
        "iterations": arguments.iterations,
    }
    with np.load(arguments.input) as cutout:
        inputs = [cutout[key] for key in ("data", "variance", "good", "narrow_psf")]
        target_fwhm = float(cutout["target_fwhm"])
    start, cpu_start = time.perf_counter(), time.process_time()
    image, fit = deconvolve(*inputs, **settings)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    versions = {name: version(name) for name in ("starred-astro", "jax", "numpy", "scipy")}
    np.savez(
        arguments.output,
        image=image,
        psf=target_stamp(target_fwhm),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        settings=json.dumps(settings | fit | {"target_fwhm": target_fwhm, "versions": versions}),
    )


if __name__ == "__main__":
    main()
