"""Models of Hugging Face transformers that are filled from a running instance, and published.

`from_pretrained` reads files; `load` reads the memory of ranks. It needs the configuration, and
neither files nor memory for a second copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine_loader.engines.base import Engine
from engine_loader.integrations.identity import EngineModel
from engine_loader.loading.module import load_module
from engine_loader.options import LoadOptions, PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.publishing.publish import publish_state_dict
from engine_loader.tensors.meta import parameters_on_meta
from engine_registry import ModelIdentity, Registry
from engine_registry.watching.waiting import Wanted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load(
    model_class: Any,
    config: PretrainedConfig,
    source: Wanted,
    *,
    registry: Registry,
    engine: Engine,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> PreTrainedModel:
    """Builds a model of transformers, and fills it with the weights of a running instance.

    Only the device gets memory, once. The model is in evaluation mode, as from `from_pretrained`.

    Args:
        model_class: A class of transformers, such as `Qwen3ForCausalLM`, or `AutoModelForCausalLM`.
        config: The configuration of the model.
        source: As for `engine_loader.load`.
        registry: Finds the sources.
        engine: Reads their memory.
        rank: As for `load_module`.
        dtype: The dtype of the parameters, which is that of the source. None takes that of the
            configuration.
        device: Where the model gets its memory.
        timeout_s: How many seconds to wait until a source is ready.
        options: How to choose, read and check; see LoadOptions.

    Returns:
        The model.

    Raises:
        LoaderError: What `load_module` raises.
        RegistryError: What `load_module` raises.

    Example:
        `load(Qwen3ForCausalLM, config, "qwen-a", registry=registry, engine=engine)`
    """
    build = getattr(model_class, "from_config", None) or model_class._from_config
    given = {} if dtype is None else {"dtype": dtype}
    with torch.device(device), parameters_on_meta():
        model = build(config, **given)
    load_module(
        registry,
        engine,
        source,
        model,
        rank=rank,
        device=device,
        timeout_s=timeout_s,
        options=options,
    )
    return model.eval()


def publish_model(
    model: PreTrainedModel,
    *,
    registry: Registry,
    engine: Engine,
    instance: str,
    identity: ModelIdentity | None = None,
    rank: int = 0,
    world_size: int = 1,
    topology: Mapping[str, tuple[int, int]] | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Publishes the weights of a model of transformers under the names of its checkpoint.

    Each rank of a model that is sharded with DTensors publishes what it has.

    Args:
        model: The model, with memory.
        registry: Where the rank is registered.
        engine: Serves the memory.
        instance: The name of the instance.
        identity: The model that readers ask for. None derives it from the model's configuration.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        options: How to publish; see PublishOptions. Without `values`.

    Returns:
        The publication, which the caller closes.

    Raises:
        LoaderError: What `publish_state_dict` raises.
        RegistryError: What `publish_state_dict` raises.
    """
    return publish_state_dict(
        registry,
        engine,
        model.state_dict(),
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=identity if identity is not None else identity_of(model),
        topology=topology,
        options=options,
    )


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """Which weights the model has, by its configuration. Raises InvalidField."""
    config = model.config
    quantization: Any = getattr(config, "quantization_config", None) or {}
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    return EngineModel(
        name=config.name_or_path or type(model).__name__,
        revision=getattr(config, "_commit_hash", None) or "",
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=str(quantization.get("quant_method", "")),
        engine="transformers",
        config=config.to_dict(),
        quantization_config=quantization,
    ).identity()
