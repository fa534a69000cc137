# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Bands that are restored together: what they gain, and what must stay out of them."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior import coupling, multiband
from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.colour_picture import choose_bands, draw_colour_picture, in_order
from lsst.coadd.deepprior.coupling import BandLight, coupled, typical_ratio
from lsst.coadd.deepprior.fitted_patch import FittedPatch, RestoreSettings, fit_patch
from lsst.coadd.deepprior.multiband import restore_bands
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import NothingToRestoreError, PatchData
from lsst.coadd.deepprior.psf_check import SNRS, InjectedStars
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.weights import packaged_network

LAYOUT = CellLayout(2, 1, 60, 110)
"""Two cells that are not square: rows and columns cannot be confused."""

SETTINGS = RestoreSettings(
    target_fwhm=2.2, base_steps=240, steps=2, n_splits=2, n_variance_draws=1, check_psf=False
)

WITHOUT_NETWORK = dataclasses.replace(SETTINGS, base_steps=40)
"""Fewer steps than the network of the package was trained with."""

COMMON = [(x, y, 400.0) for y in (15.2, 45.4, 75.1, 104.6) for x in (14.3, 40.7, 69.8, 95.4)]
"""Stars of all bands, (x, y, flux in the r band)."""

RED = 0.6
"""Flux in the g band over that in the r band."""

FAINT = (56.3, 60.2, 55.0)
"""A star that the deep bands show, and the shallow one hardly."""

ONLY = (25.6, 30.3, 900.0)
"""A star of one band."""


def band(ratio: float, n_visits: int, *further: tuple[float, float, float], seed: int) -> list[Observation]:
    """Return the visits of a band: the common stars with some flux ratio, and others."""
    stars = [(x, y, ratio * flux) for x, y, flux in [*COMMON, FAINT]] + list(further)
    sigmas = list(np.linspace(1.5, 2.2, n_visits))
    return observe(LAYOUT, stars, sigmas, noise=3.0, seed=seed)


def visits(*, only: bool = False) -> dict[str, list[Observation]]:
    """Return visits of three bands, of which r may have a star of its own."""
    own = (ONLY,) if only else ()
    return {
        "g": band(RED, 3, seed=1),
        "r": band(1.0, 10, *own, seed=2),
        "i": band(1.2, 10, seed=3),
    }


def fits(observations: dict[str, list[Observation]]) -> dict[str, FittedPatch]:
    network = packaged_network()
    return {name: fit_patch(one, LAYOUT, SETTINGS, network=network) for name, one in observations.items()}


def together(patches: dict[str, FittedPatch]) -> dict[str, np.ndarray]:
    points = coupled([BandLight(one.data, one.sets, one.points.latent) for one in patches.values()])
    return {
        name: single_image(patch) if own is None else patch.image(own.latent).astype(float)
        for (name, patch), own in zip(patches.items(), points, strict=True)
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, FittedPatch]:
    return fits(visits())


@pytest.fixture(scope="module")
def with_only(alone: dict[str, FittedPatch]) -> dict[str, FittedPatch]:
    return alone | {"r": fits({"r": visits(only=True)["r"]})["r"]}


def light_at(image: np.ndarray, star: tuple[float, float, float], radius: float = 5.0) -> float:
    rows, columns = np.indices(image.shape)
    return float(image[np.hypot(rows - star[1], columns - star[0]) < radius].sum())


def single_image(patch: FittedPatch) -> np.ndarray:
    return patch.image(patch.points.latent).astype(float)


def test_shallow_band_gains(alone: dict[str, FittedPatch]) -> None:
    """It comes nearer to the truth, and shows what it did not."""
    truth = gaussian_stars(
        LAYOUT.shape, [(x, y, RED * f) for x, y, f in [*COMMON, FAINT]], alone["g"].data.sigma
    )
    own, joint = single_image(alone["g"]), together(alone)["g"]
    assert np.sqrt(np.mean((joint - truth) ** 2)) < 0.8 * np.sqrt(np.mean((own - truth) ** 2))
    expected = RED * FAINT[2]
    assert light_at(own, FAINT) < 0.4 * expected
    assert 0.6 * expected < light_at(joint, FAINT) < 1.4 * expected


def test_fluxes_stay_those_of_the_band(alone: dict[str, FittedPatch]) -> None:
    joint = together(alone)
    for name, ratio in (("g", RED), ("r", 1.0), ("i", 1.2)):
        measured, own = (
            np.array([light_at(image, star) / (ratio * star[2]) for star in COMMON])
            for image in (joint[name], single_image(alone[name]))
        )
        assert abs(np.median(measured) - 1.0) < 0.02 + abs(np.median(own) - 1.0)
        assert measured.std() < 1.1 * own.std()


def test_source_of_one_band_stays_out_of_the_others(
    alone: dict[str, FittedPatch], with_only: dict[str, FittedPatch]
) -> None:
    without, joint = together(alone), together(with_only)
    assert light_at(joint["r"], ONLY) == pytest.approx(ONLY[2], rel=0.05)
    for name in ("g", "i"):
        leak = light_at(joint[name] - without[name], ONLY)
        assert abs(leak) < 0.005 * ONLY[2]


def test_source_of_one_band_stays_out_where_all_have_extended_light() -> None:
    """The light of a galaxy under the PSF is not that of the source in another colour."""
    galaxy = [(ONLY[0] + dx, ONLY[1] + dy, 100.0) for dx in range(6, 19, 2) for dy in range(-6, 7, 2)]
    network = packaged_network()

    def image(*only: tuple[float, float, float]) -> np.ndarray:
        seen = {
            name: band(ratio, n, *[(x, y, ratio * f) for x, y, f in galaxy], *own, seed=n + len(name))
            for name, ratio, n, own in (("g", RED, 3, ()), ("r", 1.0, 10, only), ("i", 1.2, 11, ()))
        }
        patches = {n: fit_patch(one, LAYOUT, SETTINGS, network=network) for n, one in seen.items()}
        return together(patches)["g"]

    assert abs(light_at(image(ONLY) - image(), ONLY)) < 0.005 * ONLY[2]


@pytest.mark.parametrize(("ratio", "missing"), [(1.4, 0.0), (5.0, 0.8)])
def test_light_that_a_band_does_not_have(alone: dict[str, FittedPatch], ratio: float, missing: float) -> None:
    """Not what another colour explains; and of more, what goes beyond the light that the band has."""
    light = BandLight(alone["r"].data, alone["r"].sets, alone["r"].points.latent)
    part = coupling._missing(light, ratio * light.latent)
    assert part[light.significance(light.latent) > 20.0].numpy() == pytest.approx(missing, abs=1e-3)


def test_two_bands_have_no_third_to_ask(with_only: dict[str, FittedPatch]) -> None:
    """The own data alone keep the source out: it would be seen at S/N > 20."""
    pair = {name: with_only[name] for name in ("g", "r")}
    assert abs(light_at(together(pair)["g"] - single_image(pair["g"]), ONLY)) < 0.02 * ONLY[2]


def test_a_band_keeps_its_source_beside_one_of_another_band() -> None:
    """The deep band has a star 4 pixels beside that of the shallow one, which the data do not take for it."""
    layout, common = CellLayout(1, 1, 50, 60), [(15.0, 35.0, 900.0), (45.0, 12.0, 900.0)]
    lights = []
    for x, n_visits in ((39.0, 3), (35.0, 10)):
        seen = observe(
            layout,
            [*common, (x, 30.0, 900.0)],
            list(np.linspace(1.6, 2.0, n_visits)),
            noise=3.0,
            seed=n_visits,
        )
        data = PatchData(seen, layout, 0.9, margin=12)
        lights.append(BandLight(data, data.sets(), maximum_likelihood(data, data.sets(), steps=60).latent[0]))
    points = coupled(lights)[0]
    assert points is not None
    own, joint = (
        inner_smooth(latent, 0.9)[12:-12, 12:-12].numpy() for latent in (lights[0].latent, points.latent)
    )
    assert light_at(joint, (35.0, 30.0, 0.0), 1.5) < 0.03 * 900.0
    mine = (39.0, 30.0, 0.0)
    assert light_at(joint, mine, 1.5) == pytest.approx(light_at(own, mine, 1.5), rel=0.06)


def places(alone: dict[str, FittedPatch], bright: float) -> list[InjectedStars]:
    """Return the stars that are injected when the left half is lit in the i band only, in noises of g."""
    images = [np.zeros(LAYOUT.shape) for _ in alone]
    images[list(alone).index("i")][:, :55] = bright * 3.0 / np.sqrt(3.0)
    return multiband._common_stars(list(alone.values()), images, seed=1)


def test_injected_stars_have_the_colours_of_the_patch(alone: dict[str, FittedPatch]) -> None:
    stars = dict(zip(alone, places(alone, 0.0), strict=True))
    for name, ratio in (("g", RED), ("i", 1.2)):
        np.testing.assert_allclose(stars[name].flux / stars["r"].flux, ratio, rtol=0.1)
    for name, n_visits in (("g", 3), ("r", 10), ("i", 10)):
        information = np.sum(1.0 / (9.0 * 4.0 * np.pi * np.linspace(1.5, 2.2, n_visits) ** 2))
        # They are rounded to 0.1.
        np.testing.assert_allclose(
            stars[name].snr, stars[name].flux * np.sqrt(information), rtol=0.02, atol=0.06
        )
    assert set(stars["g"].snr) == set(SNRS)


def test_injected_stars_are_where_all_bands_are_dark(alone: dict[str, FittedPatch]) -> None:
    """The i band is twice as bright as the g band, whose noise is the measure."""
    for bright, free in ((1.4, True), (2.8, False)):
        stars = places(alone, bright)
        assert bool((stars[0].x < 50.0).any()) == free
        assert (stars[0].x > 60.0).any()


def test_injected_stars_are_where_all_bands_have_data(alone: dict[str, FittedPatch]) -> None:
    """The band of the least depth sees both cells, another one only the lower of them."""
    half = [
        dataclasses.replace(visit, psf=np.where(np.arange(2)[:, None, None, None], np.nan, visit.psf))
        for visit in visits()["r"]
    ]
    patches = alone | {"r": fits({"r": half})["r"]}
    (stars, *_) = places(patches, 0.0)
    assert len(stars.y)
    assert stars.y.max() < 60.0
    assert places(alone, 0.0)[0].y.max() > 60.0


def test_typical_ratio(alone: dict[str, FittedPatch]) -> None:
    lights = {name: BandLight(one.data, one.sets, one.points.latent) for name, one in alone.items()}
    assert typical_ratio(lights["g"], lights["r"]) == pytest.approx(RED, rel=0.1)
    dark = dataclasses.replace(lights["g"], latent=1e-6 * lights["g"].latent)
    assert typical_ratio(lights["r"], dark) is None


def test_depths_are_those_in_the_flux_of_the_band(alone: dict[str, FittedPatch]) -> None:
    """A band that is 1 / RED times as bright counts for less by the square of that."""
    lights = [BandLight(alone[name].data, alone[name].sets, alone[name].points.latent) for name in "gr"]
    depths = [depth for _, depth in coupling._templates(lights)]
    inner = (slice(30, 100), slice(30, 90))
    for depth, other, ratio in ((depths[0], lights[1], RED), (depths[1], lights[0], 1.0 / RED)):
        np.testing.assert_allclose(depth[inner], (other.depth / ratio**2)[inner], rtol=0.2)


def test_a_band_in_which_nothing_stands_out_is_not_coupled(alone: dict[str, FittedPatch]) -> None:
    """It is given no light, and the others are coupled as if it were not there."""
    empty = observe(LAYOUT, [], [1.5, 1.8, 2.1], noise=3.0, seed=5)
    patches = {"r": alone["r"], "u": fits({"u": empty})["u"], "i": alone["i"]}
    joint, without = together(patches), together({name: alone[name] for name in "ri"})
    np.testing.assert_array_equal(joint["u"], single_image(patches["u"]))
    for name in "ri":
        np.testing.assert_array_equal(joint[name], without[name])
    result, others = multiband._coupled_patches(patches)
    assert others == {"r": ["i"], "u": [], "i": ["r"]}
    assert [one.method.partition(", coupled with ")[2] for one in result] == ["i", "", "r"]
    latents = [one.points.latent for one in result]
    white = [np.ones((len(one.observations), 1, 1)) for one in result]
    _, again = result[1].drawn(latents[1], multiband._seed_of(7, 1), white[1])
    torch.testing.assert_close(multiband._restored_draw(result, latents, 7, white)[1], again)


def test_realisations_are_coupled_as_the_image_is(alone: dict[str, FittedPatch]) -> None:
    """So that the shallow band has less noise than one that is restored by itself."""
    patches = list(alone.values())
    latents = [one.points.latent for one in patches]
    white = [np.ones((len(one.observations), 1, 1)) for one in patches]
    joint = multiband._restored_draw(patches, latents, 7, white)[0]
    _, single = patches[0].drawn(latents[0], multiband._seed_of(7, 0), white[0])
    own, less = (
        np.sqrt(np.mean((patches[0].image(one) - patches[0].image(latents[0])) ** 2))
        for one in (single, joint)
    )
    assert less < 0.95 * own


def test_band_without_data_in_a_cell_is_given_none(alone: dict[str, FittedPatch]) -> None:
    """Light of other bands does not fill what a band has not seen."""
    half = []
    for visit in visits()["g"]:
        good = visit.good.copy()
        good[60:] = False
        half.append(dataclasses.replace(visit, good=good, flux=np.where(good, visit.flux, np.nan)))
    patches = alone | {"g": fits({"g": half})["g"]}
    joint = together(patches)["g"]
    assert np.isfinite(joint).all()
    unseen = (slice(85, None), slice(None))
    np.testing.assert_allclose(joint[unseen], single_image(patches["g"])[unseen], rtol=1e-4, atol=1e-4)


def test_without_coupling_nothing_changes() -> None:
    observations = {name: one for name, one in visits().items() if name != "i"}
    separate = restore_bands(observations, LAYOUT, WITHOUT_NETWORK, coupling=False)
    for name, one in observations.items():
        expected = restore(one, LAYOUT, WITHOUT_NETWORK)
        for field in ("image", "variance", "residual", "prior_carried"):
            np.testing.assert_array_equal(getattr(separate[name], field), getattr(expected, field))
        np.testing.assert_array_equal(separate[name].noise_realizations[0], expected.noise_realizations[0])
    (only,) = restore_bands({"g": observations["g"]}, LAYOUT, WITHOUT_NETWORK).values()
    np.testing.assert_array_equal(only.image, separate["g"].image)


def test_what_comes_out_is_that_of_the_coupled_image(alone: dict[str, FittedPatch]) -> None:
    """Image, residual, noise and check of the PSF belong together, and the noise of bands is independent."""
    settings = dataclasses.replace(SETTINGS, check_psf=True, n_noise_realizations=1)
    phases: set[str] = set()

    def progress(phase: str, step: int, n_steps: int, loss: float) -> None:
        phases.add(phase)

    result = restore_bands(visits(), LAYOUT, settings, network=packaged_network(), progress=progress)
    np.testing.assert_allclose(result["g"].image, together(alone)["g"], atol=1e-3)
    assert {"base g", "base i", "noise"} <= phases
    for name, n_visits in (("g", 3), ("r", 10), ("i", 10)):
        one = result[name]
        assert len({visit.target_sigma for visit in result.values()}) == 1
        assert np.abs(np.median(one.residual)) < 0.3
        depth = n_visits / 3.0**2
        assert np.median(one.residual_variance) == pytest.approx(1.0 / depth, rel=0.1)
        assert np.var(one.residual_noise_realizations[0]) == pytest.approx(1.0 / depth, rel=0.2)
        assert np.isfinite(one.variance).all()
        assert np.mean(one.noise_realizations[0] ** 2) == pytest.approx(np.mean(one.variance), rel=0.1)
        stars = one.metrics["psf"]["injected_stars"]
        assert stars
        assert abs(stars[-1]["flux"] - 1.0) < 0.05
        assert (stars[-1]["snr"] == SNRS[-1]) == (name == "g")
    noise = [result[name].residual_noise_realizations[0].ravel() for name in ("r", "i")]
    assert abs(np.corrcoef(noise)[0, 1]) < 0.1


def test_common_target_is_that_of_the_seeing_of_all() -> None:
    settings = dataclasses.replace(WITHOUT_NETWORK, target_fwhm=None)
    stars = [(x, y, 100.0) for x, y, _ in COMMON]
    sharp, wide = (observe(LAYOUT, stars, [sigma] * 3, seed=4) for sigma in (1.6, 2.4))
    result = restore_bands({"r": sharp, "g": wide}, LAYOUT, settings)
    for one in result.values():
        assert one.target_sigma == pytest.approx(1.0, rel=0.02)


def test_bands_without_a_sharp_default_target_are_coupled_too() -> None:
    """The narrowest default target is wider than the PSFs of one band, as it may be in a band alone."""
    settings = dataclasses.replace(WITHOUT_NETWORK, target_fwhm=None)
    stars = [(x, y, 100.0) for x, y, _ in COMMON]
    sharp, wide = (observe(LAYOUT, stars, [sigma] * 2, seed=4) for sigma in (0.8, 1.4))
    result = restore_bands({"r": sharp, "g": wide}, LAYOUT, settings)
    alone = restore(sharp, LAYOUT, settings)
    assert result["r"].target_sigma == result["g"].target_sigma == alone.target_sigma
    with pytest.raises(ValueError, match="not sharper than the worst visit"):
        restore_bands({"r": sharp, "g": wide}, LAYOUT, dataclasses.replace(WITHOUT_NETWORK, target_fwhm=2.0))


def test_scratch_start_is_coupled_too() -> None:
    two = {name: one for name, one in visits().items() if name != "i"}
    result = restore_bands(two, LAYOUT, WITHOUT_NETWORK)
    assert result["g"].metrics["method"] == "network fitted from scratch, coupled with r"


def test_bad_input_is_named(alone: dict[str, FittedPatch]) -> None:
    with pytest.raises(ValueError, match="There is no band to restore"):
        restore_bands({}, LAYOUT)
    with pytest.raises(ValueError, match="The r band has no visit; leave it out"):
        restore_bands({"g": visits()["g"], "r": []}, LAYOUT)
    blind = {
        name: [dataclasses.replace(visit, psf=np.full_like(visit.psf, np.nan)) for visit in one]
        for name, one in visits().items()
    }
    with pytest.raises(NothingToRestoreError, match="No visit of any band"):
        restore_bands(blind, LAYOUT)
    lights = [BandLight(one.data, one.sets, one.points.latent) for one in alone.values()]
    with pytest.raises(ValueError, match="has no other to be coupled with"):
        coupled(lights[:1])
    with pytest.raises(ValueError, match="must have one canvas"):
        coupled([lights[0], dataclasses.replace(lights[1], latent=torch.ones(5, 4))])
    other = fit_patch(
        visits()["r"], LAYOUT, dataclasses.replace(SETTINGS, target_fwhm=2.6), network=packaged_network()
    )
    with pytest.raises(ValueError, match="must have one target PSF"):
        coupled([lights[0], BandLight(other.data, other.sets, other.points.latent)])


def test_picture() -> None:
    assert in_order(["z", "u", "B", "r"]) == ["u", "r", "z", "B"]
    assert choose_bands("griz") == ["z", "i", "g"]
    assert choose_bands("i") == ["i", "i", "i"]
    image = np.zeros((30, 50))
    image[10, 20] = 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_colour_picture("patch 1", {"g": image, "r": image, "i": 2.0 * image}, 1.0)
    shown = figure.axes[0].images[0].get_array()
    red, green, blue = np.asarray(shown)[10, 20].astype(int)
    assert red > green == blue > 0
    assert "red i, green r, blue g" in figure.texts[0].get_text()
    # Pixels of a small patch are shown as squares of 16 by 16.
    np.testing.assert_allclose(figure.get_size_inches() * figure.dpi, (16 * 50, 16 * 30 + 50))
    chosen = draw_colour_picture("patch 1", {"g": image, "r": image}, 1.0, ["g", "r", "r"])
    assert "red g, green r, blue r" in chosen.texts[0].get_text()
    with pytest.raises(ValueError, match="images of one shape"):
        draw_colour_picture("patch 1", {"g": image, "r": image[1:]}, 1.0)
    with pytest.raises(ValueError, match="three bands"):
        draw_colour_picture("patch 1", {"g": image}, 1.0, ["g"])
