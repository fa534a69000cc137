# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest

from lsst.coadd.deepprior.aperture_corrections import average_corrections, restored_corrections

PSF, MODEL = "base_PsfFlux_instFlux", "modelfit_CModel_instFlux"


@pytest.fixture
def weight() -> np.ndarray:
    """Three visits in 1x3 cells; none has weight in the last one."""
    return np.array([[[1.0, 1.0, 0.0]], [[3.0, 1.0, 0.0]], [[4.0, 2.0, 0.0]]])


def test_average_is_weighted_and_skips_what_is_not_known(weight: np.ndarray) -> None:
    corrections = [
        {PSF: np.array([[0.9, 1.0, 1.0]]), MODEL: np.array([[1.5, 1.5, 1.5]])},
        {PSF: np.array([[1.1, np.nan, 1.0]])},
        {},
    ]
    averages = average_corrections(corrections, weight)
    assert set(averages) == {PSF, MODEL}
    np.testing.assert_allclose(averages[PSF], [[(0.9 + 3 * 1.1) / 4, 1.0, np.nan]])
    np.testing.assert_allclose(averages[MODEL], [[1.5, 1.5, np.nan]])
    with pytest.raises(ValueError, match="corrections of 2 visits and weights of 3"):
        average_corrections(corrections[:2], weight)


def test_restored_fluxes_take_the_correction_of_the_psf_flux(weight: np.ndarray) -> None:
    factors = {PSF: 1.05, PSF + "Err": 0.01, MODEL: 1.2, MODEL + "Err": 0.04}
    visit = {name: np.full((1, 3), value) for name, value in factors.items()}
    restored = restored_corrections([visit, {}, visit], weight)
    assert set(restored) == set(factors)
    for name, factor in ((PSF, 1.05), (MODEL, 1.05), (PSF + "Err", 0.01), (MODEL + "Err", 0.01)):
        np.testing.assert_allclose(restored[name], [[factor, factor, np.nan]])
    without_errors = {name: visit[name] for name in (PSF, MODEL)}
    assert set(restored_corrections([without_errors] * 3, weight)) == {PSF, MODEL}
    unknown_error = {name: visit[name] for name in (PSF, MODEL, MODEL + "Err")}
    assert np.isnan(restored_corrections([unknown_error] * 3, weight)[MODEL + "Err"]).all()
    assert restored_corrections([{MODEL: visit[MODEL]}] * 3, weight) == {}
    assert restored_corrections([{}] * 3, weight) == {}
