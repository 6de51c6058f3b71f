"""Ranks in several zones: real processes read from near ones, and say where they are."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_cli.exits import Exit
from engine_loader import (
    Engine,
    InProcessEngine,
    MooncakeEngine,
    Publication,
    PublishOptions,
    Shard,
    load,
    publish,
)
from engine_loader.engines.nearness import Nearness
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InstanceMismatch
from tests.integration.conftest import Processes, line_of
from tests.support.processes.source import MODEL, content

NBYTES = 8 << 20
WHERE = {"a": 3, "b": 5}  # how many start at once in each zone
TINY = ModelIdentity("tiny")
WEIGHTS = {"w": torch.arange(64.0)}
WHOLE = {"w": Shard((64,), (0,))}


def published(
    registry: Registry,
    engine: Engine,
    instance: str,
    rank: int = 0,
    topology: dict[str, tuple[int, int]] | None = None,
    labels: dict[str, str] | None = None,
) -> Publication:
    """All of the weights, as one of two ranks where it has a topology."""
    return publish(
        registry,
        engine,
        instance=instance,
        rank=rank,
        world_size=2 if topology or rank else 1,
        tensors=WEIGHTS,
        model=TINY,
        shards=WHOLE,
        topology=topology,
        options=PublishOptions(labels=labels),
    )


def test_of_ranks_that_start_at_once_in_a_zone_without_a_source_few_read_from_another(
    processes: Processes, registry: Registry
) -> None:
    zone_of = {f"{zone}{number}": zone for zone in WHERE for number in range(WHERE[zone])}
    members = {
        name: processes.start(
            "-m", "tests.support.processes.replica", name, str(NBYTES), "0.01", f"{zone}/r1"
        )
        for name, zone in zone_of.items()
    }
    with (
        MooncakeEngine("127.0.0.1", location="a/r1") as engine,
        publish(
            registry,
            engine,
            instance="source",
            rank=0,
            world_size=1,
            tensors=content(0, NBYTES),
            model=MODEL,
        ),
    ):
        for member in members.values():
            assert line_of(member) == "up\n"
        for member in members.values():
            assert member.stdin is not None
            member.stdin.write("\n")
            member.stdin.flush()
        read_across: Counter[str] = Counter()
        for name, member in members.items():
            assert line_of(member) == "half\n"
            loaded, version, how, sources = line_of(member).split()
            assert (loaded, version, how) == ("loaded", "0", "equal")
            zones = {zone_of.get(key.split("/")[2], "a") for key in sources.split(",")}
            read_across[zone_of[name]] += zones != {zone_of[name]}
    assert read_across["a"] == 0
    # A second one if it was held up while it registered, and began before the first that was seen.
    assert read_across["b"] in (1, 2)


def test_a_rank_reads_from_its_zone_and_the_report_says_how_near_each_source_was(
    registry: Registry,
) -> None:
    def loaded(location: str) -> dict[str, Nearness]:
        tensors = {"w": torch.zeros(64)}
        with InProcessEngine(location=location) as engine:
            report = load(registry, engine, TINY, rank=0, tensors=tensors, shards=WHOLE)
        assert torch.equal(tensors["w"], WEIGHTS["w"])
        assert report.facts()["near"] == [share.near.value for share in report.shares]
        return {share.name.split("/")[2]: share.near for share in report.shares if share.nbytes}

    with ExitStack() as stack:
        for name, location in {"far": "a", "in-zone": "b/r1/n1", "in-rack": "b/r2/n2"}.items():
            engine = stack.enter_context(InProcessEngine(location=location))
            stack.enter_context(published(registry, engine, name))
        assert loaded("b/r2/n3")["in-rack"] is Nearness.RACK
        assert set(loaded("b/r9/n9").items()) <= {
            ("in-zone", Nearness.ZONE),
            ("in-rack", Nearness.ZONE),
        }
        assert loaded("a") == {"far": Nearness.ELSEWHERE} or loaded("a") == {"far": Nearness.NODE}


def test_ranks_of_one_instance_may_stand_in_several_zones_and_not_have_several_labels(
    registry: Registry,
) -> None:
    """A loader of a part reads it from the rank of its zone, though each rank has it."""
    with ExitStack() as stack:
        first, second = [stack.enter_context(InProcessEngine(location=zone)) for zone in "ab"]
        stack.enter_context(published(registry, first, "wide", 0, {"dp": (0, 2)}))
        with pytest.raises(InstanceMismatch, match="labels"):
            published(registry, second, "wide", 1, {"dp": (1, 2)}, labels={"zone": "b"})
        stack.enter_context(published(registry, second, "wide", 1, {"dp": (1, 2)}))
        (status,) = registry.ready(TINY)
        assert [record.location.zone for record in status.records] == ["a", "b"]
        for zone in "ab":
            tensors = {"w": torch.zeros(64)}
            engine = stack.enter_context(InProcessEngine(location=zone))
            report = load(registry, engine, "wide", tensors=tensors, shards=WHOLE)
            (share,) = [share for share in report.shares if share.nbytes]
            assert share.name == f"/engines/wide/{'ab'.index(zone)}"


def test_the_command_line_says_where_ranks_are_and_how_near_sources_were(
    processes: Processes, registry: Registry, namespace: str, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(WEIGHTS, weights)
    at = ("--namespace", namespace)
    here = (*at, "--host", "127.0.0.1")
    source = processes.engines(
        *("register", "one", "--rank", "0", "--world-size", "1", "--weights", str(weights), *here),
        ENGINES_LOCATION="eu-1a//node-5",
    )
    assert line_of(source).startswith("registered one/0")
    copied = processes.run("load", "one", "--rank", "0", "--json", "--location", "eu-1b", *here)
    assert copied.returncode == Exit.DONE, copied.stderr
    (share,) = json.loads(copied.stdout)["sources"]
    assert (share["key"], share["near"]) == ("/engines/one/0", "elsewhere")
    listed = processes.run("list", *at).stdout
    assert "ZONES" in listed
    assert "eu-1a" in listed
    assert json.loads(processes.run("list", "--json", *at).stdout)["instances"][0]["zones"] == [
        "eu-1a"
    ]
    shown = processes.run("show", "one", *at).stdout
    assert "LOCATION" in shown
    assert "eu-1a//node-5" in shown
    (rank,) = json.loads(processes.run("show", "one", "--json", *at).stdout)["ranks"]
    assert rank["location"] == "eu-1a//node-5"
    wrong = processes.run("load", "one", "--rank", "0", "--location", "a b", *here)
    assert wrong.returncode == Exit.USAGE
    assert "location" in wrong.stderr
