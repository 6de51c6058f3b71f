"""Instances compared by the digests that they publish, with each other and with files."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_cli.exits import Exit
from engine_loader import (
    Aspect,
    InProcessEngine,
    Obstacle,
    Publication,
    Replica,
    Shard,
    compare,
    load,
    publish,
)
from engine_loader.comparing import published
from engine_loader.comparing.compare import same_content
from engine_loader.errors import SourceLost, TornRead
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound, InvalidField
from tests.integration.conftest import Processes, line_of
from tests.support.engines import Interrupted
from tests.support.options import for_publish

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def reader(stack: ExitStack) -> InProcessEngine:
    return stack.enter_context(InProcessEngine())


def offer(
    stack: ExitStack, registry: Registry, instance: str, tensors: Tensors, **fields: object
) -> Publication:
    defaults = {"rank": 0, "world_size": 1, "model": ModelIdentity("m"), "digests": True}
    if "engine" not in fields:
        fields["engine"] = stack.enter_context(InProcessEngine())
    options = for_publish({**defaults, **fields})
    return stack.enter_context(publish(registry, instance=instance, tensors=tensors, **options))


def weights() -> Tensors:
    torch.manual_seed(7)
    return {"w": torch.rand(8, 4), "norm": torch.rand(4)}


def test_instances_are_the_same_until_one_is_updated(
    stack: ExitStack, registry: Registry, reader: InProcessEngine
) -> None:
    ours, theirs = weights(), weights()
    offer(stack, registry, "a", ours)
    publication = offer(stack, registry, "b", theirs)
    assert compare(registry, reader, ["a", "b"]).same
    assert same_content(registry, registry.resolve("a")) == ["b"]
    with publication.update():
        theirs["norm"] += 1
        with pytest.raises(InstanceIncomplete, match="updating"):
            compare(registry, reader, ["a", "b"])
    (difference,) = compare(registry, reader, ["a", "b"]).differences
    assert (difference.tensor, difference.aspect) == ("norm", Aspect.BYTES)
    assert difference.values.keys() == {"a/0", "b/0"}
    assert same_content(registry, registry.resolve("a")) == []


def test_a_replica_is_proven_by_the_digests_of_its_own_memory(
    stack: ExitStack, registry: Registry, reader: InProcessEngine
) -> None:
    offer(stack, registry, "a", weights())
    tensors = {name: torch.zeros_like(one) for name, one in weights().items()}
    replica = Replica("b", options=for_publish({"digests": True})["options"])
    report = load(registry, reader, "a", rank=0, tensors=tensors, publish=replica)
    assert report.publication is not None
    publication = stack.enter_context(report.publication)
    other = stack.enter_context(InProcessEngine())
    assert compare(registry, other, ["a", "b"]).same
    with publication.update():
        pass
    assert compare(registry, other, ["a", "b"]).same


def test_shards_are_compared_with_whole_tensors_in_files(
    stack: ExitStack, registry: Registry, reader: InProcessEngine, tmp_path: Path
) -> None:
    """Also those that lie in memory in another order than in the file."""
    whole = {**weights(), "t": torch.rand(6, 4)}
    save_file(whole, tmp_path / "model.safetensors")
    halves = (slice(0, 4), slice(4, 8))
    for rank, rows in enumerate(halves):
        held = {
            "w": whole["w"][rows].clone(),
            "norm": whole["norm"].clone(),
            "t": whole["t"].t().contiguous().t(),
        }
        shards = {
            "w": Shard((8, 4), (4 * rank, 0)),
            "norm": Shard((4,), (0,)),
            "t": Shard((6, 4), (0, 0)),
        }
        offer(stack, registry, "a", held, rank=rank, world_size=2, shards=shards)
    found = compare(registry, reader, "a", files=tmp_path)
    assert (found.same, found.compared) == (True, 3)
    changed = {**whole, "w": whole["w"].clone(), "more": torch.zeros(1)}
    changed["w"][5] += 1
    del changed["norm"]
    save_file(changed, tmp_path / "model.safetensors")
    more, norm, w = compare(registry, reader, "a", files=tmp_path).differences
    assert [one.aspect for one in (more, norm, w)] == [Aspect.NAME, Aspect.NAME, Aspect.BYTES]
    assert w.values.keys() == {"a/1", f"{tmp_path} as rank 1"}


def test_instances_without_digests_prove_nothing(
    stack: ExitStack, registry: Registry, reader: InProcessEngine, tmp_path: Path
) -> None:
    offer(stack, registry, "a", weights(), digests=False)
    save_file(weights(), tmp_path / "model.safetensors")
    found = compare(registry, reader, "a", files=tmp_path)
    assert set(found.unproven.values()) == {Obstacle.NO_DIGESTS}
    assert found.without_digests == ("a/0",)


def test_weights_that_change_while_their_digests_are_read_are_not_compared(
    stack: ExitStack, registry: Registry
) -> None:
    tensors = weights()
    publication = offer(stack, registry, "a", tensors)

    def update() -> None:
        with publication.update():
            tensors["w"] += 1

    reader = stack.enter_context(Interrupted(update))
    with pytest.raises(TornRead, match="/engines/a/0 changed while their digests were read"):
        compare(registry, reader, "a")


def test_a_rank_that_goes_away_or_is_silent_ends_the_comparison(
    stack: ExitStack,
    registry: Registry,
    reader: InProcessEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published, "_SILENT_S", 0.2)
    engine = stack.enter_context(InProcessEngine())
    publication = offer(stack, registry, "a", weights(), engine=engine)
    records = registry.resolve("a")
    engine.pause()
    with pytest.raises(SourceLost, match="the digests of /engines/a/0 cannot be read"):
        published.read_holding(registry, reader, records)
    engine.resume()
    manifest = registry.manifest(records[0])
    publication.close()
    monkeypatch.setattr(published, "fetch_manifests", lambda registry, records: [manifest])
    with pytest.raises(SourceLost):
        published.read_holding(registry, reader, records)


def test_wrong_names_are_refused_and_missing_ones_reported(
    registry: Registry, reader: InProcessEngine
) -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(InvalidField, match="name each instance once"):
            compare(registry, reader, names)
    with pytest.raises(InstanceNotFound):
        compare(registry, reader, ["a", "b"])


def test_commands_say_what_differs_and_end_with_its_code(
    stack: ExitStack, processes: Processes, namespace: str, tmp_path: Path
) -> None:
    one, other = weights(), weights()
    other["norm"] += 1
    for name, tensors in (("a", one), ("b", one), ("c", other)):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        arguments = ["--rank", "0", "--world-size", "1", "--weights", str(path)]
        process = processes.engines(
            "register", name, *arguments, "--host", "127.0.0.1", "--namespace", namespace
        )
        assert line_of(process).startswith(f"registered {name}/0")

    def run(*args: str) -> tuple[int, str, str]:
        ran = processes.run(*args, "--host", "127.0.0.1", "--namespace", namespace)
        return ran.returncode, ran.stdout, ran.stderr

    assert run("verify", "a") == (Exit.DONE, "the same: 2 tensors in a and b\n", "")
    code, out, _ = run("verify", "a", "--against", str(tmp_path / "c.safetensors"))
    assert (code, out.splitlines()[-1].split(":")[0]) == (Exit.WEIGHTS, "different")
    assert out.startswith("norm: bytes ")
    code, out, err = run("diff", "a", "c")
    assert (code, err) == (Exit.WEIGHTS, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["DIFFERS", "TENSOR"],
        ["bytes", "norm"],
        ["different:", "1"],
    ]
    code, out, _ = run("diff", "a", "b", "--json")
    assert (code, json.loads(out)["same"]) == (Exit.DONE, True)
    code, _, err = run("verify", "c")
    assert (code, "nothing to compare" in err, "--against" in err) == (Exit.USAGE, True, True)
    code, _, err = run("diff", "a", "bb")
    assert (code, "did you mean b?" in err) == (Exit.INSTANCE, True)
