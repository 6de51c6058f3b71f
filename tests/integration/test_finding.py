"""How the command line helps to find what is meant: mistyped names, and what a load waits for."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from engine_cli.exits import Exit
from engine_registry import ModelIdentity, Registry
from tests.integration.conftest import Processes, line_of
from tests.support.ranks import register


def test_a_load_says_at_once_what_it_waits_for_and_which_names_are_near(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    with register(registry, "qwen-a"):
        load = processes.engines(
            "load", "qwen-b", "--rank", "0", "--wait", "600", "--namespace", namespace
        )
        assert load.stderr is not None
        assert load.stderr.readline() == (
            "engines: waiting up to 600 s: instance 'qwen-b' is not registered "
            "(did you mean qwen-a?)\n"
        )
        load.send_signal(signal.SIGINT)
        assert load.wait(60) == Exit.INTERRUPTED


def test_a_load_says_which_ranks_it_waits_for_also_in_json(
    processes: Processes, registry: Registry, namespace: str, tmp_path: Path
) -> None:
    with register(registry, "a", world_size=3):
        load = processes.engines(
            "load", "a", "--full", "--wait", "600", "--log-json", "--namespace", namespace
        )
        assert load.stderr is not None
        line = json.loads(load.stderr.readline())
        assert "missing ranks 1-2 of 3" in line["message"]
        assert (line["fields"]["event"], line["fields"]["timeout_s"]) == ("load_waits", 600)
        load.send_signal(signal.SIGINT)
        assert load.wait(60) == Exit.INTERRUPTED


@pytest.mark.parametrize(
    "args",
    [
        ("show", "qwen"),
        ("show", "qwen", "--rank", "0"),
        ("wait", "qwen", "--wait", "0"),
        ("verify", "qwen"),
        ("verify", "llama", "qwen"),
        ("diff", "qwen", "llama"),
        ("diff", "llama", "qwen"),
        ("evict", "qwen"),
        ("evict", "qwen", "--rank", "0"),
        ("load", "qwen", "--rank", "0", "--wait", "0"),
        ("load", "qwen", "--full", "--wait", "0"),
        ("load", "qwen", "--serve", "copy", "--rank", "0", "--wait", "0"),
    ],
    ids=" ".join,
)
def test_an_instance_that_is_not_there_is_named_with_those_that_are_like_it(
    processes: Processes, registry: Registry, namespace: str, args: tuple[str, ...]
) -> None:
    with register(registry, "qwen-a"), register(registry, "qwen-b"), register(registry, "llama"):
        done = processes.run(*args, "--namespace", namespace)
    assert (done.returncode, done.stdout, done.stderr) == (
        Exit.INSTANCE,
        "",
        "engines: error: instance 'qwen' is not registered: did you mean qwen-b or qwen-a?\n",
    )


@pytest.mark.parametrize("command", [("wait", "qwen"), ("load", "qwen", "--rank", "0")])
def test_a_wait_in_vain_ends_with_the_names_that_it_began_with(
    processes: Processes, registry: Registry, namespace: str, command: tuple[str, ...]
) -> None:
    with register(registry, "qwen-a"):
        done = processes.run(*command, "--wait", "1", "--namespace", namespace)
    assert (done.returncode, done.stderr) == (
        Exit.INSTANCE,
        "engines: waiting up to 1 s: instance 'qwen' is not registered (did you mean qwen-a?)\n"
        "engines: error: instance 'qwen' is not registered after 1 s: did you mean qwen-a?\n",
    )


def test_a_watch_of_an_instance_that_is_not_there_says_so_and_waits_for_it(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    with register(registry, "qwen-a"):
        watch = processes.engines("watch", "qwen", "--namespace", namespace)
        assert watch.stderr is not None
        assert watch.stderr.readline() == (
            "engines: instance 'qwen' is not registered now (did you mean qwen-a?)\n"
        )
        with register(registry, "qwen"):
            assert "qwen/0 joined: ready" in line_of(watch)


def test_the_doctor_names_instances_that_are_like_the_one_that_is_not_there(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    with register(registry, "qwen-a"):
        done = processes.run("doctor", "--peer", "qwen", "--json", "--namespace", namespace)
    (finding,) = (
        each for each in json.loads(done.stdout)["checks"] if each["check"] == "peer.registered"
    )
    assert (done.returncode, finding["mend"]) == (Exit.FAILED, "did you mean qwen-a?")


def test_a_command_that_does_not_exist_is_named_with_those_that_are_like_it(
    processes: Processes,
) -> None:
    near, far = processes.run("lst"), processes.run("frobnicate")
    assert (near.returncode, far.returncode) == (Exit.USAGE, Exit.USAGE)
    assert "there is no command 'lst': did you mean list?" in near.stderr
    assert "there is no command 'frobnicate': commands are register, list, show," in far.stderr


def test_a_wait_ends_when_the_last_rank_has_come(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    with register(registry, "a", 0, world_size=2):
        wait = processes.engines("wait", "a", "--wait", "100", "--namespace", namespace)
        assert wait.stderr is not None
        assert "waiting up to 100 s: " in (line := wait.stderr.readline())
        assert "missing rank 1 of 2" in line
        with register(registry, "a", 1, world_size=2):
            out, err = wait.communicate(timeout=60)
    assert (wait.returncode, err) == (Exit.DONE, "")
    assert out.startswith("a ready: 2 ranks, ")


def test_a_wait_that_is_in_vain_says_why_and_has_an_exit_code(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    def wait(*args: str) -> tuple[int, str]:
        done = processes.run("wait", "a", "--wait", "0.1", "--namespace", namespace, *args)
        return done.returncode, done.stderr

    code, said = wait()
    assert (code, "'a' is not registered after 0.1 s" in said) == (Exit.INSTANCE, True)
    with register(registry, "a", 0, world_size=2):
        code, said = wait()
        assert (code, "missing rank 1 of 2" in said) == (Exit.INSTANCE, True)
        code, said = wait("--for", "gone")
        assert (code, "'a' is not gone after 0.1 s: it still has 1 rank" in said) == (
            Exit.FAILED,
            True,
        )


def test_a_wait_for_the_end_of_an_instance_sees_its_last_rank_go(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    options = ("--for", "gone", "--namespace", namespace)
    assert processes.run("wait", "a", *options).stdout == "a gone\n"
    with register(registry, "a"):
        wait = processes.engines("wait", "a", "--wait", "100", "--json", *options)
    out, _ = wait.communicate(timeout=60)
    assert (wait.returncode, json.loads(out)["state"]) == (Exit.DONE, "gone")


def test_instances_are_listed_by_model_and_state_in_the_order_that_is_asked_for(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    def names(*args: str) -> list[str]:
        done = processes.run("list", "--namespace", namespace, "--json", *args)
        return [one["instance"] for one in json.loads(done.stdout)["instances"]]

    with (
        register(registry, "a", model=ModelIdentity("qwen", "r1"), version=1),
        register(registry, "b", model=ModelIdentity("qwen", "r2"), world_size=2),
        register(registry, "c", model=ModelIdentity("llama"), version=3),
    ):
        assert names() == ["a", "b", "c"]
        assert names("--model", "qwen") == ["a", "b"]
        assert names("--model", "qwen@r2") == ["b"]
        assert names("--state", "degraded") == ["b"]
        assert names("--state", "ready", "--sort", "model") == ["c", "a"]
        assert names("--sort", "version") == ["b", "a", "c"]
        none = processes.run("list", "--model", "nosuch", "--namespace", namespace)
    assert none.stdout == "no instance matches (registered: 3)\n"


def test_a_shell_completes_commands_options_instances_models_and_contexts(
    processes: Processes, registry: Registry, namespace: str, tmp_path: Path
) -> None:
    def completed(line: str, **env: str) -> list[str]:
        place = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        done = processes.run(_ENGINES_COMPLETE="bash_complete", **place, **env)
        assert done.stderr == ""
        return [each.partition(",")[2] for each in done.stdout.split()]

    config = tmp_path / "config.toml"
    config.write_text("[contexts.prod]\n[contexts.test]\n")
    assert completed("engines list --context p", ENGINES_CONFIG=str(config)) == ["prod"]
    with register(registry, "qwen-a"), register(registry, "llama"):
        assert completed("engines sh") == ["show"]
        assert "--tensors" in completed("engines show --t")
        assert completed("engines list --w") == ["--watch"]
        for command in ("show", "wait", "watch", "verify", "diff", "evict", "doctor --peer"):
            name, _, option = command.partition(" ")
            line = f"engines {name} --namespace {namespace} {option}".rstrip()
            assert completed(f"{line} q") == ["qwen-a"]
        assert completed(f"engines --namespace {namespace} load ") == ["llama", "qwen-a"]
        model = str(registry.instance("llama").model)
        assert completed(f"engines list --namespace {namespace} --model ") == [model]
        assert completed("engines show --etcd 127.0.0.1:1 q") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_what_makes_it_complete(processes: Processes, shell: str) -> None:
    script = processes.run("completion", shell).stdout
    assert "_ENGINES_COMPLETE" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)
