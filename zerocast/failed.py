"""A check or a run that failed although the input was right: exit code 1."""

from __future__ import annotations

import click


class Failed(click.ClickException):
    """Ends a command with ``message`` on standard error and exit code 1."""

    exit_code = 1
