"""Changes to vLLM that a test needs on CPUs, by name. Each says why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def plain_linear_layers() -> None:
    """Weights stay tensors, as on a GPU: on some CPUs oneDNN puts them into handles."""
    import vllm._custom_ops
    import vllm.model_executor.layers.utils

    vllm._custom_ops._supports_onednn = False

    def never(*_: Any) -> bool:
        return False

    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = never


def hidden_linear_weights() -> None:
    """Weights go into handles that no tensor shows, on every CPU: oneDNN does it on some."""
    import torch
    import vllm.model_executor.layers.utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        handle = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, handle, bias)
        if remove_weight:
            layer.weight = torch.nn.Parameter(handle.new_empty(0), requires_grad=False)

    vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm = dispatch


def pipeline_buffers() -> None:
    """vLLM 0.32 on CPUs makes the buffers of later pipeline stages only in a warm-up, which eager
    mode leaves out.
    """
    from vllm.distributed import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def load_with_buffers(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    CPUModelRunner.load_model = load_with_buffers


def fills_tensors_itself() -> None:
    """A model that copies what it has cut itself, past the loaders of its layers."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    load_weights = LlamaForCausalLM.load_weights

    def load(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        own = set()

        def others() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                if name.endswith("down_proj.weight"):
                    self.get_parameter(name).data.copy_(tensor)
                    own.add(name)
                else:
                    yield name, tensor

        return load_weights(self, others()) | own

    LlamaForCausalLM.load_weights = load


def fails_at_a_long_answer() -> None:
    """An error in the middle of vLLM's work, as of a GPU, ends its engine."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    execute = CPUModelRunner.execute_model
    steps = 0

    def execute_few(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return execute(self, *args, **kwargs)

    CPUModelRunner.execute_model = execute_few


def no_room() -> None:
    """As on a GPU of which most is held."""
    from tests.support.room import fill_device

    fill_device()


def refuses_what_is_held() -> None:
    """As where something uses the memory of a model that was just made."""
    from engine_loader.integrations.arenas import Following

    def never(self: Any, tensors: Any) -> bool:
        return False

    Following.may_adopt = never  # type: ignore[method-assign]
