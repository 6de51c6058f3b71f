"""Labels, which people give to an instance to find it by, and selectors, which choose by labels.
Pure.

The syntax of both is that of Kubernetes, so that the labels of a pod can be those of its rank.
Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine_registry.errors import InvalidField
from engine_registry.schema.printable import short

MAX_LABELS = 16
_MAX_PREFIX = 253
_WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_TERM = re.compile(r"(!?)\s*([^=!\s]+)\s*(?:(==?|!=)\s*(\S*))?")
_WORD_RULE = (
    "at most 63 of the characters A-Z a-z 0-9 . _ -, and begins and ends with a letter or digit"
)


def check_labels(labels: object) -> dict[str, str]:
    """A copy, or InvalidField, which names the label and the rule."""
    if not isinstance(labels, Mapping):
        raise InvalidField(
            f"labels {short(repr(labels))} are not valid: they are a mapping of names to values",
            field="labels",
        )
    if len(labels) > MAX_LABELS:
        raise InvalidField(
            f"{len(labels)} labels are too many: an instance has {MAX_LABELS} at most",
            field="labels",
        )
    return {_checked_name(name): _checked_value(name, value) for name, value in labels.items()}


def _checked_name(name: object) -> str:
    prefix, slash, word = str(name).rpartition("/")
    if not isinstance(name, str) or not _WORD.fullmatch(word):
        raise InvalidField(
            f"label {short(repr(name))} is not valid: a name has {_WORD_RULE}", field="labels"
        )
    if slash and not (len(prefix) <= _MAX_PREFIX and _DOMAIN.fullmatch(prefix)):
        raise InvalidField(
            f"label {short(repr(name))} is not valid: before the / stands a DNS name in lower "
            f"case, of {_MAX_PREFIX} characters at most",
            field="labels",
        )
    return name


def _checked_value(name: str, value: object) -> str:
    if not isinstance(value, str) or (value and not _WORD.fullmatch(value)):
        raise InvalidField(
            f"label {name!r} has the value {short(repr(value))}, which is not valid: a value is "
            f"empty, or has {_WORD_RULE}",
            field="labels",
        )
    return value


def labels_text(labels: Mapping[str, str]) -> str:
    """For people: `team=x,tier=gold`, by name."""
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))


@dataclass(frozen=True)
class _Term:
    """`value` None: any value will do."""

    name: str
    value: str | None
    negated: bool

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.name)
        return (found is not None and self.value in (None, found)) is not self.negated


@dataclass(frozen=True)
class Selector:
    """Chooses what has certain labels. Without a term it chooses everything."""

    terms: tuple[_Term, ...]

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Of terms with commas between them: KEY=VALUE (or ==), KEY!=VALUE, KEY, !KEY. All of them
        must hold.

        KEY!=VALUE also holds where there is no such label. Raises InvalidField.
        """
        if not isinstance(text, str):
            raise InvalidField(f"selector {text!r} is not valid: it is a text", field="selector")
        return cls(tuple(map(_term, text.split(","))) if text.strip() else ())

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether all of the terms hold."""
        return all(term.matches(labels) for term in self.terms)


EVERYTHING = Selector(())


def _term(text: str) -> _Term:
    found = _TERM.fullmatch(text.strip())
    if found is None or (found[1] and found[3]):
        raise InvalidField(
            f"{short(repr(text.strip()))} does not select by a label",
            "say KEY=VALUE, KEY!=VALUE, KEY or !KEY, with commas between them",
            field="selector",
        )
    negated, name, operator, value = found.groups()
    _checked_name(name)
    return _Term(
        name,
        None if operator is None else _checked_value(name, value),
        bool(negated) or operator == "!=",
    )
