"""Real models of transformers, each built and filled from one that is published: `models ENDPOINT
NAMESPACE`. Runs in the environment of the engines. Prints what it found of each, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine_loader import InProcessEngine, LoadOptions, PublishOptions
from engine_loader.integrations.transformers import load, publish_model
from engine_registry import Registry

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
_DECODER = {**_SHAPE, "num_key_value_heads": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "tied": (Qwen3ForCausalLM, Qwen3Config(**_DECODER, head_dim=16, tie_word_embeddings=True)),
    "by an auto class": (AutoModelForCausalLM, LlamaConfig(**_DECODER, dtype="bfloat16")),
    "experts": (MixtralForCausalLM, MixtralConfig(**_DECODER, num_local_experts=4)),
    "encoder": (BertModel, BertConfig(**_SHAPE)),
}


def compare(registry: Registry, name: str, model_class: Any, config: Any) -> dict[str, Any]:
    build = getattr(model_class, "from_config", None) or model_class._from_config
    model = build(config).eval()
    with (
        InProcessEngine() as source,
        InProcessEngine() as reader,
        publish_model(
            model,
            registry=registry,
            engine=source,
            instance=name.replace(" ", "-"),
            options=PublishOptions(digests=True),
        ) as publication,
    ):
        copy = load(
            model_class,
            config,
            publication.record.instance,
            registry=registry,
            engine=reader,
            options=LoadOptions(verify="digest"),
        )
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            return {
                "same answer": torch.equal(model(tokens)[0], copy(tokens)[0]),
                "dtype": str(copy.dtype),
                "ties": [sorted(one) for one in (_ties(model), _ties(copy))],
                "without memory": [
                    name
                    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]
                    if tensor.is_meta
                ],
            }


def _ties(model: Any) -> list[str]:
    """The names of all parameters that have another name, too."""
    once = dict(model.named_parameters())
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once]


def main(endpoint: str, namespace: str) -> None:
    with Registry.connect(endpoint, namespace=namespace) as registry:
        found = {name: compare(registry, name, *given) for name, given in MODELS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
