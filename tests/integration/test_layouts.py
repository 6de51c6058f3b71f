"""Any layout into any other: two jobs of real processes, real transfer engine, compared byte by
byte with the whole tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from engine_loader.planning.reads import Costs
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.support.processes.layout import LAYOUTS

SOURCES, DESTINATIONS = 4, 3
CUTS_COLUMNS = {"tp-2-to-tp-3", "fsdp-4-to-tp-2", "fsdp-2-tp-2-to-tp-2", "pp-2-to-tp-2"}


# For the first test, which starts seven processes that import torch.distributed.
pytestmark = pytest.mark.timeout(350)


class Destinations:
    """Each process loads one layout after another."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def all_do(self, name: str) -> list[dict[str, Any]]:
        """What those of them that take part answer."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        answers = [json.loads(line_of(process)) for process in self._processes]
        return [answer for answer in answers if answer is not None]


@pytest.fixture(scope="module")
def destinations(
    shared_etcd: LocalEtcd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Destinations]:
    """Starting them takes longer than all that they do."""
    stores = tmp_path_factory.mktemp("stores")
    env = {"ENGINES_ETCD": shared_etcd.endpoint, "TEST_NAMESPACE": f"/{uuid.uuid4().hex[:8]}"}
    started = Processes({**os.environ, **env})
    try:
        sources, destinations = (
            [
                started.start(
                    "-m",
                    "tests.support.processes.layout",
                    side,
                    str(rank),
                    str(size),
                    str(stores / side),
                )
                for rank in range(size)
            ]
            for side, size in (("source", SOURCES), ("destination", DESTINATIONS))
        )
        for source in sources:
            assert line_of(source) == "published\n"
        yield Destinations(destinations)
    finally:
        started.end()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_of_every_rank_is_that_of_the_whole_and_little_else_is_read(
    destinations: Destinations, layout: str
) -> None:
    answers = destinations.all_do(layout)
    assert len(answers) == LAYOUTS[layout][3]
    for answer in answers:
        assert answer["different"] == []
        assert answer["nbytes"] == answer["needed"]
        # A cut through the columns that a rank holds costs the gaps between them. So do small
        # tensors that happen to lie close.
        gaps = answer["tensors"] * Costs().read_nbytes
        assert (
            answer["read_nbytes"] <= answer["needed"] * (2 if layout in CUTS_COLUMNS else 1) + gaps
        )
        assert answer.get("runs", True)
        assert answer.get("step", 5) == 5


def test_in_a_job_all_fail_where_the_source_changes_between_planning_and_reading(
    destinations: Destinations,
) -> None:
    for answer in destinations.all_do("updated meanwhile"):
        assert list(answer["failures"]) == ["0", "1", "2"]
        for message in answer["failures"].values():
            assert message.startswith("TornRead: the weights changed after this load had begun")
        assert (answer["values"], answer["then"]) == ([0], [2])


def test_in_a_job_all_ranks_learn_that_there_is_no_such_instance(
    destinations: Destinations,
) -> None:
    for answer in destinations.all_do("nobody"):
        assert list(answer["failures"]) == ["0", "1", "2"]
        assert answer["failures"]["2"].startswith(
            "InstanceNotFound: instance 'nobody' is not registered"
        )
