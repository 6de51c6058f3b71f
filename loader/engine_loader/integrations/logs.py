"""Our log lines in the log of an engine that configures only its own loggers, and what they say of
errors.
"""

from __future__ import annotations

import logging

from engine_registry.errors import EngineRegistryError

_OURS = ("engine_loader", "engine_registry")


def join_log(engine: str) -> None:
    """Sends our lines where those of the engine's logger go, unless they go somewhere already.

    Args:
        engine: The name of the engine's logger.
    """
    theirs = logging.getLogger(engine)
    if not theirs.handlers:
        return
    for name in _OURS:
        logger = logging.getLogger(name)
        if _is_heard(logger):
            continue
        for handler in theirs.handlers:
            logger.addHandler(handler)
        logger.setLevel(theirs.level)
        logger.propagate = False


def reason(error: Exception) -> str:
    """For one line. Errors that are not ours need their class to be understood."""
    if isinstance(error, EngineRegistryError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _is_heard(logger: logging.Logger) -> bool:
    handlers = [*logger.handlers, *logging.getLogger().handlers]
    return any(not isinstance(handler, logging.NullHandler) for handler in handlers)
