"""Other Python processes of ours, which find the modules that this one has found."""

from __future__ import annotations

import os
import sys


def python(code: str, *args: str) -> list[str]:
    """The command that runs `code` with `args` behind sys.argv[0].

    -I keeps the working directory off the path: a cli.py or json.py of the user's would be run.
    """
    path = [os.path.abspath(path) for path in sys.path]
    return [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {path!r}; {code}", *args]
