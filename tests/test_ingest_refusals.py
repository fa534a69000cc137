# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What is refused of warp files, as users of ``deepprior ingest`` see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from test_ingest import (
    added,
    bare,
    data,
    edited,
    header,
    ingest,
    many,
    one_line,
    refs,
    with_corner,
    without,
)

from lsst.coadd.deepprior.ingest import DEFAULT_RUN
from lsst.daf.butler import Butler


def removed(name: str) -> Callable[[fits.HDUList], object]:
    return lambda hdus: hdus.pop(hdus.index_of(name))


def emptied(name: str) -> Callable[[fits.HDUList], object]:
    def edit(hdus: fits.HDUList) -> None:
        hdus[hdus.index_of(name)] = fits.ImageHDU(name=name)

    return edit


REFUSALS = {
    "mask of another shape": (data("MASK", lambda a: a[:, 1:]), "MASK has the shape (64, 95)"),
    "variance of another shape": (data("VARIANCE", lambda a: a.T), "VARIANCE has the shape (96, 64)"),
    "noise of another shape": (added("NOISE", np.zeros((3, 4))), "NOISE has the shape (3, 4)"),
    "image of another shape": (data("IMAGE", lambda a: a[1:]), "has the shape (64, 96), IMAGE (63, 96)"),
    "image cube": (data("IMAGE", lambda a: a[np.newaxis]), "IMAGE has 3 dimensions, not 2"),
    "mask of floats": (data("MASK", lambda a: a.astype(float)), "MASK is of type"),
    "shifted grid": (
        lambda h: h["IMAGE"].header.update(CRPIX1=h["IMAGE"].header["CRPIX1"] + 0.01),
        "pixel grid",
    ),
    "other scale": (header("IMAGE", PC1_1=-5.6e-05), "pixel grid"),
    "far away": (header("IMAGE", CRVAL1=330.1, CRVAL2=-2.2), "pixel grid"),
    "rows shifted by LTV alone": (header("IMAGE", LTV2=-14201.0), "pixel grid"),
    "columns shifted by LTV alone": (header("IMAGE", LTV1=-15601.0), "pixel grid"),
    "fraction of a pixel": (header("IMAGE", LTV1=-15600.5), "not whole numbers of pixels"),
    "no WCS": (without("IMAGE", "CTYPE1", "CTYPE2"), "no celestial WCS"),
    "broken WCS": (header("IMAGE", PC1_1=0.0, PC2_2=0.0), "WCS of IMAGE cannot be read"),
    "CRVAL2 that is no number": (header("IMAGE", CRVAL2="-2.2"), "CRVAL2 = '-2.2' is not a number"),
    "no CRVAL1": (without("IMAGE", "CRVAL1"), "the WCS of IMAGE has no CRVAL1"),
    "CRPIX1 that is no number": (header("IMAGE", CRPIX1="abc"), "CRPIX1 = 'abc' is not a number"),
    "galactic WCS": (header("IMAGE", CTYPE1="GLON-TAN", CTYPE2="GLAT-TAN"), "must be in ICRS"),
    "FK4 WCS": (header("IMAGE", RADESYS="FK4"), "must be in ICRS"),
    "counts": (header("IMAGE", BUNIT="adu"), "IMAGE is in the unit 'adu'; it must be in nJy"),
    "microjansky": (header("IMAGE", BUNIT="uJy"), "IMAGE is in the unit 'uJy'"),
    "unknown unit": (header("IMAGE", BUNIT="furlong"), "IMAGE is in the unit 'furlong'"),
    "unit without a value": (header("IMAGE", BUNIT=None), "IMAGE is without BUNIT; it must be in nJy"),
    "no unit": (without("IMAGE", "BUNIT"), "IMAGE is without BUNIT; it must be in nJy"),
    "variance in other units": (header("VARIANCE", BUNIT="adu**2"), "VARIANCE is in the unit 'adu**2'"),
    "even-sized PSF": (data("PSF", lambda a: a[:-1, :-1]), "the PSF has 14x14 pixels"),
    "oblong PSF": (data("PSF", lambda a: a[:-2]), "the PSF has 13x15 pixels"),
    "PSF cube": (data("PSF", lambda a: a[np.newaxis]), "PSF has 3 dimensions"),
    "empty PSF": (emptied("PSF"), "the extension PSF is empty"),
    "PSF of NaN": (data("PSF", lambda a: a * np.nan), "the PSF is empty, it holds nothing but NaN"),
    "PSF with one NaN": (data("PSF", lambda a: with_corner(a, np.nan)), "a PSF stamp is finite only in part"),
    "PSF of sum 0": (data("PSF", lambda a: a * 0.0), "a PSF stamp has the sum 0, not positive"),
    "PSF of negative sum": (data("PSF", lambda a: -a), "a PSF stamp has the sum -1, not positive"),
    "PSF of one pixel": (data("PSF", lambda a: a[7:8, 7:8]), "has 100% of its light in one pixel"),
    "PSF of one bright pixel": (
        data("PSF", lambda a: (a == a.max()) * 1.0),
        "100% of its light in",
    ),
    "PSF much below 0": (
        data("PSF", lambda a: a - 0.9 * np.roll(a, 8, axis=1)),
        "a PSF stamp has a negative part of",
    ),
    "flat PSF": (data("PSF", lambda a: np.ones_like(a)), "a PSF stamp is flat; check the PSF"),
    "PSF of other cells": (data("PSF", lambda a: many(a, (3, 2))), "PSF stamps for (3, 2) cells"),
    "no VISIT": (without("PRIMARY", "VISIT"), "the keyword VISIT is missing"),
    "no BAND": (without("PRIMARY", "BAND"), "the keyword BAND is missing"),
    "blank BAND": (header("PRIMARY", BAND=""), "the keyword BAND is missing"),
    "no INSTRUME": (without("PRIMARY", "INSTRUME"), "the keyword INSTRUME is missing"),
    "no FILTER": (without("PRIMARY", "FILTER"), "the keyword FILTER is missing"),
    "VISIT that is no number": (header("PRIMARY", VISIT="4001"), "VISIT = '4001' is not an integer"),
    "negative VISIT": (header("PRIMARY", VISIT=-3), "VISIT = -3 is not an integer of at least 0"),
    "very long INSTRUME": (header("PRIMARY", INSTRUME="x" * 33), "not a text of at most 32 characters"),
    "MJD that is no number": (header("PRIMARY", MJD="today"), "MJD = 'today' is not a number"),
    "huge VISIT": (header("PRIMARY", VISIT=2**65), f"VISIT = {2**65} is larger than"),
    "huge TRACT": (header("PRIMARY", TRACT=2**63), f"TRACT = {2**63} is larger than"),
    "huge PATCH": (header("PRIMARY", PATCH=2**63), f"PATCH = {2**63} is larger than"),
    "MJD far in the future": (
        header("PRIMARY", MJD=1e9),
        "MJD = 1000000000.0 is not between 41000 and 88000",
    ),
    "MJD far in the past": (header("PRIMARY", MJD=-1e7), "MJD = -10000000.0 is not between"),
    "Julian date": (header("PRIMARY", MJD=2460000.5), "MJD = 2460000.5 is not between"),
    "negative EXPTIME": (header("PRIMARY", EXPTIME=-30.0), "EXPTIME = -30.0 is not between 0 and 1e+07"),
    "part of the cell grid": (without("PRIMARY", "PATNX"), "the keyword PATNX is missing"),
    "cells of no size": (header("PRIMARY", CELLSZ=0), "CELLSZ = 0 is not an integer of at least 1"),
    "other cells": (header("PRIMARY", CELLSZ=16), "cell grid"),
    "pixels outside of its patch": (header("PRIMARY", PATNX=64), "cell grid"),
    "mask bit 32": (header("MASK", MP_CR=32), "MP_CR = 32 is not the number of a mask bit"),
    "no IMAGE": (removed("IMAGE"), "the extension IMAGE is missing"),
    "no MASK": (removed("MASK"), "the extension MASK is missing"),
    "no VARIANCE": (removed("VARIANCE"), "the extension VARIANCE is missing"),
    "no PSF": (removed("PSF"), "the extension PSF is missing"),
    "filter of another band": (header("PRIMARY", BAND="z"), "the filter 'r_sim' the band 'z'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_invalid_file_is_refused_and_nothing_is_written(
    case: str, warp_files: list[Path], tmp_path: Path
) -> None:
    edit, reason = REFUSALS[case]
    bad = edited(warp_files[1], tmp_path / "bad.fits", edit)
    message = one_line(ingest(tmp_path / "repo", warp_files[0], bad, warp_files[2]))
    assert str(bad) in message
    assert reason in message
    assert not (tmp_path / "repo").exists()


def test_an_invalid_file_leaves_an_existing_repository_as_it_was(
    warp_files: list[Path], tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0]).exit_code == 0
    bad = edited(warp_files[1], tmp_path / "bad.fits", header("IMAGE", BUNIT="adu"))
    message = one_line(ingest(repo, bad, warp_files[2], options=("--run", "other/run")))
    assert str(bad) in message
    assert [ref.dataId["visit"] for ref in refs(repo)] == [3000]
    with Butler.from_config(str(repo)) as butler:
        assert "other/run" not in butler.collections.query("*")
        assert [record.id for record in butler.query_dimension_records("visit")] == [3000]


@pytest.mark.parametrize("kept", [0, 1, 100, 2880, 5000, 9000, 30000, -1, -2880])
def test_a_truncated_file_is_refused(kept: int, warp_files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.fits"
    bad.write_bytes(warp_files[1].read_bytes()[:kept])
    assert str(bad) in one_line(ingest(tmp_path / "repo", warp_files[0], bad))
    assert not (tmp_path / "repo").exists()


def test_what_is_no_fits_file_is_refused(warp_files: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("These are not the pixels you are looking for.\n" * 200)
    for bad, reason in (
        (text, "not a complete FITS file"),
        (tmp_path / "absent.fits", "there is no such file"),
        (tmp_path, "not a complete FITS file"),
    ):
        message = one_line(ingest(tmp_path / "repo", warp_files[0], bad))
        assert f"Error: {bad}: " in message
        assert reason in message
    assert not (tmp_path / "repo").exists()


def test_two_files_of_one_visit_and_patch_are_refused(warp_files: list[Path], tmp_path: Path) -> None:
    again = edited(warp_files[1], tmp_path / "again.fits", header("PRIMARY", EXPTIME=31.0))
    message = one_line(ingest(tmp_path / "repo", *warp_files[:2], again))
    assert str(again) in message
    assert str(warp_files[1]) in message
    assert "same visit (DeepPriorSim visit 3001) and patch" in message
    assert not (tmp_path / "repo").exists()


def test_files_that_contradict_each_other_about_a_visit_are_refused(
    warp_files: list[Path], tmp_path: Path
) -> None:
    # The other patch of the same visit, with another filter, and taken in another night.
    in_other_patch = next(f for f in warp_files if f.name == "warp_1_r_3000.fits")
    for cards, reason in (({"FILTER": "other"}, "the filter 'other'"), ({"MJD": 51544.6}, "20000101")):
        bad = edited(
            in_other_patch, tmp_path / f"bad{len(cards)}{reason[-3]}.fits", header("PRIMARY", **cards)
        )
        message = one_line(ingest(tmp_path / "repo", warp_files[0], bad))
        assert str(bad) in message
        assert reason in message
        # The same against what the repository knows.
        repo = tmp_path / "known"
        assert ingest(repo, warp_files[0]).exit_code == 0
        message = one_line(ingest(repo, bad))
        assert str(bad) in message
        assert reason in message
        assert len(refs(repo)) == 1


def test_files_of_far_patches_need_their_names(tmp_path: Path) -> None:
    near, far = (bare(tmp_path / f"{x}.fits", x + 1, x, 0, (20, 30)) for x in (0, 20000))
    message = one_line(ingest(tmp_path / "repo", far, near))
    assert f"{far}: it lies so far from {near} that their patch would be 20030 pixels long" in message
    assert "give files of different patches different PATCH" in message
    assert not (tmp_path / "repo").exists()
    named = bare(tmp_path / "named.fits", 3, 20000, 0, (20, 30), PATCH=1)
    assert ingest(tmp_path / "repo", near, named).exit_code == 0


def test_the_repository_is_closed_when_a_file_is_refused(
    warp_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0]).exit_code == 0
    bad = edited(warp_files[1], tmp_path / "bad.fits", header("IMAGE", BUNIT="adu"))
    butler = Butler.from_config(str(repo), writeable=True)
    monkeypatch.setattr("lsst.coadd.deepprior.ingest.open_repository", lambda *_, **__: butler)
    one_line(ingest(repo, bad))
    with pytest.raises(RuntimeError, match="has been closed"):
        butler.query_dimension_records("visit")


@pytest.mark.parametrize("name", ["new#1", "%41", "file:new"])
def test_a_name_that_the_butler_reads_as_another_path(
    name: str, warp_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = one_line(ingest(Path(name), warp_files[0]))
    assert f"{name} would be made as {tmp_path}/" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", [slice(3000, None), slice(20000, 24000)])
def test_a_stored_warp_that_is_damaged(lost: slice, warp_files: list[Path], tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert ingest(repo, *warp_files[:2]).exit_code == 0
    for file in (repo / DEFAULT_RUN).rglob("*.fits"):
        content = bytearray(file.read_bytes())
        content[lost] = b"" if lost.stop is None else bytes(lost.stop - lost.start)
        file.write_bytes(content)
    message = one_line(ingest(repo, *warp_files[:2]))
    assert f"A warp that {DEFAULT_RUN} holds cannot be read; remove it and" in message
