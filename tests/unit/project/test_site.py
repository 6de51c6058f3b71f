"""The site of the pages: every link leads somewhere, and a reader's browser asks nobody else for
anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import engine_loader
import engine_registry
from engine_cli.main import COMMANDS
from tests.support.checkout import PACKAGES, ROOT

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Loads(HTMLParser):
    """What a browser fetches by itself to show a page; `link rel=canonical` is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        self.addresses += [value or "" for name, value in attrs if (tag, name) in LOADED]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # ruff formats signatures, and is looked for on the path
    scripts = str(Path(sys.executable).parent)
    path = {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(PACKAGES),
    }
    env = {**os.environ, **path, "NO_MKDOCS_2_WARNING": "1"}
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",  # and not --quiet, which hides warnings from --strict as well
        "--site-dir",
        str(folder),
    ]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_a_page_loads_nothing_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text("utf-8"))
        assert [address for address in loads.addresses if "//" in address] == [], page


def test_no_page_has_a_diagram_that_only_a_script_would_draw() -> None:
    """The site loads no such script, so readers would see the diagram's source."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert [page for page in pages if "```mermaid" in page.read_text("utf-8")] == []


def test_the_reference_has_every_command_and_every_public_name(site: Path) -> None:
    commands, names = (
        (site / "reference" / page / "index.html").read_text("utf-8") for page in ("cli", "python")
    )
    assert [command for command in COMMANDS if f'id="engines-{command}"' not in commands] == []
    for package in (engine_registry, engine_loader):
        public = [
            f"{package.__name__}.{module}.{name}" for name, module in package._MODULE_OF.items()
        ]
        assert [name for name in public if f'id="{name}"' not in names] == []
