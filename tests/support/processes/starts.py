"""Starts a transfer engine at each address: `starts LIMIT LOADED ADDRESS …`.

LIMIT is how many descriptors the process may have, or 0; with `loaded` another has loaded the
library before. Prints a line for each: whether it started, or why not.
"""

from __future__ import annotations

import importlib
import resource
import sys

from engine_loader import MooncakeEngine
from engine_loader.errors import EngineUnavailable


def main(limit: str, loaded: str, *hosts: str) -> None:
    if loaded:
        importlib.import_module("mooncake.engine")
    if int(limit):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
    try:
        for host in hosts:
            with MooncakeEngine(host):
                print("started")
    except EngineUnavailable as exc:
        print(exc)


if __name__ == "__main__":
    main(*sys.argv[1:])
