"""The command line. Each command is a file here; heavy modules load inside the commands that need them."""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

from tidar.cli import bench, demo, eval, generate, inspect, profile, train, verify
from tidar.errors import TidarError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="tidar",
    help="TiDAR: one transformer that drafts with masked diffusion and verifies autoregressively, in one pass.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _explained(command: Callable[P, R]) -> Callable[P, R]:
    """The command, with mistakes told in one screen: exit code 2 for the user's, 130 for Ctrl-C."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except TidarError as error:
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise
        except (
            OSError
        ) as error:  # a full disk, a folder that may not be written, a file that vanished
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            where = f": {error.filename}" if error.filename else ""
            typer.echo(f"{error.strerror or error}{where}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None

    return run


for _name, _command in (
    ("generate", generate.generate),
    ("demo", demo.demo),
    ("train-tokenizer", train.train_tokenizer),
    ("inspect", inspect.inspect),
    ("verify", verify.verify),
    ("bench", bench.bench),
    ("eval", eval.evaluate),
    ("profile", profile.profile),
):
    app.command(_name)(_explained(_command))
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    _explained(train.train)
)


@app.callback()
def _root() -> None:
    """Without this a single command would lose its name."""


def _show_warning(message: Warning | str, *_: object) -> None:
    typer.secho(f"warning: {message}", fg="yellow", err=True)


def main() -> None:
    """Entry point of `tidar` and `python -m tidar`."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours, and nothing is left to say.
        sys.stderr.close()
        sys.exit(141)
