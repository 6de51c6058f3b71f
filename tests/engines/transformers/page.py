"""Runs the page about transformers: `page ENDPOINT NAMESPACE`.

In the environment of the engines, which has transformers.
"""

from __future__ import annotations

import re
import sys

from tests.support.checkout import ROOT

ENDPOINT = '"127.0.0.1:2379"'  # as the page has it


def main(endpoint: str, namespace: str) -> None:
    text = (ROOT / "docs" / "how-to" / "transformers.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = "".join(blocks).replace(ENDPOINT, f'"{endpoint}", namespace="{namespace}"')
    exec(compile(code, "transformers.md", "exec"), {"__name__": "page"})  # noqa: S102


if __name__ == "__main__":
    main(*sys.argv[1:])
