"""The pictures of the terminal in docs/: `engines watch` and `engines demo`, as they run on a
terminal with an embedded etcd.

python -m scripts.screenshots            writes both
python -m scripts.screenshots demo       writes this one

The demo is a real one. The watch is the real command, but no weights move: this script registers
ranks, and reports a progress of its choice for loads that there are not. The page says so.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from engine_registry import (
    Manifest,
    ModelIdentity,
    RankRecord,
    RankState,
    Region,
    Registry,
    TensorEntry,
)
from engine_registry.etcd.local import LocalEtcd
from tests.support.ranks import register
from tests.support.terminal import on_terminal

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = 114
COLOURS = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
# Pages load nothing from other hosts: the reader's own font.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
)
MODEL = ModelIdentity("qwen3-8b", "main", "bfloat16")
NBYTES = 15_200_000_000
PERCENT, STEPS = 63, 8  # that the first load has read, and in how many of its last reports
PACES = (1.0, 0.66, 0.2)  # of the loads, to that of the first one


def watch() -> None:
    """Two complete ranks, two that load from them in a chain, and a process that is no rank."""
    with ExitStack() as stack:
        etcd = stack.enter_context(LocalEtcd())
        registry = stack.enter_context(Registry.connect(etcd.endpoint))

        def rank(instance: str, number: int = 0, world_size: int = 1, **fields: object) -> None:
            entry = TensorEntry(
                "w", "uint8", (NBYTES,), 4096, NBYTES, (NBYTES,), (0,), opaque=False
            )
            stack.enter_context(
                register(
                    registry,
                    instance,
                    number,
                    world_size,
                    model=MODEL,
                    manifest=Manifest((entry,), (Region(4096, NBYTES),)),
                    session_id=f"10.0.0.{len(registry.instances()) + 4}:15000",
                    **fields,
                )
            )

        rank("qwen-a")
        rank("llama", 0, 2)
        rank("llama", 1, 2)
        terminal = stack.enter_context(
            on_terminal(
                "watch", env={**COLOURS, "ENGINES_ETCD": etcd.endpoint}, columns=COLUMNS, rows=20
            )
        )
        terminal.wait_for("llama ", "ready 2/2")
        rank("qwen-b", state=RankState.LOADING)
        rank("qwen-c", state=RankState.LOADING)
        first, second, third = (the_rank(registry, name) for name in ("qwen-a", "qwen-b", "qwen-c"))
        pairs = ((first, second), (second, third), (first, None))
        tickets = [registry.pull(source, reader) for source, reader in pairs]
        for ticket in tickets:
            stack.callback(ticket.close) if ticket is not None else None
        for percent in range(PERCENT - STEPS, PERCENT + 1):  # speeds are of several reports
            for ticket, pace in zip(tickets, PACES, strict=True):
                if ticket is not None:
                    ticket.report(int(percent * pace * NBYTES) // 100, NBYTES)
            terminal.wait_for("qwen-b ", f" {percent} %")
        for name in ("qwen-b", "qwen-c", " pid "):
            terminal.wait_for(name, "%", "B/s")
        save(terminal.frame(), "engines watch", DOCS / "how-to" / "watch.svg")


def the_rank(registry: Registry, instance: str) -> RankRecord:
    (record,) = registry.ranks(instance)
    return record


def demo() -> None:
    with on_terminal("demo", env=COLOURS, columns=COLUMNS) as terminal:
        if terminal.process.wait(300):
            raise click.ClickException(f"the demo failed: {terminal.said}")
        terminal.join()
        save(f"$ engines demo\n{terminal.said}", "engines demo", DOCS / "tutorial" / "demo.svg")


def save(ansi: str, title: str, path: Path) -> None:
    """The text of a terminal, colours included, as a picture of it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    text = Text.from_ansi(ansi)
    text.rstrip()
    console.print(text)
    svg = console.export_svg(title=title, code_format=SVG, unique_id=path.stem)
    path.write_text(svg + "\n", "utf-8")
    click.echo(f"{path}: {path.stat().st_size:,} bytes")


SHOTS: dict[str, Callable[[], None]] = {"watch": watch, "demo": demo}

if __name__ == "__main__":
    for name in sys.argv[1:] or SHOTS:
        SHOTS[name]()
