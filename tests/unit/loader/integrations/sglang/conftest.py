"""SGLang's modules, as far as ours import them, made of stand-ins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.sglang import Process, forget_ours, install


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    process = install(monkeypatch)
    forget_ours()
    yield process
    forget_ours()
