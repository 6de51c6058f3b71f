"""Texts that a record holds, and the types of its fields. Pure. Each check raises InvalidField."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine_registry.errors import InvalidField


def check_texts(texts: Mapping[str, object]) -> None:
    """By the names of their fields: one line of printable text each."""
    for field_name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable():  # lists print it, on terminals too
            raise InvalidField(
                f"{field_name} {text!r} is not valid: it is one line of printable text",
                field=field_name,
            )


def are_printable(texts: Iterable[object]) -> bool:
    """Whether `check_texts` takes them all: quicker than to ask by name."""
    try:
        return all(map(str.isprintable, texts))  # type: ignore[arg-type]
    except TypeError:
        return False


def check_kind(field_name: str, value: object, kind: type) -> None:
    """Takes no true or false for a number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidField(
            f"{field_name} {value!r} is not valid: it is of type {kind.__name__}", field=field_name
        )


def check_names(field_name: str, named: object) -> None:
    """Texts by names that are texts."""
    check_kind(field_name, named, Mapping)
    for name, text in named.items():  # type: ignore[attr-defined]
        check_texts({field_name: name})
        check_texts({field_name: text})
