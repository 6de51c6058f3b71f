"""What a part was measured on: the machine, and the versions in both environments."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.peers.candidates import CANDIDATES
from benchmarks.peers.sides import PEERS

_OURS = ("engine-registry", "torch", "mooncake-transfer-engine-non-cuda", "safetensors")
_ASK = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


def machine() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": f"{os.cpu_count()} × {_processor()}",
        "kernel": platform.release(),
        "congestion control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "Python": platform.python_version(),
        **{name: _version(name) for name in _OURS},
        **_products(),
    }


def _products() -> dict[str, str]:
    """In .peers; none if it is not there."""
    names = sorted({one.product for one in CANDIDATES.values() if one.product})
    try:
        asked = subprocess.run(
            [str(PEERS / "bin" / "python"), "-I", "-c", _ASK, *names],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(names, "not installed")
    versions: dict[str, str] = json.loads(asked.stdout)
    return versions


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "not known"
