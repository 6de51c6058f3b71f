"""A safetensors file of words that name their place: `file FILE NBYTES` writes it, and `file
--check FILE` says how many bytes it has, if all are in their places.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file

from tests.support.launches import Origin, origins_of_bytes, the_origin
from tests.support.processes.source import content

LAUNCH = 5


def main(first: str, second: str) -> None:
    if first != "--check":
        save_file(content(0, int(second), LAUNCH), first)
        return
    found = load_file(second)
    ordered = {f"t{number}": found[f"t{number}"] for number in range(len(found))}
    origin = the_origin(origins_of_bytes(ordered))
    if origin != Origin(LAUNCH):
        raise AssertionError(f"words of {origin}")
    print(f"{sum(tensor.nbytes for tensor in found.values())} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
