"""What an artifact is called, and the key that says where it fits; as a `ModelIdentity`, by which
it is found as weights are. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine_registry import ModelIdentity
from engine_registry.errors import InvalidField
from engine_registry.schema.printable import short

LABEL = "artifact"  # of the instances that hold artifacts; its value is the artifact's name
TENSOR = "archive"  # the only tensor of such an instance
_PREFIX = "artifact/"
_FORMAT = 1  # of archives: readers of another one do not find them
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_FIELD = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_FIELDS = 32
_MAX_VALUE = 200


@dataclass(frozen=True)
class ArtifactName:
    """The name of an artifact, with the key that says where it fits.

    Raises:
        InvalidField: One of them is not valid; `details["field"]` names it.
    """

    name: str
    key: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidField(
                f"artifact name {short(repr(self.name))} is not valid",
                "use at most 63 of the characters A-Z a-z 0-9 . _ -, and begin and end with a "
                "letter or digit",
                field="name",
            )
        object.__setattr__(self, "key", _checked(self.key))

    @property
    def digest(self) -> str:
        """Of the key: 64 bits as 16 hexadecimal digits, by BLAKE2b, of its JSON without spaces and
        with its names in order.
        """
        written = json.dumps([_FORMAT, self.key], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()

    @property
    def model(self) -> ModelIdentity:
        """By which its holders find each other."""
        return ModelIdentity(f"{_PREFIX}{self.name}", self.digest, extra=self.key)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"

    @classmethod
    def of(cls, model: ModelIdentity | None) -> ArtifactName | None:
        """None where the model is no artifact that this release can read."""
        if model is None or not model.name.startswith(_PREFIX):
            return None
        try:
            found = cls(model.name.removeprefix(_PREFIX), model.extra)
        except InvalidField:
            return None
        return found if found.model == model else None

    def differences(self, other: ArtifactName) -> list[str]:
        """In which fields of the key another artifact differs, and how."""
        return [
            f"{field} is {_shown(other.key.get(field))}, not {_shown(self.key.get(field))}"
            for field in sorted({*self.key, *other.key})
            if self.key.get(field) != other.key.get(field)
        ]


def _shown(value: str | None) -> str:
    return "missing" if value is None else repr(value)


def _checked(key: object) -> dict[str, str]:
    """A copy, in order."""
    if not isinstance(key, Mapping) or not 1 <= len(key) <= _MAX_FIELDS:
        raise InvalidField(
            f"the key {short(repr(key))} is not valid: it is a mapping of 1 to {_MAX_FIELDS} "
            "fields",
            "name what the artifact depends on, such as the versions of torch and triton and the "
            "device",
            field="key",
        )
    for field, value in key.items():
        if not isinstance(field, str) or not _FIELD.fullmatch(field):
            raise InvalidField(
                f"the field {short(repr(field))} of the key is not valid",
                "use 1 to 64 of the characters A-Z a-z 0-9 . _ -",
                field="key",
            )
        if (
            not (isinstance(value, str) and value and value.isprintable())
            or len(value) > _MAX_VALUE
        ):
            raise InvalidField(
                f"the field {field} of the key has the value {short(repr(value))}, which is not "
                f"valid: it is a printable text of 1 to {_MAX_VALUE} characters",
                field="key",
            )
    return dict(sorted(key.items()))
