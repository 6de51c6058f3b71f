"""Errors of the library name its own parameters and calls; the command line puts its options and
commands in their place.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_cli.wording import _WORDS, in_options, said
from engine_loader import LoadOptions, MooncakeEngine, PublishOptions, publish
from engine_registry import RankConflict, Registry
from engine_registry.gateway.limits import Limits
from engine_registry.gateway.server import Gateway
from tests.support.checkout import ROOT

# those of etcd itself
OF_OTHER_PROGRAMS = {
    "registry/engine_registry/etcd/local.py",
    "--max-request-bytes",
}


def constants() -> Iterator[tuple[Path, int, str]]:
    """Every text of the two libraries that is no docstring."""
    for path in [*(ROOT / "registry").rglob("*.py"), *(ROOT / "loader").rglob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docs
            ):
                yield path.relative_to(ROOT), node.lineno, node.value


def test_the_library_names_no_option_and_no_command_of_the_command_line() -> None:
    texts = [
        (str(path), line, text)
        for path, line, text in constants()
        if str(path) not in OF_OTHER_PROGRAMS
    ]
    named = [
        found
        for found in texts
        if re.search(
            r"(?<![-\w])--[a-z]|\bengines (list|show|evict|gateway|load|register)\b", found[2]
        )
    ]
    assert [
        found for found in named if not any(other in found[2] for other in OF_OTHER_PROGRAMS)
    ] == []


def test_what_is_put_in_its_place_is_a_parameter_or_a_call_of_the_library() -> None:
    takers = (
        Registry.connect,
        Gateway.__init__,
        Limits,
        MooncakeEngine.__init__,
        publish,
        PublishOptions,
        LoadOptions,
    )
    parameters = {name for taker in takers for name in inspect.signature(taker).parameters}
    calls = {f"Registry.{name}" for name in vars(Registry)}
    names = {name.removesuffix("()").partition("=")[0] for name in _WORDS}
    assert names - parameters - calls == {"force", "out"}  # of the files that `engines load` writes


@pytest.mark.parametrize(
    ("text", "details", "wording"),
    [
        ("check `cacert`, `cert` and `key`", {}, "check --cacert, --cert and --key"),
        ("see `Registry.instances()`", {}, "see `engines list`"),
        (
            "end it with `Registry.evict`",
            {"instance": "a", "rank": 3},
            "end it with `engines evict a --rank 3`",
        ),
        ("end it with `Registry.evict`", {}, "end it with `engines evict`"),
        (
            'publish with `digests=True`, or load with `verify="header"`',
            {},
            "publish with digests, as `engines register` does, or load with no --verify",
        ),
        ("the tensor `w` is `x`y`", {}, "the tensor `w` is `x`y`"),
        (
            "/engines/a-1.x/0 and /engines/b/12, of /engines/c/3: gone",
            {},
            "rank 0 of instance a-1.x and rank 12 of instance b, of rank 3 of instance c: gone",
        ),
        ("the record at /engines/a/0 is damaged", {}, "the record at /engines/a/0 is damaged"),
        ("etcdctl del /engines/a/0", {}, "etcdctl del /engines/a/0"),
        ("it reads /engines/, and /engines/a/0/x", {}, "it reads /engines/, and /engines/a/0/x"),
    ],
)
def test_parameters_calls_and_keys_become_options_commands_and_ranks(
    text: str, details: dict[str, object], wording: str
) -> None:
    assert in_options(text, details) == wording


def test_an_error_is_reported_in_one_line_with_the_arguments_that_it_knows() -> None:
    error = RankConflict("rank 3 is\ntaken", "end it with `Registry.evict`", instance="a", rank=3)
    assert said(error) == "rank 3 is taken: end it with `engines evict a --rank 3`"
    assert said(OSError("no `host`")) == "no --host"
