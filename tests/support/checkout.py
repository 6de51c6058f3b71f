"""Where things of this checkout are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
# where they are imported from
PACKAGES = [str(ROOT / folder) for folder in ("registry", "loader", "cli")]
