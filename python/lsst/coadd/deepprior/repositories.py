# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Butler repositories and collections as commands name them."""

from __future__ import annotations

__all__ = (
    "RepositoryError",
    "check_run_name",
    "is_repository_uri",
    "open_repository",
    "unwrapped_errors",
)

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lsst.daf.butler import Butler
from lsst.daf.butler.utils import has_globs


class RepositoryError(RuntimeError):
    """Raised if a repository cannot be opened, or a name not be used in it; the message is one sentence."""


def is_repository_uri(repo: str | Path) -> bool:
    """Return whether this is a URI or an alias of the repository index, and not a path."""
    return "://" in str(repo) or str(repo) in Butler.get_known_repos()


def open_repository(repo: str | Path, *, writeable: bool = False) -> Butler:
    """Open a repository.

    Parameters
    ----------
    repo : `str` or `~pathlib.Path`
        Root directory, URI, or alias of the repository.
    writeable : `bool`, optional
        Whether it will be written to.

    Returns
    -------
    butler : `lsst.daf.butler.Butler`
        The repository.

    Raises
    ------
    RepositoryError
        Raised if it cannot be opened.
    """
    try:
        return Butler.from_config(str(repo), writeable=writeable)
    except Exception as err:  # a damaged configuration can raise anything
        reason = (str(err).strip() or type(err).__name__).split("\n")[0].rstrip(".")
        raise RepositoryError(f"{repo} cannot be opened as a Butler repository: {reason}.") from err


def check_run_name(run: str) -> None:
    """Refuse the name of a collection that no command could name as an input afterwards.

    Raises
    ------
    RepositoryError
        Raised if it is empty, or has a comma or a wildcard.
    """
    if not run.strip() or "," in run or has_globs(run):
        raise RepositoryError(f"{run!r} is no name of a collection; name one without commas and wildcards.")


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raise what the file system says where the Butler, which cannot store a dataset, wraps it.

    Raises
    ------
    OSError
        Raised if a file cannot be written.
    """
    try:
        yield
    except RuntimeError as err:
        if isinstance(err.__cause__, OSError):
            raise err.__cause__ from None
        raise
