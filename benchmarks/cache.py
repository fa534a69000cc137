# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Files of earlier runs, found again only if nothing that made them has changed."""

from __future__ import annotations

__all__ = ("NETWORK", "code_and_network", "code_of", "digest", "write_atomically", "write_text")

import ast
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lsst.coadd.deepprior

_PACKAGE = Path(lsst.coadd.deepprior.__file__).parent
_HERE = Path(__file__).parent

NETWORK = _PACKAGE / "resources" / "networks" / "default.safetensors"
"""The network that comes with the package."""


class _WhatRuns(ast.NodeTransformer):
    """Drops texts that stand alone, and imports for the checker of types, which change nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


@functools.cache
def _parsed(path: Path) -> tuple[str, frozenset[str]]:
    """Return the code of a module without comments and docstrings, and the siblings that it imports."""
    tree = _WhatRuns().visit(ast.parse(path.read_text()))
    siblings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module else [alias.name for alias in node.names]
            if node.level == 0 and module.startswith("lsst.coadd.deepprior."):
                siblings.add(module.rsplit(".", 1)[1])
            elif node.level == 1 or node.level == 0:
                siblings.update(names)
        elif isinstance(node, ast.Import):
            siblings.update(alias.name for alias in node.names)
    return ast.unparse(tree), frozenset(siblings)


def code_of(modules: Iterable[str], alone: Iterable[str] = ()) -> str:
    """Return a digest of the code of some modules and of all they import from the package or this folder.

    Comments, docstrings and layout do not count.

    Parameters
    ----------
    modules : `~collections.abc.Iterable` [`str`]
        Names of modules of the package or of this folder, without the package.
    alone : `~collections.abc.Iterable` [`str`], optional
        Names of modules of this folder that count without what they import.

    Returns
    -------
    digest : `str`
        12 hexadecimal digits.

    Raises
    ------
    FileNotFoundError
        Raised if there is no such module.
    """
    left, done = set(modules), {f"{name} alone": _parsed(_HERE / f"{name}.py")[0] for name in alone}
    while left:
        name = left.pop()
        path = next((p for p in (_HERE / f"{name}.py", _PACKAGE / f"{name}.py") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"There is no module {name} in {_PACKAGE} or {_HERE}.")
        done[name], imported = _parsed(path)
        left |= {
            other
            for other in imported - done.keys()
            if (_HERE / f"{other}.py").is_file() or (_PACKAGE / f"{other}.py").is_file()
        }
    return digest(done)


def code_and_network(modules: Iterable[str], alone: Iterable[str] = ()) -> str:
    """Return a digest of code, as `code_of` does, and of the network that comes with the package.

    Parameters
    ----------
    modules, alone : `~collections.abc.Iterable` [`str`]
        As in `code_of`.

    Returns
    -------
    digest : `str`
        12 hexadecimal digits.
    """
    return digest([code_of(modules, alone), hashlib.sha256(NETWORK.read_bytes()).hexdigest()])


def digest(value: Any) -> str:
    """Return 12 hexadecimal digits that identify a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and move it there, so that an interrupted run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (see `write_atomically`)."""

    def write(part: Path) -> None:
        part.write_text(text)

    write_atomically(path, write)
