"""Log lines: quiet by default, each with an event and its facts, as sentences or as JSON, and all
of them documented.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine_loader.metrics  # noqa: F401  declares what it counts
from engine_cli.logs import _Json, _Sentence
from engine_cli.runtime.children import python
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields
from tests.support.checkout import ROOT

DOCS = ROOT / "docs"
METRICS = (DOCS / "reference" / "metrics.md").read_text("utf-8")
EVENTS = (DOCS / "reference" / "log-events.md").read_text("utf-8")
KINDS = ("counter", "gauge", "histogram")
LEVELS = {"debug", "info", "warning", "error", "exception", "log"}


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the rows that begin with a name."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def section(package: str) -> str:
    return METRICS.split(f"\n## Metrics of `{package}`\n", 1)[1].split("\n## ", 1)[0]


# -- metrics
# --------------------------------------------------------------------------------------------------


def documented(package: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {
        name.strip("`"): (kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, *_ in (row for row in rows(section(package)) if row[1] in KINDS)
    }


@pytest.mark.parametrize("package", ["registry", "loader"])
def test_the_page_names_exactly_the_metrics_that_exist_with_their_types_and_labels(
    package: str,
) -> None:
    exist = {
        meter.name + ("_total" if meter.kind == "Counter" else ""): (
            meter.kind.lower(),
            meter.labels,
        )
        for meter in metrics.declared()
        if meter.name.startswith(f"engines_{package}_")
    }
    assert documented(package) == exist


def test_every_metric_is_of_one_of_the_two_packages() -> None:
    assert all(
        re.match(r"engines_(registry|loader)_[a-z_]+$", meter.name) for meter in metrics.declared()
    )


def test_the_page_explains_every_value_that_a_label_can_have_beside_its_metric() -> None:
    parts = [
        part for package in ("registry", "loader") for part in section(package).split("\n### ")
    ]
    for meter in metrics.declared():
        name = meter.name + ("_total" if meter.kind == "Counter" else "")
        (part,) = (part for part in parts if any(row[0] == f"`{name}`" for row in rows(part)))
        explained = {row[0].strip("`") for row in rows(part) if len(row) == 2 and row[1]}
        assert set(meter.values) <= explained, name


# -- events
# --------------------------------------------------------------------------------------------------


def log_calls() -> Iterator[tuple[Path, ast.Call]]:
    for package in ("registry", "loader", "cli"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                if (
                    call
                    and isinstance(node.func.value, ast.Name)  # type: ignore[attr-defined]
                    and node.func.value.id == "log"  # type: ignore[attr-defined]
                    and node.func.attr in LEVELS  # type: ignore[attr-defined]
                ):
                    yield path, node  # type: ignore[misc]


def event_of(call: ast.Call) -> str:
    """The name that the call's `extra` begins with."""
    extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
    if isinstance(extra, ast.Call) and isinstance(extra.args[0], ast.Constant):
        return str(extra.args[0].value)
    return ""


def test_every_log_line_has_an_event() -> None:
    assert [f"{path.name}:{call.lineno}" for path, call in log_calls() if not event_of(call)] == []


def test_the_page_names_exactly_the_events_of_warnings_and_errors() -> None:
    loud = {
        event_of(call)
        for _, call in log_calls()
        if call.func.attr in ("warning", "error", "exception", "log")  # type: ignore[attr-defined]
    }
    named = {name.strip("`") for name, *rest in rows(EVENTS) if len(rest) == 2}
    assert named == loud


def test_what_to_do_is_said_of_events_that_the_page_has() -> None:
    named = {name.strip("`") for name, *rest in rows(EVENTS) if len(rest) == 2}
    remedied = {
        event
        for name, *rest in rows(EVENTS)
        if len(rest) == 1
        for event in re.findall(r"`(\w+)`", name)
    }
    assert remedied <= named


# -- how they look
# --------------------------------------------------------------------------------------------------


def a_line(message: str, *args: Any, **options: Any) -> logging.LogRecord:
    return logging.getLogger("engine_registry.x").makeRecord(
        "engine_registry.x",
        logging.WARNING,
        "f.py",
        1,
        message,
        args,
        options.get("exc_info"),
        extra=options.get("extra"),
    )


def test_json_has_time_level_logger_message_and_fields() -> None:
    error = RuntimeError("what it says is in the message")
    line = _Json().format(
        a_line(
            "%s is away\n\x1b[31m",
            "etcd",
            extra=fields("watch_lost", prefix="/engines/", error=error),
        )
    )
    assert "\n" not in line
    assert line.isascii()
    assert line.isprintable()
    data = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", data.pop("time"))
    assert data == {
        "level": "warning",
        "logger": "engine_registry.x",
        "message": "etcd is away\n\x1b[31m",
        "fields": {"event": "watch_lost", "prefix": "/engines/", "error": "RuntimeError"},
    }


def test_json_of_others_lines_and_of_exceptions_is_one_line_too() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = _Json().format(
            a_line("failed", exc_info=sys.exc_info(), extra={"fields": {"path": Path("/x")}})
        )
    data = json.loads(line)
    assert (data["fields"], data["exception"].endswith("ValueError: two\nlines")) == (
        {"path": "/x"},
        True,
    )
    assert json.loads(_Json().format(a_line("no fields")))["fields"] == {}


def test_a_sentence_holds_nothing_that_a_terminal_would_act_on() -> None:
    assert (
        _Sentence("engines: %(message)s").format(a_line("\x1b[31m%s", "x\ny"))
        == "engines: \\x1b[31mx\\ny"
    )


def test_the_libraries_say_nothing_until_somebody_listens() -> None:
    code = """
import logging, engine_loader, engine_registry
for name in ("engine_registry.etcd.follow", "engine_loader.loading.load"):
    logging.getLogger(name).error("something is wrong")
"""
    ran = subprocess.run(python(code), check=True, capture_output=True, text=True, cwd=ROOT)
    assert (ran.stdout, ran.stderr) == ("", "")
