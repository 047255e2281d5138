"""The command line: finds the command, runs it, and turns every user's mistake into one sentence and exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from estimator.errors import InputError
from zerocast.failed import Failed

COMMANDS = {
    "predict": "Forecast memory and time of one training step.",
    "plan": "Rank every ZeRO stage x offload x recompute x micro-batch for a model and cluster.",
    "budget": "What a whole training run costs: days, dollars, kWh, checkpoints, goodput.",
    "explain": "Say why a forecast is what it is, and what would change it.",
    "trace": "Write the forecast step as a trace for ui.perfetto.dev.",
    "plot": "Draw a forecast: memory over the step, where the time goes, the roofline.",
    "measure": "Run a training step on this machine and hold it against its forecast.",
    "calibrate": "Measure this machine into a hardware profile.",
    "compare": "Hold recorded runs against their forecasts; fail when they drift.",
    "accuracy": "Hold forecasts against training runs that others published.",
    "check": "Hold new runs against a baseline; fail when a metric regressed.",
    "runs": "List, show, export, import or delete recorded runs.",
    "dashboard": "Open the dashboard in a browser.",
    "doctor": "Report what this machine has, and what is missing.",
    "demo": "Forecast, train and measure a small model here, and compare (minutes).",
}
"""Command names with their line of help: ``--help`` needs no command's module."""

EXTRAS = {"torch": "runtime", "streamlit": "dashboard", "altair": "dashboard", "matplotlib": "dashboard", "cupy": "gpu"}
"""Optional packages and the extra that installs each."""


class LazyGroup(click.Group):
    """A group whose commands live in ``zerocast.commands.NAME`` and are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"zerocast.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"{args[0]!r} is no command of zerocast{_nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: zerocast predict --model llama-3-8b --gpu h100-sxm --gpus 8 --zero 3",
)
@click.option("--version", is_flag=True, help="Print the version and exit.")
@click.pass_context
def cli(ctx: click.Context, version: bool) -> None:
    """Forecast what a ZeRO training step costs, and measure real steps to prove the forecast.

    Every command takes --json for machines and --help for people.
    """
    if version:
        from zerocast import __version__

        click.echo(f"zerocast {__version__}")
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a user's mistake, 130 interrupted."""
    try:
        code = cli.main(args, prog_name="zerocast", standalone_mode=False)
        sys.stdout.flush()
    except Failed as error:
        click.echo(f"error: {error.message}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(_sentence(error), 2)
    except InputError as error:
        _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _fail(f"this command needs {error.name}: pip install 'zerocast[{EXTRAS[error.name]}]'", 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader (head, less) has seen enough; keep the final flush silent too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {(error.strerror or 'cannot be used').lower()}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    one_line = " ".join(message.split())
    click.echo(one_line if code == 130 else f"error: {one_line}", err=True)
    sys.exit(code)


def _sentence(error: click.ClickException) -> str:
    """Click's usage error as one sentence that names the nearest valid spelling."""
    if isinstance(error, click.NoSuchOption):
        known = [name for p in error.ctx.command.params for name in p.opts] if error.ctx else []
        command = error.ctx.command_path if error.ctx else "zerocast"
        if not known and error.ctx is not None and isinstance(error.ctx.command, click.Group):
            commands = ", ".join(error.ctx.command.list_commands(error.ctx))
            return f"{error.option_name} is no option of {command!r}; it goes after one of its commands: {commands}"
        return f"{error.option_name} is no option of {command!r}{_nearest(error.option_name, known)}"
    if (
        isinstance(error, click.BadParameter)
        and error.param is not None
        and not isinstance(error, click.MissingParameter)
    ):
        return f"{error.param.opts[-1]}: {error.message.rstrip('.')}"
    return error.format_message().rstrip(".")


def _nearest(word: str, known: Sequence[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
