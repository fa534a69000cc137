# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The report of the calibration benchmark."""

from __future__ import annotations

__all__ = ("make",)

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from injection import COMPANION_ARCSEC, COMPANION_SNR, GALAXY_BINS, STAR_BINS

_ENOUGH = 200
"""Number of sources from which a bin is judged."""

_MIN_SNR = 7.0

_HEAD = """# Calibration: do fluxes, errors, positions, noise and masks say the truth?

Written by `python benchmarks/calibration.py`; do not edit. Scenes of 256x256 pixels of the families
*standard* (white noise), *correlated_noise* (Lanczos-resampled) and *background_errors* (offsets and slopes
of 0.02 sky noise), each with stars and galaxies of the same population injected where nothing disturbs them,
and restored with the network of the package. Isolated sources are the injected ones and those of the scene by
itself that no neighbour disturbs: none is brighter than a tenth of the source within {companion_arcsec}
arcsec. A tenth of a bright source is itself many of its standard errors, so that the *lone* ones among them,
which have no object of S/N above {companion_snr} within that distance, are shown too. S/N is that of the true
profile in the inverse-variance coadd, and sources below 7 are left out. Seeds from {first} on; settings were
chosen on others. *Pull* is (measured - true) / error, without the systematic floor (`flux_sys_err`), since
simulated PSFs and flux scales have no error; its
mean clips pulls at 5, its width is from the quartiles. A bin of fewer than {enough} sources is reported and
not judged; the bins fill as more scenes are run.
"""


def _judged(good: bool, enough: bool = True) -> str:
    return ("yes" if good else "**no**") if enough else "too few"


def _values(objects: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([one[name] for one in objects], dtype=float)


def _width(pulls: np.ndarray) -> float:
    """Return the robust standard deviation, from the quartiles."""
    low, high = np.percentile(pulls, [25.0, 75.0])
    return 0.7413 * float(high - low)


def _chosen(
    objects: Sequence[Mapping[str, Any]], kind: str, group: str, low: float, high: float
) -> list[Mapping[str, Any]]:
    return [
        one
        for one in objects
        if one["type"] == kind
        and one["group"] == group
        and low < one["mag"] <= high
        and one["snr"] >= _MIN_SNR
    ]


def _flux_row(
    label: str, objects: Sequence[Mapping[str, Any]], prefix: str, limit: float | None
) -> str | None:
    """Return a line about a flux, and whether it is what it must be."""
    found = [one for one in objects if np.isfinite(one.get(f"{prefix}flux_err", np.nan))]
    if len(found) < 5:
        return None
    true, flux, error = (_values(found, name) for name in ("true_flux", f"{prefix}flux", f"{prefix}flux_err"))
    bias, pulls = float(np.median(flux / true)) - 1.0, (flux - true) / error
    snr, mean, width = (
        float(np.median(_values(found, "snr"))),
        float(np.clip(pulls, -5, 5).mean()),
        _width(pulls),
    )
    enough = len(found) >= _ENOUGH
    allowed = limit if limit is not None else 0.01 if snr > 20.0 else 0.03
    cells = [
        label,
        f"{len(found)}/{len(objects)}",
        f"{snr:.0f}",
        f"{100.0 * bias:+.2f} %",
        _judged(abs(bias) < allowed, enough),
        f"{mean:+.2f}",
        f"{width:.2f}",
        _judged(abs(mean) < 0.2 and 0.9 <= width <= 1.1, enough),
    ]
    return "| " + " | ".join(cells) + " |"


_FLUX_TABLE = [
    "| sources | found | S/N | median bias | reached | mean pull | width of pulls | reached |",
    "|---|---|---|---|---|---|---|---|",
]


def _fluxes(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of fluxes."""
    lines = list(_FLUX_TABLE)
    for kind, bins in (("star", STAR_BINS), ("galaxy", GALAXY_BINS)):
        for low, high in bins:
            chosen = _chosen(objects, kind, "isolated", low, high)
            lines.append(_flux_row(f"{kind} {low:g}-{high:g} mag", chosen, "", None) or "")
            lone = [one for one in chosen if one.get("lone")]
            lines.append(_flux_row("the lone ones of them", lone, "", None) or "")
            if kind == "star":
                lines.append(_flux_row("all of them, `psf_flux`", chosen, "psf_", None) or "")
    blends = [one for one in objects if one["group"] == "blend" and one["snr"] >= _MIN_SNR]
    split, alone = _split(blends)
    lines.append(_flux_row('blends at 0.5-0.9", both members found', split, "", 0.05) or "")
    lines.append(
        _flux_row("blends of which one entry was found (its flux is that of both)", alone, "", 0.05) or ""
    )
    return [line for line in lines if line]


def _split(blends: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Divide members of pairs into those of pairs with two entries and the others."""
    members: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for one in blends:
        members.setdefault((one["scene"], one["pair"]), []).append(one)
    split, alone = [], []
    for pair in members.values():
        both = len(pair) == 2 and all("flux" in one for one in pair) and pair[0]["flux"] != pair[1]["flux"]
        (split if both else alone).extend(pair)
    return split, alone


def _positions(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of positions and sizes."""
    lines = [
        "| sources | n | width of position pulls | reached (0.9-1.2) | size, S/N > 100 | n | reached (1 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, bins in (("star", STAR_BINS), ("galaxy", GALAXY_BINS)):
        for low, high in bins:
            found = [
                one
                for one in _chosen(objects, kind, "isolated", low, high)
                if "dx" in one and one["x_err"] > 0.0 and one["y_err"] > 0.0
            ]
            if len(found) < 5:
                continue
            pulls = np.concatenate(
                [_values(found, f"d{axis}") / _values(found, f"{axis}_err") for axis in "xy"]
            )
            width, enough = _width(pulls), len(found) >= _ENOUGH
            sizes = [one["size_ratio"] for one in found if "size_ratio" in one]
            size = float(np.median(sizes)) - 1.0 if len(sizes) >= 5 else np.nan
            cells = [
                f"{kind} {low:g}-{high:g} mag",
                str(len(found)),
                f"{width:.2f}",
                _judged(0.9 <= width <= 1.2, enough),
                f"{100.0 * size:+.2f} %" if np.isfinite(size) else "",
                str(len(sizes)) if sizes else "",
                _judged(abs(size) < 0.01, len(sizes) >= _ENOUGH) if np.isfinite(size) else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _pixels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tables of noise and masks."""
    lines = [
        "| pixels | true error | realisation | its ratio | reached | root mean variance plane | pull |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label, low, high in (
        ("blank", "blank sky", 0.9, 1.1),
        ("stars", "stars of S/N > 20", 0.8, 1.2),
        ("galaxies", "galaxies of S/N > 20", 0.8, 1.2),
    ):
        parts = [row[name] for row in rows]
        ratios = _values(parts, "realisation") / _values(parts, "error")
        ratio = float(np.median(ratios))
        means = {
            key: float(np.median(_values(parts, key))) for key in ("error", "realisation", "variance", "pull")
        }
        lines.append(
            f"| {label} | {means['error']:.3f} | {means['realisation']:.3f} | {ratio:.2f} "
            f"({ratios.min():.2f}-{ratios.max():.2f}) | {_judged(low <= ratio <= high)} | "
            f"{means['variance']:.3f} | {means['pull']:.2f} |"
        )
    true, drawn = (
        np.median([row[name] for row in rows], axis=0) for name in ("lags_error", "lags_realisation")
    )
    mask = {key: sum(row["mask"][key] for row in rows) for key in rows[0]["mask"]}
    caught = mask["wrong_flagged"] / max(mask["wrong"], 1)
    spoiled = mask["right_flagged"] / max(mask["right"], 1)
    difference = float(np.abs(true - drawn).max())
    restored, coadd = (np.array([row[name] for row in rows]) for name in ("sky_restored", "sky_coadd"))
    return [
        f"In units of the noise of the coadd, medians of {len(rows)} scenes; in brackets the range.",
        "",
        *lines,
        "",
        "Autocorrelations at 1 to 4 pixels in blank sky: error "
        + ", ".join(f"{v:.2f}" for v in true)
        + "; realisation "
        + ", ".join(f"{v:.2f}" for v in drawn)
        + f"; largest difference {difference:.2f}, to be below 0.1: {_judged(difference < 0.1)}.",
        "",
        f"Prior-carried mask: of the {mask['wrong']} pixels with an error above 5 sigma of the variance "
        f"plane in structure of 0.2 to 3 coadd sigma it holds {100.0 * caught:.0f} % (at least 90 %: "
        f"{_judged(caught >= 0.9)}); of those within 3 sigma {100.0 * spoiled:.1f} % (at most 10: "
        f"{_judged(spoiled <= 0.1)}).",
        "",
        f"Mean of the blank sky minus the truth: restored {restored.mean():+.4f} +- "
        f"{restored.std(ddof=1) / len(restored) ** 0.5:.4f}, scatter {restored.std(ddof=1):.4f}; coadd "
        f"{coadd.mean():+.4f}, scatter {coadd.std(ddof=1):.4f}.",
    ]


def make(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], real: Sequence[Mapping[str, Any]], first_seed: int
) -> str:
    """Write the report.

    Parameters
    ----------
    rows : `~collections.abc.Mapping` [`str`, `~collections.abc.Sequence`]
        Rows of `calibration_score.score_sources` of each family.
    real : `~collections.abc.Sequence`
        Rows of injections into real warps.
    first_seed : `int`
        First seed of the scenes.

    Returns
    -------
    text : `str`
        Markdown.
    """
    lines = [
        _HEAD.format(
            first=first_seed,
            enough=_ENOUGH,
            companion_arcsec=COMPANION_ARCSEC,
            companion_snr=f"{COMPANION_SNR:.0f}",
        )
    ]
    for family, found in rows.items():
        lines += [f"## {family.replace('_', ' ')}", ""]
        if not found:
            lines += ["Not run.", ""]
            continue
        objects = [one | {"scene": n} for n, row in enumerate(found) for one in row["objects"]]
        n_false, n_entries = (sum(row[key] for row in found) for key in ("n_false", "n_entries"))
        share = n_false / max(n_entries, 1)
        excess = float(np.median([row["noise_excess"] for row in found]))
        lines += [
            f"{len(found)} scenes. Variance of a point-source flux over that of white noise: {excess:.2f}.",
            "",
            *_fluxes(objects),
            "",
            *_positions(objects),
            "",
            f"False entries of S/N >= 5: {n_false} of {n_entries}, {100.0 * share:.2f} % (at most 2: "
            f"{_judged(share <= 0.02)}).",
            "",
        ]
        pixels = [row["pixels"] for row in found if "pixels" in row]
        if len(pixels) > 1:
            lines += [*_pixels(pixels), ""]
    lines += ["## Real warps", ""]
    if not real:
        return "\n".join([*lines, "Not run: give warp files with `--warps`.", ""])
    objects = [one for row in real for one in row["objects"]]
    lines += [
        f"{len(real)} injections into the same warps, away from the sources of the catalogue before. The "
        "photons of injected sources add no noise, since the gain is unknown; S/N is that of a point source. "
        "Real sky between sources is not at zero: that gives all S/N the same mean pull.",
        "",
        *_FLUX_TABLE,
    ]
    for kind in ("star", "galaxy"):
        for snr in sorted({one["snr"] for one in objects}, reverse=True):
            chosen = [one for one in objects if one["type"] == kind and one["snr"] == snr]
            lines.append(_flux_row(f"{kind} S/N {snr:g}", chosen, "", None) or "")
    return "\n".join([*lines, ""])
