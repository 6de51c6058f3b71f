"""vLLM, unmodified: `--load-format engine_registry` and the weight transfer `engine_registry`.

vLLM finds `register` by the entry point `vllm.general_plugins`, and calls it in each of its
processes. Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)
NAME = "engine_registry"


def register() -> None:
    """Makes the load format and the weight transfer known to vLLM, any number of times.

    Nothing is connected or started before a user chooses one of them. It never raises: a vLLM that
    it does not know runs as it would without it.
    """
    for part in (_register_load_format, _register_transfer):
        try:
            part()
        except Exception as exc:  # noqa: BLE001
            from engine_registry.telemetry.logs import fields

            log.warning(
                "%s is not available in this vLLM: %s: %s",
                NAME,
                type(exc).__name__,
                exc,
                extra=fields("plugin_failed", error=exc),
            )


def _register_load_format() -> None:
    from vllm.model_executor.model_loader import (
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )

    if NAME not in _LOAD_FORMAT_TO_MODEL_LOADER:
        from engine_loader.integrations.vllm.loader import EngineRegistryLoader

        register_model_loader(NAME)(EngineRegistryLoader)


def _register_transfer() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            NAME, "engine_loader.integrations.vllm.transfer", "RegistryTransfer"
        )
