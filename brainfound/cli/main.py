"""The ``brainfound`` command."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from brainfound.cli.terminal import make_output_encodable, print_note
from brainfound.errors import EXIT_FAILED, EXIT_USAGE, BrainFoundError

VERBS = {
    "demo": "demo",
    "phantom": "demo",
    "prepare": "prepare",
    "check": "check",
    "split": "split",
    "pretrain": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "compare": "compare",
    "embed": "predict",
    "probe": "evaluate",
    "predict": "predict",
    "explain": "predict",
    "report": "show",
    "list": "list",
    "show": "show",
    "doctor": "show",
}
"""Verb → module of this package."""
EXIT_INTERRUPTED = 130
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Disk errors from writing to an open file, which carry no file name."""
WRONG_KIND_ERRNOS = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)

_PACKAGE = Path(__file__).parents[1]
_format_warning = warnings.formatwarning

# From about 0.26 on typer bundles its own copy of click; older versions use the installed one. The bases of the public
# `BadParameter` include the base class of all command-line errors, whichever copy raises them.
BadCommandLine: type[Any] = next(
    kind for kind in reversed(typer.BadParameter.__mro__) if hasattr(kind, "format_message")
)

app = typer.Typer(
    name="brainfound",
    help="Adapt 2-D vision transformers to 3-D brain MRI, slice by slice. Not a medical device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from brainfound import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)


for _verb, _name in VERBS.items():
    _module = importlib.import_module(f"brainfound.cli.{_name}")
    app.command(_verb)(getattr(_module, "list_" if _verb == "list" else _verb))


def main() -> None:
    """Run the command line; errors that the user can fix end in one line and an exit code."""
    make_output_encodable()
    if not sys.warnoptions:
        # These warnings are for programmers; whoever types a command can do nothing about them.
        warnings.simplefilter("ignore", FutureWarning)
    warnings.formatwarning = _format_user_warning
    try:
        # Without click's standalone mode `typer.Exit(code)` comes back as the return value.
        code = app(prog_name="brainfound", standalone_mode=False)
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # newer typer returns this on Ctrl-C, older ones raise `Abort`
            _exit_with("interrupted", EXIT_INTERRUPTED)
    except BrainFoundError as error:
        _exit_with(str(error), error.exit_code)
    except BadCommandLine as error:
        _use_plain_words(error)
        command = error.ctx.command_path if getattr(error, "ctx", None) else "brainfound"
        message = error.format_message().strip()
        _exit_with(f"{message}{'' if message.endswith(('.', '?')) else '.'} Try: {command} --help", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        _exit_with("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has closed the pipe (`… | head`). Buffered output must not be flushed when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            if error.errno not in DISK_ERRNOS:
                raise
            _exit_with(f"{error.strerror}. Check the free space and the quota of where you write", EXIT_FAILED)
        if error.errno in WRONG_KIND_ERRNOS:
            what = f"{error.filename}: a file is where a folder should be, or a folder where a file should be"
            _exit_with(f"{what}. Check the path", EXIT_USAGE)
        # A full disk, a folder without write permission.
        _exit_with(
            f"{error.filename}: {error.strerror}. Check the path, the permissions and the free space", EXIT_FAILED
        )
    sys.exit(code if isinstance(code, int) else 0)


def _format_user_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format our own warnings as notes, without the source line; others as usual."""
    if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
        return f"brainfound: {' '.join(str(message).split())}\n"
    return _format_warning(message, category, filename, lineno, line)


def _use_plain_words(error: Any) -> None:
    """Replace the message of a value that pydantic refused, which newer versions of typer pass on."""
    from pydantic import ValidationError

    from brainfound.recipes import describe_expected

    if isinstance(cause := error.__cause__, ValidationError):
        first = cause.errors()[0]
        if expected := describe_expected(first):
            error.message = f"got {first['input']}, expected {expected}"


def _exit_with(line: str, code: int) -> None:
    print_note(line)
    sys.exit(code)
