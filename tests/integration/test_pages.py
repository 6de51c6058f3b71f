"""The Python code of README and of the pages runs as it stands there, one block after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from engine_registry.etcd.local import LocalEtcd
from tests.support.checkout import ROOT

ENDPOINT = '"127.0.0.1:2379"'  # as pages have it
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text("utf-8")
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(
    shared_etcd: LocalEtcd,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: Path,
) -> None:
    """In a folder and a namespace that are empty, with the etcd of this test."""
    text = page.read_text("utf-8")
    copy = tmp_path / page.name
    copy.write_text(
        text.replace(ENDPOINT, f'"{shared_etcd.endpoint}", namespace="{namespace}"'), "utf-8"
    )
    monkeypatch.chdir(tmp_path)
    sybil = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(tmp_path), pattern="*.md")
    examples = list(sybil.parse(copy).examples())
    assert len(re.findall(r"^```python", text, re.MULTILINE)) <= len(examples)
    for example in examples:
        example.evaluate()


def test_the_pages_that_show_the_library_have_code() -> None:
    names = {page.stem for page in PAGES}
    assert {
        "README",
        "first-load",
        "publish-and-load",
        "reshard",
        "start-from-peers",
        "update-weights-in-rl",
    } <= names
