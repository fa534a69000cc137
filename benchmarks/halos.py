# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How much of a large galaxy is in the restored image, by brightness? Writes ``halos.md``.

``python benchmarks/halos.py`` simulates galaxies that are larger than those of the training of the network,
with stars in front, and restores them.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click
import galsim
import numpy as np
from cache import write_text

from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.truth import GALSIM
from lsst.coadd.deepprior.weights import packaged_network

HERE = Path(__file__).parent
LAYOUT = CellLayout(10, 11, 20, 20)
NOISE = 30.0
"""Noise of a pixel of a visit in nJy."""

CENTRE = 100.4, 110.3
N_STARS = 14
BINS = ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 5.0), (5.0, 7.0), (7.0, 10.0))
"""True brightness in units of the noise of the coadd in a pixel."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A galaxy, and the visits that see it."""

    radius: float
    sersic: float
    flux: float
    n_visits: int
    start: str = "pretrained"


CASES = (
    Case(12.0, 2.0, 4e5, 5),
    Case(25.0, 2.0, 2e6, 2),
    Case(25.0, 2.0, 2e6, 5),
    Case(25.0, 2.0, 2e6, 12),
    Case(40.0, 1.0, 3e6, 5),
    Case(25.0, 2.0, 2e6, 5, "scratch"),
)


def simulate(case: Case) -> tuple[list[Observation], list[galsim.GSObject]]:
    """Return the visits, with FWHM from 3.4 to 5.2 pixels, and the objects of the sky."""
    rng = np.random.default_rng(1)
    (ny, nx), psf_size = LAYOUT.shape, 41
    galaxy = galsim.Sersic(n=case.sersic, half_light_radius=case.radius, flux=case.flux, gsparams=GALSIM)
    sky = [galaxy.shear(q=0.6, beta=30.0 * galsim.degrees)]
    for x, y, size in rng.uniform((15.0, 15.0, 3.0), (nx - 15.0, ny - 15.0, 5.0), (N_STARS, 3)):
        sky.append(galsim.DeltaFunction(flux=10.0**size).shift(x - CENTRE[0], y - CENTRE[1]))
    visits = []
    for number, fwhm in enumerate(np.linspace(3.4, 5.2, case.n_visits)):
        psf = galsim.Moffat(beta=3.5, fwhm=fwhm)
        stamp = psf.drawImage(nx=psf_size, ny=psf_size, scale=1.0, method="no_pixel", dtype=float).array
        stamps = np.broadcast_to(stamp / stamp.sum(), (LAYOUT.n_i, LAYOUT.n_j, psf_size, psf_size))
        flux = draw(sky, psf) + rng.normal(0.0, NOISE, LAYOUT.shape)
        visits.append(
            Observation(
                flux=flux.astype(np.float32),
                variance=np.full(LAYOUT.shape, NOISE**2, dtype=np.float32),
                good=np.ones(LAYOUT.shape, dtype=bool),
                psf=stamps.copy(),
                origin=(0, 0),
                name=f"visit {number}",
            )
        )
    return visits, sky


def draw(sky: list[galsim.GSObject], psf: galsim.GSObject) -> np.ndarray:
    """Return the sky through a PSF, (y, x)."""
    image = galsim.ImageD(LAYOUT.shape[1], LAYOUT.shape[0], xmin=0, ymin=0)
    for one in sky:
        galsim.Convolve(one, psf, gsparams=GALSIM).drawImage(
            image, method="no_pixel", scale=1.0, center=galsim.PositionD(*CENTRE), add_to_image=True
        )
    return image.array


def measure(case: Case) -> dict[str, Any]:
    """Restore a galaxy, and compare it with the truth."""
    visits, sky = simulate(case)
    network = packaged_network() if case.start == "pretrained" else None
    result = restore(visits, LAYOUT, RestoreSettings(check_psf=False), network=network)
    truth = draw(sky, galsim.Gaussian(sigma=result.target_sigma))
    noise = NOISE / np.sqrt(case.n_visits)
    chosen = [(truth > low * noise) & (truth < high * noise) for low, high in BINS]
    faint = chosen[1]
    return {
        "light": [float(result.image[pixels].sum() / truth[pixels].sum()) for pixels in chosen],
        "all": float(result.image.sum() / truth.sum()),
        "error": float(np.sqrt(np.mean((result.image - truth)[faint] ** 2))) / noise,
        "plane": float(np.sqrt(np.mean(result.variance[faint]))) / noise,
        "outliers": len(result.outliers),
        "clipped": float(result.clipped.mean()),
        "carried": float(result.prior_carried.mean()),
        "method": result.metrics["method"],
    }


@click.command()
@click.option("--output", default=HERE / "halos.md", type=click.Path(dir_okay=False, path_type=Path))
def main(output: Path) -> None:
    """Restore large galaxies and write how much of them is there."""
    os.environ["OMP_NUM_THREADS"] = "1"
    heads = [f"{low:g}-{high:g}" for low, high in BINS]
    lines = [
        "# Halos of large galaxies",
        "",
        "Written by `python benchmarks/halos.py`; do not edit. Sérsic galaxies with 14 stars in front, in a "
        "seeing of 3.4 to 5.2 pixels. Columns with two numbers are of pixels of this true brightness, in "
        "units of the noise of the coadd in a pixel: restored over true light. *Error* and *plane* are the "
        "rms error of the image and what its variance plane says, in pixels of 1 to 2. No outlier is real.",
        "",
        f"| half-light radius (pixels), index | visits | {' | '.join(heads)} | all | error | plane "
        "| outliers | CLIPPED | PRIOR_CARRIED | method |",
        "|---" * (len(BINS) + 9) + "|",
    ]
    for case in CASES:
        row = measure(case)
        light = " | ".join(f"{value:.2f}" for value in row["light"])
        lines.append(
            f"| {case.radius:g}, {case.sersic:g} | {case.n_visits} | {light} | {row['all']:.2f} | "
            f"{row['error']:.2f} | {row['plane']:.2f} | {row['outliers']} | {row['clipped']:.1%} | "
            f"{row['carried']:.0%} | {row['method']} |"
        )
        click.echo(lines[-1])
        write_text(output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
