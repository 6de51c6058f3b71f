"""`load_module`: modules built from a config are filled, with memory or without, and stay what they
were where that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine_cli.demo.checkpoint import find_checkpoint
from engine_loader import (
    InProcessEngine,
    LoadOptions,
    Publication,
    Shard,
    load,
    load_module,
    publish,
    publish_state_dict,
)
from engine_loader.errors import SourceLost, TensorsUnusable, WeightsMismatch
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InstanceNotFound
from tests.support.bert import Bert, Config, MaskedLanguageModel
from tests.support.engines import Interrupted
from tests.support.options import for_publish

TINY = Config(vocabulary=60, positions=16, hidden=24, heads=4, inner=40, layers=2)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def offer(stack: ExitStack, registry: Registry) -> Callable[..., Publication]:
    """As a rank that says of its tensors that they are the whole, or with `stated=False` says
    nothing of them.
    """

    def offer(
        tensors: Mapping[str, torch.Tensor], *, stated: bool = True, **options: Any
    ) -> Publication:
        engine = stack.enter_context(InProcessEngine())
        defaults: dict[str, Any] = {
            "instance": "a",
            "rank": 0,
            "world_size": 1,
            "model": ModelIdentity("m"),
            "ttl_s": 3.0,
        }
        options = for_publish({**defaults, **options})
        if stated:
            return stack.enter_context(publish_state_dict(registry, engine, tensors, **options))
        return stack.enter_context(publish(registry, engine, tensors=tensors, **options))

    return offer


def served(seed: int = 1) -> MaskedLanguageModel:
    torch.manual_seed(seed)
    model = MaskedLanguageModel(TINY)
    model.steps.fill_(7)
    return model.eval()


def without_memory(config: Config = TINY) -> MaskedLanguageModel:
    """But for the positions, which no checkpoint has."""
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    model.bert.embeddings.position_ids = torch.arange(config.positions)
    return model.eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("stated", [True, False], ids=["whole", "no box stated"])
def test_a_module_with_memory_is_filled_in_place(
    registry: Registry, offer: Callable[..., Publication], stated: bool
) -> None:
    source, model = served(), served(2)
    offer(source.state_dict(), stated=stated)
    before = dict(model.named_parameters())
    report = load_module(registry, InProcessEngine(), "a", model)
    assert_same(model, source)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert (report.instance, report.tensors) == ("a", len(source.state_dict()))


@pytest.mark.parametrize("stated", [True, False], ids=["whole", "no box stated"])
def test_a_module_on_the_meta_device_gets_memory_and_keeps_its_ties(
    registry: Registry, offer: Callable[..., Publication], stated: bool
) -> None:
    source, model = served(), without_memory()
    model.decoder.bias.requires_grad_(False)
    model.decoder.bias.layout_of_the_engine = "blocked"  # type: ignore[attr-defined]
    offer(source.state_dict(), stated=stated)
    report = load_module(registry, InProcessEngine(), "a", model)
    assert_same(model, source)
    assert report.nbytes == sum(tensor.nbytes for tensor in [*source.parameters(), source.steps])
    assert model.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert isinstance(model.decoder.weight, nn.Parameter)
    assert (model.decoder.weight.requires_grad, model.decoder.bias.requires_grad) == (True, False)
    assert model.decoder.bias.layout_of_the_engine == "blocked"  # type: ignore[attr-defined]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("stated", [True, False], ids=["whole", "no box stated"])
@pytest.mark.parametrize(
    "make", [served, without_memory], ids=["with memory", "on the meta device"]
)
def test_a_source_may_lack_all_names_but_one_of_tied_weights(
    registry: Registry,
    offer: Callable[..., Publication],
    stated: bool,
    make: Callable[[], MaskedLanguageModel],
) -> None:
    source, model = served(), make()
    tensors = {**dict(source.named_parameters()), "steps": source.steps}
    assert len(tensors) < len(source.state_dict())
    offer(tensors, stated=stated, digests=True)
    load_module(registry, InProcessEngine(), "a", model, options=LoadOptions(verify="digest"))
    assert_same(model, source)


def test_a_source_may_have_more_names_of_tied_weights_than_are_wanted(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    source, model = served(), served(2)
    offer(source.state_dict(), stated=False, digests=True)
    wanted = {**dict(model.named_parameters()), "steps": model.steps}
    load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors=wanted,
        options=LoadOptions(verify="digest"),
    )
    assert_same(model, source)


def test_a_real_checkpoint_that_two_pipeline_stages_serve_fills_a_model_built_from_its_config(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    checkpoint = load_file(find_checkpoint())
    early = {
        name
        for name in checkpoint
        if name.startswith("embeddings") or ".layer.0." in name or ".layer.1." in name
    }
    for rank, names in enumerate((early, checkpoint.keys() - early)):
        offer({name: checkpoint[name] for name in names}, rank=rank, world_size=2)
    with torch.device("meta"):
        model = Bert(Config())
    model.embeddings.position_ids = torch.arange(512)
    load_module(registry, InProcessEngine(), "a", model)
    wanted = Bert(Config())
    wanted.load_state_dict(
        {name: tensor for name, tensor in checkpoint.items() if not name.endswith("position_ids")}
    )
    ids = torch.tensor([[101, 7592, 2088, 102]])
    assert torch.equal(model(ids), wanted(ids))


def test_a_parameter_with_two_names_in_one_module_stays_one(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    source, model = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    for each in (source, model):
        each.again = each.weight
    offer(source.state_dict())
    with torch.device("meta"):
        load_module(registry, InProcessEngine(), "a", model, device="cpu")
    assert model.again is model.weight
    assert torch.equal(model.weight, source.weight)


def test_a_recurrent_module_sees_the_weights_that_it_got(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    """It keeps a second list of them."""
    torch.manual_seed(0)
    source = nn.LSTM(3, 4, num_layers=2)
    with torch.device("meta"):
        model = nn.LSTM(3, 4, num_layers=2)
    offer(source.state_dict())
    load_module(registry, InProcessEngine(), "a", model)
    steps = torch.rand(5, 1, 3)
    assert torch.equal(model(steps)[0], source(steps)[0])


def test_a_part_of_the_model_is_filled_from_a_rank_that_has_more(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    source = served()
    offer({name.removeprefix("bert."): tensor for name, tensor in source.state_dict().items()})
    with torch.device("meta"):
        model = Bert(TINY)
    model.embeddings.position_ids = torch.arange(TINY.positions)
    load_module(registry, InProcessEngine(), "a", model)
    assert torch.equal(model(IDS), source.bert(IDS))


def test_shards_say_which_part_a_plain_parameter_is(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    source, model = nn.Linear(6, 8), nn.Linear(6, 4)
    offer(source.state_dict())
    load_module(
        registry,
        InProcessEngine(),
        "a",
        model,
        shards={"weight": Shard((8, 6), (4, 0)), "bias": Shard((8,), (4,))},
        options=LoadOptions(verify="header"),
    )
    assert torch.equal(model.weight, source.weight[4:])
    assert torch.equal(model.bias, source.bias[4:])


# -- ranks without boxes
# --------------------------------------------------------------------------------------------------


def test_a_rank_that_says_nothing_of_its_tensors_fills_the_same_rank(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    sources = [nn.Linear(3, 2), nn.Linear(3, 2)]
    for rank, source in enumerate(sources):
        offer(source.state_dict(), stated=False, rank=rank, world_size=2)
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(
        WeightsMismatch,
        match=r"2 tensors of a do not say which part .* not a job of 2 ranks .*: say `rank`",
    ):
        load_module(registry, InProcessEngine(), "a", model)
    assert model.weight.is_meta
    load_module(registry, InProcessEngine(), "a", model, rank=1)
    assert torch.equal(model.weight, sources[1].weight)


# -- what fails
# --------------------------------------------------------------------------------------------------


def test_a_buffer_that_no_state_dict_has_is_asked_for_and_nothing_is_changed(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer(served().state_dict())
    with torch.device("meta"):
        model = MaskedLanguageModel(TINY)
    with pytest.raises(
        TensorsUnusable,
        match=r"1 tensors .* no source has them: bert\.embeddings\.position_ids: give them ",
    ):
        load_module(registry, InProcessEngine(), "a", model)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_buffer_that_no_state_dict_has_is_left_as_it_is(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    model = without_memory()
    positions = model.bert.embeddings.position_ids
    offer(served().state_dict())
    load_module(registry, InProcessEngine(), "a", model)
    assert model.bert.embeddings.position_ids is positions
    assert torch.equal(positions, torch.arange(TINY.positions))


def double_bias(
    _module: nn.Module, state: dict[str, torch.Tensor], _prefix: str, _meta: object
) -> None:
    state["bias"] = state["bias"] * 2


class Doubled(nn.Linear):
    """Its state dict has another tensor than the module."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_state_dict_post_hook(double_bias)  # type: ignore[no-untyped-call]


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "name"), [(Doubled, "bias"), (lambda: WithExtraState(2, 2), "_extra_state")]
)
def test_entries_that_are_not_the_modules_own_are_refused(
    registry: Registry, offer: Callable[..., Publication], make: Callable[[], nn.Module], name: str
) -> None:
    offer(nn.Linear(2, 2).state_dict())
    with pytest.raises(
        TensorsUnusable,
        match=f"1 entries of the module's state dict are no parameters .* by a hook: {name}: fill",
    ):
        load_module(registry, InProcessEngine(), "a", make())


def test_a_parameter_without_a_shape_is_refused(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer(nn.Linear(2, 2).state_dict())
    for device in ("cpu", "meta"):
        with pytest.raises(TensorsUnusable, match="weight: is not initialized"):
            load_module(registry, InProcessEngine(), "a", nn.LazyLinear(2, device=device), rank=0)


def test_a_parameter_that_gets_no_memory_is_refused(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer(nn.Linear(2, 2).state_dict())
    model = nn.Linear(2, 2, device="meta")
    said = "^weight is on the meta device, and memory for a Parameter on nowhere cannot be had"
    with pytest.raises(TensorsUnusable, match=said):
        load_module(registry, InProcessEngine(), "a", model, device="nowhere")
    assert model.weight.is_meta


def test_a_model_of_another_shape_stays_without_memory(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer(served().state_dict())
    model = without_memory(
        Config(vocabulary=61, positions=16, hidden=24, heads=4, inner=40, layers=3)
    )
    with pytest.raises(
        WeightsMismatch, match=r"encoder.layer.2.* here, but not in the source"
    ) as caught:
        load_module(registry, InProcessEngine(), "a", model)
    assert (
        "decoder.weight: part of 60x24 in the source, of 61x24 here"
        in caught.value.details["problems"]
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_module_whose_names_have_a_prefix_at_the_source_is_filled_with_it(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    source = nn.Linear(3, 2)
    offer({f"model.{name}": tensor for name, tensor in source.state_dict().items()})
    module = nn.Linear(3, 2)
    with pytest.raises(
        WeightsMismatch,
        match=r"weight: here, but not in the source, which has model\.weight.*"
        r"did you mean prefix='model\.'\?",
    ):
        load_module(registry, InProcessEngine(), "a", module)
    shards = {"bias": Shard((2,), (0,))}
    load_module(registry, InProcessEngine(), "a", module, prefix="model.", shards=shards)
    assert torch.equal(module.weight, source.weight)
    assert torch.equal(module.bias, source.bias)


def test_a_module_whose_part_is_at_the_source_is_told_which_part(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer(nn.Linear(3, 2).state_dict())
    module = nn.ModuleDict({"model": nn.Linear(3, 2)})
    with pytest.raises(WeightsMismatch, match="the part of the module that is called 'model'"):
        load_module(registry, InProcessEngine(), "a", module)


def test_an_instance_that_is_not_there_leaves_the_module_as_it_is(registry: Registry) -> None:
    model = without_memory()
    with pytest.raises(InstanceNotFound):
        load_module(registry, InProcessEngine(), "a", model, timeout_s=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_source_that_is_lost_in_the_middle_leaves_the_module_without_memory(
    registry: Registry, offer: Callable[..., Publication], stack: ExitStack
) -> None:
    publication = offer({f"{number}.weight": torch.rand(1 << 10, 1 << 10) for number in range(6)})
    model = nn.Sequential(
        *(nn.Linear(1 << 10, 1 << 10, bias=False, device="meta") for _ in range(6))
    )
    engine = stack.enter_context(Interrupted(publication.close, at=2))
    with pytest.raises(SourceLost):
        load_module(registry, engine, "a", model)
    assert all(parameter.is_meta for parameter in model.parameters())
