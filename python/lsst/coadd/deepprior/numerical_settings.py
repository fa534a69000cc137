# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What the numerical settings of a fit and of a training have in common."""

from __future__ import annotations

__all__ = ("MAX_SEED", "check_settings")

from collections.abc import Mapping
from typing import Any

MAX_SEED = 2**32 - 1
"""Largest seed (`int`); torch takes 64 bits, of which a training needs some for its patches."""


def check_settings(settings: Any, least: Mapping[str, int]) -> None:
    """Refuse settings that are out of range or no numbers.

    Parameters
    ----------
    settings : `~lsst.coadd.deepprior.fitted_patch.RestoreSettings` or \
            `~lsst.coadd.deepprior.training.TrainSettings`
        The settings.
    least : `~collections.abc.Mapping` [`str`, `int`]
        Least value of each that is a whole number; that of the seed is 0.

    Raises
    ------
    ValueError
        Raised if one is wrong.
    """
    for name, lowest in (*least.items(), ("seed", 0)):
        number = getattr(settings, name)
        if not (isinstance(number, int) and number >= lowest):
            raise ValueError(f"{name} must be at least {lowest}, not {number}, and a whole number.")
    if settings.seed > MAX_SEED:
        raise ValueError(f"seed must be at most {MAX_SEED}, not {settings.seed}.")
    if not (settings.learning_rate > 0.0 and settings.huber_delta > 0.0 and settings.psf_error >= 0.0):
        raise ValueError("learning_rate and huber_delta must be positive and psf_error must not be negative.")
