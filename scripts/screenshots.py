"""The pictures in docs/: `engines watch` and `engines demo` on a terminal, and the dashboard.

python -m scripts.screenshots            writes all
python -m scripts.screenshots demo       writes this one

All show real loads: of the demo, and of the fleet that `engines demo --keep` leaves. That of the
dashboard needs what `make test-browser` installs: PYTHONPATH=.browser.
"""

from __future__ import annotations

import io
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from engine_cli.demo.engines import RANKS
from engine_cli.demo.fleet import LINKS
from tests.support.terminal import on_terminal
from tests.support.waiting import wait_until

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = 114
COLOURS = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
# Pages load nothing from other hosts: the reader's own font.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
)
WAIT_S = 300.0
PAGES: tuple[tuple[str, int, int, Any], ...] = (
    ("light", 1600, 900, "light"),
    ("narrow", 400, 860, "dark"),
)
LOADS = re.compile(r"^\d+ % · \d.* MB/s$")  # how far a load is, and how fast


@contextmanager
def fleet() -> Iterator[str]:
    """What `engines demo --keep` says of the fleet that it has started."""
    with on_terminal("demo", "--keep", env=COLOURS, columns=COLUMNS) as terminal:
        wait_until(lambda: "engines doctor" in terminal.said, WAIT_S)
        yield terminal.said
        terminal.process.send_signal(signal.SIGINT)
        terminal.process.wait(WAIT_S)


def watch() -> None:
    with fleet() as said:
        env = {**COLOURS, "ENGINES_ETCD": re.findall(r"--etcd (\S+)", said)[0]}
        with on_terminal("watch", env=env, columns=COLUMNS, rows=27) as terminal:
            ranks = [f"{link}/{rank} " for link in LINKS for rank in range(RANKS)]
            wait_until(lambda: all("B/s" in terminal.line(rank) for rank in ranks), WAIT_S)
            save(terminal.frame(), "engines watch", DOCS / "how-to" / "watch.svg")


def dashboard() -> None:
    from playwright.sync_api import sync_playwright

    with fleet() as said, sync_playwright() as playwright:
        (url,) = re.findall(r"dashboard is (\S+)", said)
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, width, height, scheme in PAGES:
            page = chromium.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(url)
            page.get_by_text(LOADS).first.wait_for(timeout=1000 * WAIT_S)
            path = DOCS / "how-to" / f"dashboard-{name}.png"
            page.screenshot(path=path, full_page=name == "narrow")
            click.echo(f"{path}: {path.stat().st_size:,} bytes")
        chromium.close()


def demo() -> None:
    with on_terminal("demo", env=COLOURS, columns=COLUMNS) as terminal:
        if terminal.process.wait(WAIT_S):
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


SHOTS: dict[str, Callable[[], None]] = {"watch": watch, "demo": demo, "dashboard": dashboard}

if __name__ == "__main__":
    for name in sys.argv[1:] or SHOTS:
        SHOTS[name]()
