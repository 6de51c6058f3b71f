"""The private loader of SGLang: which loader reads, what is published, and when nothing is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.tensors.deferred import Deferred
from engine_registry.errors import InvalidField
from tests.support.sglang import HookRegistry, LoadConfig, LoadFormat, Process

CONFIG = SimpleNamespace(
    model_path="/models/llama",
    revision=None,
    dtype=torch.float32,
    quantization=None,
    is_draft_model=False,
)
DEVICE = SimpleNamespace(device="cpu")
HELD = SimpleNamespace(name="held", nbytes=1000)
Tensors = Mapping[str, torch.Tensor]


class Start:
    """In the place of `ModelStart`: with or without peers."""

    made: list[Start]
    has_peers = False

    def __init__(self, config: object, identity: Any, seat: Any) -> None:
        self.identity = identity
        self.seat = seat
        self.serves = True
        self.given_up: list[str] = []
        self.published: dict[str, torch.Tensor] = {}
        self.done: list[str] = []
        self.copied_version = 0
        self.made.append(self)

    def fill(
        self,
        tensors: Tensors,
        read: Callable[[], object],
        *,
        module: nn.Module | None,
        deferred: Deferred | None,
    ) -> None:
        self.module, self.deferred = module, deferred
        if self.has_peers:
            for tensor in tensors.values():
                tensor.data.fill_(5.0)
            self.copied_version = 1
        else:
            read()

    def give_up(self, why: str, _: str) -> None:
        self.given_up.append(why)
        self.serves = False

    def publish(self, _: nn.Module, tensors: Tensors, *, extra_nbytes: int) -> None:
        self.extra_nbytes = extra_nbytes
        self.published = {name: tensor.clone() for name, tensor in tensors.items()}

    def pause(self) -> None:
        self.done.append("pause")

    def replace(self, _: Tensors) -> None:
        self.done.append("replace")

    def close(self) -> None:
        self.done.append("close")


class Loaded:
    """What came of a start of SGLang."""

    def __init__(self, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = importlib.import_module("engine_loader.integrations.sglang.loader")
        self.updates: Any = importlib.import_module("engine_loader.integrations.sglang.updates")
        self.process = process
        Start.made = []
        monkeypatch.setattr(self.module, "ModelStart", Start)
        self.updates.hook_updates()
        HookRegistry.apply_hooks()

    def start(self, **config: Any) -> tuple[nn.Module, Start]:
        loader = self.module.PeerModelLoader(LoadConfig())
        model = loader.load_model(
            model_config=SimpleNamespace(**{**vars(CONFIG), **config}), device_config=DEVICE
        )
        return model, Start.made[-1]


@pytest.fixture
def loaded(sglang: Process, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setattr(Start, "has_peers", False)
    return Loaded(sglang, monkeypatch)


def test_without_peers_the_loader_of_sglang_reads_and_the_result_is_published(
    loaded: Loaded,
) -> None:
    model, start = loaded.start()
    assert loaded.process.calls == ["read auto {}", "post-process"]
    assert start.published.keys() == {"weight", "bias"}
    assert bool((start.published["weight"] == 3.0).all())
    assert (start.given_up, start.extra_nbytes, model.training) == ([], 0, False)


def test_with_peers_nothing_is_read_and_the_weights_are_post_processed_here(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Start, "has_peers", True)
    model, _ = loaded.start()
    assert loaded.process.calls == ["post-process"]
    assert bool((next(model.parameters()) == 5.0).all())


def test_peers_get_the_loaded_weights_where_post_processing_replaces_them(loaded: Loaded) -> None:
    def replaces(model: Any) -> None:
        model.weight = nn.Parameter(model.weight.data.t().contiguous(), requires_grad=False)

    loaded.process.post_process = replaces
    model, start = loaded.start()
    assert start.published["weight"].shape == (2, 4)
    assert start.extra_nbytes == 4 * 8
    loaded.updates._CHANGES[model].step(lambda: (True, ""))
    assert start.done == ["pause", "close"]


def test_weights_that_keep_their_memory_are_served_again_after_an_update(loaded: Loaded) -> None:
    model, start = loaded.start()
    loaded.updates._CHANGES[model].step(lambda: (True, ""))
    assert start.done == ["pause", "replace"]


def test_peers_get_nothing_where_post_processing_writes_into_loaded_tensors(
    loaded: Loaded,
) -> None:
    def scales(model: Any) -> None:
        model.weight.data.mul_(2)

    loaded.process.post_process = scales
    model, start = loaded.start()
    (why,) = start.given_up
    assert "has written to 1 loaded tensors, such as weight" in why
    assert model not in loaded.updates._CHANGES


def test_peers_get_nothing_where_sglang_moves_its_experts(loaded: Loaded) -> None:
    loaded.process.exec.moe.enable_eplb = True
    _, start = loaded.start()
    assert "EPLB" in start.given_up[0]


def test_peers_get_nothing_from_a_release_whose_updates_cannot_be_followed(loaded: Loaded) -> None:
    HookRegistry._patched.clear()
    _, start = loaded.start()
    assert "changes its weights in ways that are not known here" in start.given_up[0]


def test_all_ranks_of_a_launch_have_the_name_that_the_first_has_chosen(loaded: Loaded) -> None:
    loaded.process.parallel.world_group.rank_in_group = 1
    loaded.process.parallel.world_group.said = "0123456789abcdef" * 2
    _, start = loaded.start()
    assert (start.seat.instance, start.seat.generation) == (
        "sglang-01234567",
        "0123456789abcdef" * 2,
    )


def test_ranks_that_have_copied_different_versions_all_read_the_disk(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.module, "gathered", lambda _, mine: [0, mine])
    monkeypatch.setattr(Start, "has_peers", True)
    model, start = loaded.start()
    assert "different versions (0, 1), so all of them come from its disk" in start.given_up[0]
    assert loaded.process.calls == ["post-process", "restore", "read auto {}", "post-process"]
    assert bool((next(model.parameters()) == 3.0).all())
    monkeypatch.setattr(Start, "has_peers", False)
    monkeypatch.setattr(loaded.module, "gathered", lambda _, mine: [1, mine])
    loaded.process.calls.clear()
    _, start = loaded.start()
    assert len(start.given_up) == 1
    assert loaded.process.calls == ["read auto {}", "post-process"]


def test_a_draft_model_is_an_instance_for_itself(loaded: Loaded) -> None:
    _, start = loaded.start(is_draft_model=True)
    assert start.seat.instance.startswith("sglang.draft-")


@pytest.mark.parametrize(
    "other",
    [
        {"model_path": "/models/other"},
        {"revision": "b"},
        {"dtype": torch.bfloat16},
        {"quantization": "fp8"},
    ],
)
def test_models_that_differ_are_no_peers(loaded: Loaded, other: dict[str, Any]) -> None:
    _, one = loaded.start()
    _, same = loaded.start()
    _, two = loaded.start(**other)
    assert one.identity == same.identity != two.identity


@pytest.mark.parametrize(
    "change",
    [
        lambda process: setattr(process.parallel, "enable_dp_lm_head", True),
        lambda process: setattr(process.exec.moe, "ep_num_redundant_experts", 2),
        lambda process: setattr(process.parallel, "moe_dense_tp_size", 1),
    ],
)
def test_layouts_that_differ_are_no_peers(
    loaded: Loaded, change: Callable[[Process], None]
) -> None:
    _, one = loaded.start()
    change(loaded.process)
    _, two = loaded.start()
    assert one.identity != two.identity


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"etdc": "a"}, "unknown key: etdc"),
        ({"artifacts": True}, "SGLang's compile caches are not copied by its loader"),
        ({"stage": "processed"}, "SGLang serves the memory that its loader fills"),
        ({"fallback_format": "gguf"}, "is not one that SGLang's default loader reads"),
    ],
)
def test_settings_that_are_not_valid_are_refused(
    loaded: Loaded, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidField, match=said):
        loaded.module.PeerModelLoader(LoadConfig(model_loader_extra_config=settings))


def test_the_own_loader_reads_the_format_that_the_settings_name(loaded: Loaded) -> None:
    loader = loaded.module.PeerModelLoader(
        LoadConfig(model_loader_extra_config={"fallback_format": "safetensors"})
    )
    assert loader.load_config.load_format is LoadFormat.SAFETENSORS
    assert loader.load_config.model_loader_extra_config == {}


def test_weights_that_sglang_gives_back_while_it_is_released_are_not_held(loaded: Loaded) -> None:
    loaded.process.exec.features.enable_memory_saver = True
    loader = loaded.module.PeerModelLoader(LoadConfig(model_loader_extra_config={"hold_s": 300}))
    with pytest.raises(InvalidField, match="leave out one of `hold_s` and enable_memory_saver"):
        loader.load_model(model_config=CONFIG, device_config=DEVICE)


def test_weights_that_sglang_gives_back_while_it_is_released_lie_where_it_puts_them(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.process.exec.features.enable_memory_saver = True
    monkeypatch.setattr("engine_loader.integrations.room.held_on", lambda _: [HELD])
    monkeypatch.setattr("engine_loader.integrations.room.available_nbytes", lambda _: 0)
    _, start = loaded.start()
    assert (start.module, start.deferred) == (None, None)


def test_a_model_without_room_for_more_than_what_is_held_is_made_without_memory(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_loader.integrations.room.held_on", lambda _: [HELD])
    monkeypatch.setattr("engine_loader.integrations.room.available_nbytes", lambda _: 999)
    model, start = loaded.start()
    assert start.module is model
    assert start.deferred is not None
    monkeypatch.setattr("engine_loader.integrations.room.available_nbytes", lambda _: 1000)
    assert loaded.start()[1].deferred is None


def test_sglang_counts_memory_that_was_held_before_it_looked_at_what_is_free(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([[HELD, SimpleNamespace(name="other", nbytes=7)], [HELD]])
    monkeypatch.setattr(loaded.module, "held_on", lambda _: next(held))
    loader = loaded.module.PeerModelLoader(LoadConfig())
    loader.load_model(model_config=CONFIG, device_config=DEVICE)
    assert loader.preloaded_weights_bytes == 7
