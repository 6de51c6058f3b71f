"""Artifacts between real processes, over a real etcd: pushed by one, pulled by others, some of
which are killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine_cli.exits import Exit
from engine_loader import (
    ArtifactInvalid,
    ArtifactReport,
    Cancelled,
    DigestMismatch,
    Engine,
    LoadOptions,
    MooncakeEngine,
    PublishOptions,
    Shard,
    publish,
    publish_artifact,
    pull_artifact,
)
from engine_loader.artifacts.key import ArtifactName
from engine_loader.artifacts.packing import pack
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import EtcdUnavailable, InvalidField
from tests.integration.conftest import Processes, line_of
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

NewEngine = Callable[[], Engine]
KEY = {"torch": "2.13.0"}
FIELD = ("--field", "torch=2.13.0")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder with 41 files, of 400 kB together."""
    folder = tmp_path / "cache"
    for number in range(40):
        path = folder / f"{number % 4}" / f"kernel{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 10_000)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    return folder


@pytest.fixture
def engine() -> Iterator[MooncakeEngine]:
    with MooncakeEngine("127.0.0.1") as engine:
        yield engine


def files_of(folder: Path) -> dict[str, tuple[bytes, bool]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK))
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- the library


def test_a_folder_goes_from_memory_to_memory_and_a_second_pull_brings_nothing_new(
    registry: Registry, new_engine: NewEngine, cache: Path, tmp_path: Path
) -> None:
    ours, theirs = new_engine(), new_engine()
    with publish_artifact(registry, ours, "vllm", cache, KEY) as publication:
        first = pull_artifact(registry, theirs, "vllm", tmp_path / "out", KEY)
        second = pull_artifact(registry, theirs, "vllm", tmp_path / "out", KEY)
    assert first is not None
    assert second is not None
    assert (first.new, first.unchanged, first.kept, first.files) == (41, 0, 0, 41)
    assert (second.new, second.unchanged, second.kept) == (0, 41, 0)
    assert first.sources == (publication.record.key,)
    assert first.content == second.content == publication.content
    assert first.nbytes == publication.record.manifest.nbytes > 400_000
    assert files_of(tmp_path / "out") == files_of(cache)


def test_the_same_files_are_one_content_and_both_holders_are_read(
    registry: Registry, engine: MooncakeEngine, cache: Path, tmp_path: Path
) -> None:
    with publish_artifact(registry, engine, "a", cache, KEY) as one:
        pull_artifact(registry, engine, "a", tmp_path / "copy", KEY)
        with MooncakeEngine("127.0.0.1") as other:
            with publish_artifact(registry, other, "a", tmp_path / "copy", KEY) as two:
                assert one.content == two.content
                assert one.record.instance != two.record.instance
                one.close()
                report = pull_artifact(registry, engine, "a", tmp_path / "out", KEY)
    assert report is not None
    assert report.sources == (two.record.key,)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("other", KEY),
        ("a", {"torch": "2.12.0"}),
        ("a", {**KEY, "device": "cpu"}),
        ("a", {"triton": "2.13.0"}),
    ],
)
def test_another_name_or_key_is_no_hit(
    registry: Registry,
    engine: MooncakeEngine,
    cache: Path,
    tmp_path: Path,
    name: str,
    key: dict[str, str],
) -> None:
    with publish_artifact(registry, engine, "a", cache, KEY):
        assert pull_artifact(registry, engine, name, tmp_path / "out", key) is None
    assert not (tmp_path / "out").exists()


def test_it_is_an_instance_with_a_label_and_its_key(
    registry: Registry, engine: MooncakeEngine, cache: Path
) -> None:
    options = PublishOptions(labels={"team": "x"})
    with publish_artifact(registry, engine, "a", cache, KEY, options=options):
        (status,) = registry.instances("artifact=a,team=x")
        assert registry.instances("!artifact") == ()
        assert status.model == ArtifactName("a", KEY).model
        assert re.fullmatch(r"artifact\.a\.[0-9a-f]{8}", status.instance)


def test_bytes_that_change_after_the_push_are_not_unpacked(
    registry: Registry, engine: MooncakeEngine, cache: Path, tmp_path: Path
) -> None:
    archive = pack(cache)
    with publish(
        registry,
        engine,
        instance="x",
        rank=0,
        world_size=1,
        tensors={"archive": archive},
        shards={"archive": Shard(tuple(archive.shape), (0,))},
        model=ArtifactName("a", KEY).model,
        options=PublishOptions(digests=True),
    ):
        archive[-1] ^= 1
        with pytest.raises(DigestMismatch):
            pull_artifact(registry, engine, "a", tmp_path / "out", KEY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(100, dtype=torch.uint8), torch.zeros(100), torch.zeros((4, 4), dtype=torch.uint8)],
)
def test_what_is_no_archive_is_refused(
    registry: Registry, engine: MooncakeEngine, tmp_path: Path, tensor: torch.Tensor
) -> None:
    with publish(
        registry,
        engine,
        instance="hostile",
        rank=0,
        world_size=1,
        tensors={"archive": tensor},
        shards={"archive": Shard(tuple(tensor.shape), (0,) * tensor.dim())},
        model=ArtifactName("a", KEY).model,
        options=PublishOptions(digests=True),
    ):
        with pytest.raises(ArtifactInvalid, match=r"damaged|offers no archive"):
            pull_artifact(registry, engine, "a", tmp_path / "out", KEY)
    assert not (tmp_path / "out").exists()


def test_no_time_is_a_typed_error(
    registry: Registry, engine: MooncakeEngine, cache: Path, tmp_path: Path
) -> None:
    with publish_artifact(registry, engine, "a", cache, KEY):
        with pytest.raises(Cancelled, match=r"was not there in time, and is left out"):
            pull_artifact(registry, engine, "a", tmp_path / "out", KEY, timeout_s=0)
    assert not (tmp_path / "out").exists()


def test_an_etcd_that_is_away_is_a_typed_error(
    dead_address: str, engine: MooncakeEngine, tmp_path: Path
) -> None:
    with Registry.connect(dead_address, timeout_s=0.5, lazy=True) as registry:
        with pytest.raises(EtcdUnavailable):
            pull_artifact(registry, engine, "a", tmp_path / "out", KEY)


@pytest.mark.parametrize(
    "options",
    [
        LoadOptions(verify="header"),
        LoadOptions(partial=True),
        LoadOptions(version=1),
        LoadOptions(contents=["0" * 32]),
        LoadOptions(reuse=True),
        LoadOptions(base=["0" * 32]),
        LoadOptions(also_from="a"),
        LoadOptions(cancel=threading.Event()),
    ],
)
def test_options_that_it_cannot_honour_are_refused(
    registry: Registry, engine: MooncakeEngine, tmp_path: Path, options: LoadOptions
) -> None:
    with pytest.raises(InvalidField, match="pull_artifact does not take the option"):
        pull_artifact(registry, engine, "a", tmp_path / "out", KEY, options=options)


def test_two_that_pull_into_one_folder_at_once_leave_it_whole(
    registry: Registry, engine: MooncakeEngine, cache: Path, tmp_path: Path
) -> None:
    reports: list[ArtifactReport | None] = []

    def pull() -> None:
        reports.append(pull_artifact(registry, engine, "a", tmp_path / "out", KEY))

    with publish_artifact(registry, engine, "a", cache, KEY):
        threads = [threading.Thread(target=pull) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [report and (report.files, report.kept) for report in reports] == [(41, 0)] * 2
    assert sum(report.new for report in reports if report) == 41
    assert files_of(tmp_path / "out") == files_of(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_disk_without_room_is_one_line_and_gets_no_file(
    registry: Registry, engine: MooncakeEngine, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(out)], check=True)
    try:
        with publish_artifact(registry, engine, "a", cache, KEY):
            with pytest.raises(ArtifactInvalid, match=r"No space left on device: it takes 400010 "):
                pull_artifact(registry, engine, "a", out / "cache", KEY)
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["umount", str(out)], check=True)


# -- processes


class Artifacts:
    """`engines artifacts` in a namespace."""

    def __init__(self, processes: Processes, namespace: str) -> None:
        self._processes, self._last = processes, ("--namespace", namespace)

    def push(self, name: str, folder: Path, *args: str) -> subprocess.Popen[str]:
        command = ("artifacts", "push", name, str(folder), "--host", "127.0.0.1")
        process = self._processes.engines(*command, *args, *self._last)
        assert line_of(process).startswith(f"offers {name}@")
        return process

    def start_pull(self, name: str, folder: Path, *args: str) -> subprocess.Popen[str]:
        command = ("artifacts", "pull", name, str(folder), "--host", "127.0.0.1")
        return self._processes.engines(*command, *args, *self._last)

    def __call__(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self._processes.run("artifacts", *args, *self._last, **env)


@pytest.fixture
def artifacts(processes: Processes, namespace: str) -> Artifacts:
    return Artifacts(processes, namespace)


def test_the_commands_push_list_and_pull(artifacts: Artifacts, cache: Path, tmp_path: Path) -> None:
    pusher = artifacts.push("vllm", cache, *FIELD, "--field", "device=H200")
    digest = ArtifactName("vllm", {"torch": "2.13.0", "device": "H200"}).digest
    listed = artifacts("list")
    assert listed.stdout.splitlines() == [
        "ARTIFACT               HOLDERS  SIZE      KEY",
        f"vllm@{digest}  1        401.1 kB  device=H200,torch=2.13.0",
    ]
    (found,) = json.loads(artifacts("list", "vllm", *FIELD, "--json").stdout)["artifacts"]
    assert found["key"] == {"device": "H200", "torch": "2.13.0"}
    assert (found["name"], found["digest"], len(found["instances"])) == ("vllm", digest, 1)
    assert artifacts("list", "--field", "torch=2.12.0").stdout == "no artifact matches\n"
    pulled = artifacts(
        *("pull", "vllm", str(tmp_path / "out"), *FIELD, "--field", "device=H200", "--json")
    )
    facts = json.loads(pulled.stdout)
    assert (facts["name"], facts["digest"], facts["content"]) == ("vllm", digest, found["content"])
    assert (facts["files"], facts["new"], facts["unchanged"]) == (41, 41, 0)
    assert files_of(tmp_path / "out") == files_of(cache)
    again = artifacts("pull", "vllm", str(tmp_path / "out"), *FIELD, "--field", "device=H200")
    assert re.fullmatch(
        rf"pulled vllm@{digest}: 41 files, 401\.1 kB in \d+\.\d\d s; 0 new, 41 unchanged "
        rf"→ {tmp_path}/out\n",
        again.stdout,
    )
    pusher.send_signal(signal.SIGTERM)
    assert pusher.wait(60) == Exit.DONE
    assert artifacts("list").stdout == "no artifact is offered\n"


def test_the_fields_of_this_machine_are_the_same_on_both_sides(
    artifacts: Artifacts, cache: Path, tmp_path: Path
) -> None:
    artifacts.push("a", cache, "--here", "--field", "model=x")
    pulled = artifacts("pull", "a", str(tmp_path / "out"), "--field", "model=x", "--here")
    assert (pulled.returncode, pulled.stderr) == (Exit.DONE, "")
    (found,) = json.loads(artifacts("list", "--json", "--here").stdout)["artifacts"]
    assert {"python", "torch", "triton", "platform", "cpu", "device", "model"} <= set(found["key"])


def test_options_before_the_command_count_for_its_commands_too(
    processes: Processes, artifacts: Artifacts, namespace: str, cache: Path
) -> None:
    artifacts.push("a", cache, *FIELD)
    ran = processes.run("--namespace", namespace, "artifacts", "list", "--json")
    assert len(json.loads(ran.stdout)["artifacts"]) == 1


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (
            ("pull", "a", "out", "--field", "torch=2.12.0"),
            Exit.INSTANCE,
            r"no peer offers the artifact a@\w{16}; the nearest has another key: torch is "
            r"'2\.13\.0', not '2\.12\.0': push one with this key",
        ),
        (
            ("pull", "b", "out", *FIELD),
            Exit.INSTANCE,
            r"no peer offers the artifact b@\w{16}: look at `engines artifacts list`",
        ),
        (("pull", "a", "out"), Exit.USAGE, r"the key {} is not valid: .* of 1 to 32 fields: .*"),
        (("push", "a/b", "in", *FIELD), Exit.USAGE, r"artifact name 'a/b' is not valid: .*"),
        (("push", "a", "nothing", *FIELD), Exit.FAILED, r"cannot read nothing: No such file .*"),
        (("push", "a", "in", *FIELD, "--instance", "/"), Exit.USAGE, r"instance name '/' .*"),
        (("pull", "a", "/dev/null/x", *FIELD), Exit.FAILED, r"cannot write /dev/null/x: Not a .*"),
        (
            ("pull", "a", "out", *FIELD, "--max-time", "0.001"),
            Exit.FAILED,
            r"the artifact a@\w{16} was not there in time, and is left out: raise --max-time, or "
            r"do without it",
        ),
    ],
)
def test_a_wrong_way_is_one_line_and_an_exit_code(
    artifacts: Artifacts, cache: Path, args: tuple[str, ...], code: int, error: str
) -> None:
    artifacts.push("a", cache, *FIELD)
    ran = artifacts(*args)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert re.fullmatch(rf"engines: error: {error}\n", ran.stderr), ran.stderr


@pytest.mark.parametrize(
    ("value", "error"),
    [("torch", "'torch' is not NAME=VALUE"), ("torch=3", "torch is given with two values")],
)
def test_a_field_that_is_not_clear_is_wrong_usage(
    artifacts: Artifacts, value: str, error: str
) -> None:
    ran = artifacts("list", *FIELD, "--field", value)
    assert ran.returncode == Exit.USAGE
    assert error in ran.stderr


def test_a_pusher_that_is_killed_in_the_middle_leaves_the_folder_as_it_was(
    artifacts: Artifacts, registry: Registry, cache: Path, tmp_path: Path
) -> None:
    pusher = artifacts.push("a", cache, *FIELD)
    signal_and_wait(pusher.pid, signal.SIGSTOP)
    puller = artifacts.start_pull("a", tmp_path / "out", *FIELD)
    wait_until(lambda: registry.all_pulls() != ())
    pusher.kill()
    out, err = puller.communicate(timeout=100)
    assert (puller.returncode, out) == (Exit.INSTANCE, "")
    assert "could not be read to the end" in err
    assert not (tmp_path / "out").exists()


def test_a_puller_that_is_killed_before_the_move_leaves_nothing_that_counts(
    artifacts: Artifacts, processes: Processes, cache: Path, tmp_path: Path
) -> None:
    artifacts.push("a", cache, *FIELD)
    out = tmp_path / "out"
    puller = processes.start("-m", "tests.support.processes.artifact", "a", str(out), FIELD[1])
    assert line_of(puller) == "written\n"
    puller.kill()
    puller.wait()
    (left,) = out.iterdir()
    assert left.name.endswith(".partial")
    assert artifacts("pull", "a", str(out), *FIELD).returncode == Exit.DONE
    assert not left.exists()
    assert files_of(out) == files_of(cache)


def test_a_puller_does_not_disturb_one_that_is_still_at_work(
    artifacts: Artifacts, processes: Processes, cache: Path, tmp_path: Path
) -> None:
    artifacts.push("a", cache, *FIELD)
    out = tmp_path / "out"
    puller = processes.start("-m", "tests.support.processes.artifact", "a", str(out), FIELD[1])
    assert line_of(puller) == "written\n"
    assert artifacts("pull", "a", str(out), *FIELD).returncode == Exit.DONE
    assert puller.stdin is not None
    puller.stdin.write("\n")
    puller.stdin.flush()
    facts = json.loads(line_of(puller))
    assert (facts["new"], facts["unchanged"], facts["kept"]) == (0, 41, 0)
    assert files_of(out) == files_of(cache)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_torch_has_compiled_in_one_process_is_found_by_another(
    artifacts: Artifacts, processes: Processes, tmp_path: Path
) -> None:
    def compiled(name: str) -> list[int]:
        """Found in the cache of this name, and missed."""
        folder = str(tmp_path / name)
        program = ("-m", "tests.support.processes.compiled", folder)
        process = processes.start_anew(*program, TMPDIR=str(tmp_path))  # torch writes there, too
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        counted: list[int] = json.loads(out)
        return counted

    assert compiled("first") == [0, 1]
    artifacts.push("torch", tmp_path / "first", "--here")
    assert artifacts("pull", "torch", str(tmp_path / "second"), "--here").returncode == Exit.DONE
    assert compiled("second") == [1, 0]


def test_artifacts_stand_in_lists_with_a_mark_and_can_be_left_out(
    artifacts: Artifacts, processes: Processes, namespace: str, cache: Path
) -> None:
    artifacts.push("a", cache, *FIELD)
    where = ("--namespace", namespace)
    assert f"artifact/{ArtifactName('a', KEY)}" in processes.run("list", *where).stdout
    hidden = processes.run("list", "--label", "!artifact", *where)
    assert hidden.stdout == "no instance matches (registered: 1)\n"


def test_a_model_of_that_name_is_no_artifact(
    registry: Registry, engine: MooncakeEngine, artifacts: Artifacts
) -> None:
    with publish(
        registry,
        engine,
        instance="x",
        rank=0,
        world_size=1,
        tensors={"w": torch.zeros(4)},
        model=ModelIdentity("artifact/a"),
        options=PublishOptions(labels={"artifact": "a"}),
    ):
        assert artifacts("list").stdout == "no artifact matches\n"
