"""Labels in a real etcd: lists and watches choose by them, and all ranks of an instance agree."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from engine_cli.exits import Exit
from engine_loader import (
    InProcessEngine,
    PublishOptions,
    Replica,
    load,
    load_or_seed,
    publish,
)
from engine_registry import (
    InstanceGone,
    InstanceReady,
    ModelIdentity,
    RankJoined,
    RankLost,
    Registry,
)
from engine_registry.errors import InstanceMismatch, InvalidField
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.ranks import register


def test_lists_and_watches_choose_by_labels(
    registry: Registry, processes: Processes, namespace: str
) -> None:
    with (
        register(registry, "a", labels={"team": "search", "tier": "gold"}),
        register(registry, "b", labels={"team": "ads"}),
        register(registry, "c"),
    ):

        def found(selector: str) -> list[str]:
            return [status.instance for status in registry.instances(selector)]

        assert found("team") == ["a", "b"]
        assert found("team=search,tier") == ["a"]
        assert found("team!=search") == ["b", "c"]
        with pytest.raises(InvalidField, match="KEY!=VALUE"):
            registry.watch(selector="team in (a)")

        def listed(*args: str) -> str:
            ran = processes.run("list", "--namespace", namespace, *args)
            assert ran.returncode == Exit.DONE, ran.stderr
            return ran.stdout

        table = listed("--label", "team=search", "--label", "tier!=silver")
        assert [line.split()[0] for line in table.splitlines()] == ["INSTANCE", "a"]
        assert "team=search,tier=gold" in table
        (only,) = json.loads(listed("--label", "!team", "--json"))["instances"]
        assert (only["instance"], only["labels"]) == ("c", {})
        assert listed("--label", "team=none") == "no instance matches (registered: 3)\n"
        shown = processes.run("show", "--namespace", namespace, "a")
        assert "labels: team=search,tier=gold\n" in shown.stdout


def test_a_watch_of_labels_tells_of_their_instances_until_they_are_gone(
    registry: Registry, processes: Processes, namespace: str
) -> None:
    with (
        register(registry, "there", labels={"team": "search"}),
        registry.watch(selector="team=search") as watch,
    ):
        command = processes.engines(
            "watch", "--namespace", namespace, "--label", "team=search", "--lines"
        )
        assert [line_of(command).split()[1] for _ in range(2)] == ["there/0", "there"]
        with register(registry, "b", labels={"team": "ads"}):
            register(registry, "a", labels={"team": "search"}).withdraw()
        assert [line_of(command).split()[1] for _ in range(4)] == ["a/0", "a", "a/0", "a"]
        events = events_until(watch, lambda event: isinstance(event, InstanceGone))
        assert [type(event) for event in events] == [
            *(RankJoined, InstanceReady) * 2,
            RankLost,
            InstanceGone,
        ]
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == Exit.DONE


def test_a_rank_with_other_labels_than_its_siblings_is_refused(registry: Registry) -> None:
    with (
        register(registry, "a", 0, 2, labels={"team": "search"}),
        pytest.raises(InstanceMismatch, match=r"labels {'team': 'ads'}, but rank 0") as caught,
    ):
        register(registry, "a", 1, 2, labels={"team": "ads"})
    assert caught.value.details["field"] == "labels"


def test_a_replica_has_the_labels_that_it_is_given_and_none_of_its_source(
    registry: Registry,
) -> None:
    with InProcessEngine() as one, InProcessEngine() as other:
        source = publish(
            registry,
            one,
            instance="a",
            rank=0,
            world_size=1,
            tensors={"w": torch.arange(4.0)},
            model=ModelIdentity("tiny"),
            options=PublishOptions(labels={"team": "search"}),
        )
        with source:
            for name, labels in (("b", {"team": "ads"}), ("c", None)):
                report = load(
                    registry,
                    other,
                    "a",
                    rank=0,
                    tensors={"w": torch.zeros(4)},
                    publish=Replica(name, options=PublishOptions(labels=labels)),
                )
                assert report.publication is not None
                with report.publication:
                    assert registry.instance(name).labels == (labels or {})
        assert source.record.labels == {"team": "search"}


def test_a_rank_that_starts_has_its_labels_before_and_after_it_publishes(
    registry: Registry,
) -> None:
    labels = {"team": "search"}
    seen: list[object] = []
    with InProcessEngine() as engine:
        seeded = load_or_seed(
            registry,
            engine,
            ModelIdentity("tiny"),
            lambda: {"w": torch.zeros(4)},
            instance="a",
            rank=0,
            world_size=1,
            fallback=lambda: seen.append(registry.instance("a").labels),
            publish_later=True,
            publish=PublishOptions(labels=labels),
        )
        with seeded:
            seeded.publish({"w": torch.zeros(4)})
            seen.append(registry.instance("a").labels)
    assert seen == [labels, labels]
