# SPDX-License-Identifier: Apache-2.0
"""The command line: one file for each verb, imported when the verb is used.

Exit codes: 0 done; 1 the result misses a check of the recipe, or an unexpected error; 2 an error
that the message explains; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from types import TracebackType

import click

from modewright._version import __version__
from modewright.errors import ModewrightError, did_you_mean

VERBS: dict[str, str] = {
    "optimize": "Optimize a model by a recipe; prove and measure what comes out.",
    "search": "Search what a mode opens, within constraints.",
    "bench": "Measure how fast and how large a model is, beside its original.",
    "inspect": "Say what a checkpoint holds.",
    "verify": "Check every byte of a checkpoint.",
    "backends": "Show what multiplies packed weights on this machine, and why.",
    "modes": "List the modes, or explain one.",
    "recipes": "List the recipes, or show one.",
}


class _Verbs(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            ctx.fail(f"There is no command {cmd_name!r}.{did_you_mean(cmd_name, VERBS)}")
        module = importlib.import_module(f"modewright.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="modewright")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def application(debug: bool) -> None:
    """Make neural networks smaller and faster in recorded, restorable steps."""
    if not debug:
        sys.excepthook = _say_unexpected


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = application.main(given, prog_name="modewright", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted.", err=True)
        code = 130
    except ModewrightError as error:
        if "--debug" in given:
            raise
        click.echo(f"Error: {error}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _say_unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say an error that nobody foresaw in one paragraph."""
    click.echo(
        f"Unexpected {kind.__name__}: {error}\nThis is a fault of modewright or of a plug-in. "
        "Run the command again as `modewright --debug ...` to see where it happened.",
        err=True,
    )
