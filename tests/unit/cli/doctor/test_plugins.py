"""Whether engines that are installed beside us find our plugins."""

from __future__ import annotations

import pytest

from engine_cli.doctor.finding import Status
from engine_cli.doctor.plugins import ENGINES, installed, judge_plugin

VLLM, SGLANG = ENGINES


def test_an_engine_that_finds_the_plugin_is_well() -> None:
    found = judge_plugin(VLLM, "0.32.0", ["lora", "engine_registry"], {})
    assert found.status is Status.OK
    assert found.check == "vllm.plugin"
    assert found.what == "vllm 0.32.0 finds the plugin engine_registry"


def test_an_engine_that_does_not_find_it_is_one_to_look_at() -> None:
    found = judge_plugin(SGLANG, "0.5", ["lora"], {})
    assert found.status is Status.WARN
    assert "install engine-registry again in the environment of sglang" in found.mend


@pytest.mark.parametrize(
    ("allowed", "status"),
    [
        ("engine_registry", Status.OK),
        ("lora,engine_registry", Status.OK),
        ("lora", Status.WARN),
        ("", Status.WARN),
    ],
)
def test_the_list_of_plugins_that_vllm_may_use_counts(allowed: str, status: Status) -> None:
    found = judge_plugin(VLLM, "0.32.0", ["engine_registry"], {"VLLM_PLUGINS": allowed})
    assert found.status is status


def test_engines_that_are_not_installed_are_not_looked_for() -> None:
    assert installed() == []
