"""The version of the package that is installed. Pure."""

from __future__ import annotations


def package_version() -> str:
    """Empty where the package is not installed, as in a checkout."""
    from importlib import metadata  # costs each keeper process memory that it never needs

    try:
        return metadata.version("engine-registry")
    except metadata.PackageNotFoundError:
        return ""
