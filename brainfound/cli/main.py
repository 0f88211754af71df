"""The ``brainfound`` command."""

from __future__ import annotations

import importlib
import sys

import click
import typer

from brainfound.errors import EXIT_FAILED, BrainFoundError

VERBS = ("demo", "phantom", "prepare", "pretrain", "finetune", "evaluate", "embed", "predict", "list", "show", "doctor")

app = typer.Typer(
    name="brainfound",
    help="Adapt 2-D vision transformers to 3-D brain MRI, slice by slice. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from brainfound import __version__

        print(__version__)
        raise typer.Exit


for _verb in VERBS:
    _module = importlib.import_module(f"brainfound.cli.{_verb}")
    app.command(_verb)(getattr(_module, "list_" if _verb == "list" else _verb))


def main() -> None:
    """Run the command line; errors that are the user's to fix end in one line and their exit code."""
    try:
        # Without click's standalone mode `typer.Exit(code)` comes back as the return value.
        code = app(standalone_mode=False)
    except BrainFoundError as error:
        print(f"brainfound: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("brainfound: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)
