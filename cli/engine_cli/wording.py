"""What errors and logs of the library say, in terms of the command line: options in place of
parameters, commands in place of calls, and ranks in place of their keys in etcd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine_registry.schema.keys import ENGINES

_WORDS = {
    "allow_anonymous": "--allow-anonymous",
    "cacert": "--cacert",
    "cert": "--cert",
    "connections_per_address": "--connections-per-address",
    "device": "--device",
    "endpoints": "--etcd",
    "force": "--force",
    "host": "--host",
    "key": "--key",
    "out": "--out",
    "password": "ENGINES_ETCD_PASSWORD",
    "port": "--port",
    "Registry.rollback": "--rollback",
    "seed_url": "--seed",
    "shards": "--shard, --shards or --whole",
    "timeout_s": "--max-time",  # of `engines artifacts pull`: no other text has it
    "token": "a token in ENGINES_GATEWAY_TOKEN",
    "user": "--user",
    "world_size": "--world-size",
    "digests=True": "digests, as `engines register` does",
    'verify="header"': "no --verify",
    "Registry.evict": "`engines evict`",
    "Registry.instances()": "`engines list`",
}
_QUOTED = re.compile(r"`([A-Za-z_.()]+|[a-z_]+=[A-Za-z\"]+)`")

# A damaged record, and a command of etcdctl, are about the key itself.
_KEY = re.compile(
    rf"(?<!at )(?<!del )(?<!key )(?<![\w`/]){ENGINES}([A-Za-z0-9._-]+)/([0-9]+)(?![\w/])"
)


def in_options(text: str, details: Mapping[str, Any] | None = None) -> str:
    """The text with our options and commands for the parameters and calls that stand in it in
    backticks, and with the names of ranks for their keys.

    `details` are those of the error that says it: a command then stands with its arguments.
    """

    def word(found: re.Match[str]) -> str:
        if found[1] == "Registry.evict" and details and "instance" in details and "rank" in details:
            return f"`engines evict {details['instance']} --rank {details['rank']}`"
        return _WORDS.get(found[1], found[0])

    return _KEY.sub(r"rank \2 of instance \1", _QUOTED.sub(word, text))


def said(exc: BaseException) -> str:
    """The text of any error, in one line, and so."""
    return in_options(" ".join(str(exc).split()), getattr(exc, "details", None))
