"""What `engines artifacts` prints. docs/reference/json.md lists the names of JSON: they stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_cli.render.tables import size
from engine_loader.artifacts.held import Held
from engine_loader.artifacts.key import ArtifactName
from engine_registry.schema.labels import labels_text
from engine_registry.schema.printable import count

if TYPE_CHECKING:
    from engine_loader import ArtifactReport


def listed_json(held: Held) -> dict[str, Any]:
    return {
        "name": held.name.name,
        "digest": held.name.digest,
        "key": dict(held.name.key),
        "content": held.content,
        "nbytes": held.nbytes,
        "instances": sorted(record.instance for record in held.records),
    }


def pulled_json(report: ArtifactReport, folder: Path) -> dict[str, Any]:
    facts = report.facts()
    return {"name": facts.pop("artifact"), **facts, "folder": str(folder)}


def pulled_text(report: ArtifactReport, folder: Path) -> str:
    kept = f", {report.kept} differ and stayed" if report.kept else ""
    return (
        f"pulled {report.name}@{report.digest}: {count(report.files, 'file')}, "
        f"{size(report.nbytes)} in {report.seconds:.2f} s; {report.new} new, "
        f"{report.unchanged} unchanged{kept} → {folder}"
    )


def artifact_table(held: Sequence[Held]) -> tuple[Sequence[str], list[list[str]]]:
    return ("ARTIFACT", "HOLDERS", "SIZE", "KEY"), [
        [
            str(each.name),
            str(len(each.records)),
            size(each.nbytes),
            labels_text(each.name.key),
        ]
        for each in held
    ]


def why_none(wanted: ArtifactName, held: Sequence[Held]) -> tuple[str, str]:
    """What to say where no peer offers it, and what to do: with the nearest key that there is."""
    others = [each.name for each in held if each.name.name == wanted.name]
    what = f"no peer offers the artifact {wanted}"
    if not others:
        return what, "look at `engines artifacts list`"
    nearest = min((wanted.differences(other) for other in others), key=len)
    return f"{what}; the nearest has another key: {', '.join(nearest)}", "push one with this key"
