"""Contexts: settings of a connection to etcd that have a name, in a file of the user's.

The file is `$ENGINES_CONFIG`, or `engines/config.toml` in `$XDG_CONFIG_HOME` or `~/.config`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine_cli.suggestions import near
from engine_registry.errors import InvalidField

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_VARIABLE = "ENGINES_CONFIG"
_FILES = ("cacert", "cert", "key")


class Context(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a context may say, as the options of the command line do. Never a password."""

    etcd: str | list[str] = ""
    namespace: str = ""
    cacert: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    timeout: float | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    current: str = ""
    contexts: dict[str, Context] = {}


@dataclass(frozen=True)
class Contexts:
    """Those of the file, by name.

    Attributes:
        path: The file. It need not exist.
        current: The one that commands use unless another is named. Empty: none.
        contexts: All of them.
    """

    path: Path
    current: str = ""
    contexts: Mapping[str, Context] = field(default_factory=dict)

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Contexts:
        """Of this user. InvalidField says what is wrong in the file, and where."""
        path = _path_in(environ)
        try:
            text = path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "it is no UTF-8"
            raise InvalidField(f"{path} cannot be read: {why}", field="config") from exc
        try:
            file = msgspec.convert(tomllib.loads(text), _File)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
            raise InvalidField(
                f"{path} is not valid: {exc}",
                "it has `current`, and tables [contexts.NAME] with some of "
                + ", ".join(Context.__struct_fields__),
                field="config",
            ) from exc
        found = cls(path, file.current, file.contexts)
        if file.current:
            found.settings(file.current)
        return found

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """The options of the context, or of the current one; none if there is no current one.

        InvalidField if there is no such context.
        """
        name = name or self.current
        if not name:
            return {}
        if name not in self.contexts:
            known = near(name, self.contexts) or ", ".join(sorted(self.contexts))
            raise InvalidField(
                f"there is no context {name!r} in {self.path}",
                f"known are {known}" if known else "write it there, as a table [contexts.NAME]",
                field="context",
            )
        found: dict[str, Any] = msgspec.structs.asdict(self.contexts[name])
        if isinstance(found["etcd"], list):
            found["etcd"] = ",".join(found["etcd"])
        for option in _FILES:
            if found[option]:  # a relative path is one beside the file
                found[option] = str(self.path.parent / Path(found[option]).expanduser())
        return {option: value for option, value in found.items() if value not in ("", None)}


def _path_in(environ: Mapping[str, str]) -> Path:
    if given := environ.get(CONFIG_VARIABLE):
        return Path(given)
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~"), ".config").expanduser()
    return Path(home, "engines", "config.toml")
