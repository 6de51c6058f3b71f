"""Runs the Python code of a page of the docs as it stands there, one block after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

_ENDPOINT = '"127.0.0.1:2379"'  # as pages have it


def run_page(
    page: Path, endpoint: str, namespace: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder and a namespace that are empty, with the etcd of the test."""
    text = page.read_text("utf-8")
    copy = folder / page.name
    copy.write_text(text.replace(_ENDPOINT, f'"{endpoint}", namespace="{namespace}"'), "utf-8")
    monkeypatch.chdir(folder)
    sybil = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(folder), pattern="*.md")
    examples = list(sybil.parse(copy).examples())
    assert len(re.findall(r"^```python", text, re.MULTILINE)) <= len(examples)
    for example in examples:
        example.evaluate()
