"""An unmodified SGLang starts from peers, or from its disk, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_registry import Registry
from tests.engines.sglang.engines import Engines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_second_engine_copies_from_the_first_and_generates_the_same(
    engines: Engines, registry: Registry, settings: dict[str, object], model: Path, tp_size: int
) -> None:
    plain = engines.start(model, tp_size=tp_size)
    expected = plain.tokens()
    plain.close()
    first = engines.start(model, settings, tp_size=tp_size)
    assert len(first.lines("with the engine's loader")) == tp_size
    assert first.tokens() == expected
    second = engines.start(model, settings, tp_size=tp_size)
    assert len(second.lines("MB of weights from")) == tp_size
    assert second.tokens() == expected
    statuses = registry.instances()
    assert [len(status.records) for status in statuses] == [tp_size, tp_size]
    assert statuses[0].contents == statuses[1].contents
