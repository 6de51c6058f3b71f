"""The Python code of README and of the pages runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_registry.etcd.local import LocalEtcd
from tests.support.checkout import ROOT
from tests.support.pages import run_page

OF_ENGINES = {"transformers"}  # tests/engines runs them: they need what is not installed here
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text("utf-8") and page.stem not in OF_ENGINES
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
    run_page(page, shared_etcd.endpoint, namespace, tmp_path, monkeypatch)


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
