"""The error of `engines demo`."""

from __future__ import annotations

import click


class DemoFailed(click.ClickException):
    """Something was not as it should be."""
