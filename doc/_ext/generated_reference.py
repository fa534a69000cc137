# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Sphinx directives that write reference tables from the code itself, so that they cannot go stale.

``task-reference``
    Datasets and config fields of a pipeline task, by its full name.
``mask-plane-reference``
    Planes of an `lsst.images.MaskSchema`, by its full name.
``column-reference``
    Columns of a table, by the full name of a mapping from their names to type, unit and description.
``network-reference``
    Card and trained ranges of a network, by the full name of a function that returns it.
"""

from __future__ import annotations

__all__ = ("setup",)

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lsst.pex.config import ChoiceField, Field, ListField, RangeField
from lsst.pipe.base import PipelineTaskConfig


def find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def list_table(head: Iterable[str], rows: Iterable[Iterable[str]], widths: str) -> str:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in [head, *rows]:
        first, *others = (" ".join(cell.split()) for cell in row)
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join([*lines, ""])


class Reference(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.text(find(self.arguments[0])))

    def text(self, target: Any) -> str:
        raise NotImplementedError


class TaskReference(Reference):
    def text(self, target: Any) -> str:
        config = target.ConfigClass()
        fields = [field for field in config._fields.values() if self.is_own(field)]
        return "\n".join(
            [
                inspect.getdoc(target).split("\n\n")[0],
                "",
                self.connections(config.ConnectionsClass(config=config)),
                *(map(self.field, fields) if fields else ["It has no fields of its own."]),
            ]
        )

    def connections(self, connections: Any) -> str:
        rows = []
        for kind in ("inputs", "outputs"):
            for name in sorted(getattr(connections, kind)):
                connection = getattr(connections, name)
                if not connection.name.endswith(("_config", "_log", "_metadata")):
                    rows.append(
                        (
                            f"``{name}``",
                            kind[:-1],
                            f"``{connection.name}``",
                            f"``{connection.storageClass}``",
                            connection.doc,
                        )
                    )
        return list_table(
            ("Connection", "", "Dataset type", "Storage class", "What it is"), rows, "12 8 22 16 42"
        )

    def is_own(self, field: Field) -> bool:
        return field.name != "connections" and field.name not in PipelineTaskConfig._fields

    def field(self, field: Field) -> str:
        kind = field.itemtype if isinstance(field, ListField) else field.dtype
        facts = [f"list of {kind.__name__}" if isinstance(field, ListField) else kind.__name__]
        facts.append(f"default ``{field.default!r}``")
        if isinstance(field, RangeField):
            facts.append(f"in ``{field.rangeString}``")
        lines = [f"``{field.name}`` ({', '.join(facts)})", f"    {' '.join(field.doc.split())}"]
        if isinstance(field, ChoiceField):
            choices = {value: doc for value, doc in field.allowed.items() if value is not None}
            lines += [
                "",
                *(f"    - ``{value!r}``: {' '.join(doc.split())}" for value, doc in choices.items()),
            ]
        return "\n".join([*lines, ""])


class MaskPlaneReference(Reference):
    def text(self, target: Any) -> str:
        planes = [plane for plane in target if plane is not None]
        return list_table(("Plane", "Set where"), [(f"``{p.name}``", p.description) for p in planes], "20 80")


class ColumnReference(Reference):
    def text(self, target: Any) -> str:
        rows = [
            (f"``{name}``", dtype.__name__, "" if unit is None else str(unit), description)
            for name, (dtype, unit, description) in target.items()
        ]
        return list_table(("Column", "Type", "Unit", "What it is"), rows, "20 10 10 60")


class NetworkReference(Reference):
    def text(self, target: Any) -> str:
        network = target()
        card = network.card | {"sha256": network.sha256}
        rows = [(f"``{axis}``", f"{low:.3g}", f"{high:.3g}") for axis, (low, high) in network.ranges.items()]
        return "\n".join(
            [
                list_table(("Entry", "Value"), [(f"``{k}``", f"``{v}``") for k, v in card.items()], "25 75"),
                list_table(("Axis", "Trained from", "to"), rows, "40 30 30"),
            ]
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("task-reference", TaskReference)
    app.add_directive("mask-plane-reference", MaskPlaneReference)
    app.add_directive("column-reference", ColumnReference)
    app.add_directive("network-reference", NetworkReference)
    return {"parallel_read_safe": True}
