"""What the global options say, and how a command prints and fails by them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import click

from protocol.errors import MigrateError, UsageError

if TYPE_CHECKING:
    from migrate.bridge import Bridge
    from migrate.events import Event
    from migrate.inventory import Inventory

P = ParamSpec("P")
T = TypeVar("T")

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The global options."""

    inventory: Path | None = None
    output: str = "text"  # text, json, jsonl
    quiet: bool = False
    verbose: int = 0
    progress: bool = True
    color: str = "auto"
    log_file: Path | None = None

    @property
    def inventory_path(self) -> Path:
        """The named inventory, or the one that is found."""
        from migrate.inventory import default_path

        return self.inventory if self.inventory is not None else default_path()

    def load_inventory(self) -> Inventory:
        """Raises: UsageError: it is missing or wrong."""
        from migrate.inventory import load

        return load(self.inventory_path)

    def print(self, text: str) -> None:
        """A result for people, on standard output, unless --quiet."""
        if not self.quiet:
            click.echo(text, color=self._color)

    def print_json(self, value: Any) -> None:
        """One object on standard output."""
        import msgspec

        click.echo(msgspec.json.encode(value).decode())

    def warn(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            click.echo(text, err=True)

    @property
    def is_json(self) -> bool:
        """Whether standard output is for programs."""
        return self.output in {"json", "jsonl"}

    @property
    def _color(self) -> bool | None:
        return {"always": True, "never": False}.get(self.color)

    def observers(self) -> list[Closable]:
        """Progress and log, as asked for. The caller closes them."""
        from migrate.progress.lines import Lines
        from migrate.progress.records import JsonLines, LogFile

        chosen: list[Closable] = []
        if self.output == "jsonl":
            chosen.append(JsonLines(sys.stdout))
        if self.progress and not self.quiet:
            if self.color != "never" and sys.stderr.isatty():
                from rich.console import Console

                from migrate.progress.terminal import Terminal

                chosen.append(Terminal(Console(stderr=True), verbose=self.verbose > 0))
            else:
                chosen.append(Lines(sys.stderr, verbose=self.verbose > 0))
        if self.log_file is not None:
            try:
                chosen.append(LogFile(self.log_file))
            except OSError as error:
                raise UsageError(f"--log-file {self.log_file}: {error.strerror}") from error
        return chosen


class Closable(Protocol):
    """An observer with an end."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def command(function: Callable[Concatenate[Settings, P], int]) -> Callable[P, int]:
    """Give a command the settings; turn a MigrateError into its text and exit status."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        context = click.get_current_context()
        settings: Settings = context.obj
        try:
            return function(settings, *args, **kwargs)
        except MigrateError as error:
            return fail(settings, error)

    return wrapper


def fail(settings: Settings, error: MigrateError) -> int:
    """Print an error; gives its exit status."""
    from migrate.errors import RefusedError
    from migrate.report.result import problem
    from migrate.report.text import refusal_lines

    if settings.is_json:
        settings.print_json({"schema": SCHEMA, "error": problem(error)})
    elif isinstance(error, RefusedError):
        click.echo("\n".join(["not feasible:", *refusal_lines(error.refusals)]), err=True)
    else:
        click.echo(f"error: {error}", err=True)
    return error.exit_status


def run_async(function: Callable[[Bridge], Awaitable[T]]) -> T:
    """Run an async function under trio, with a bridge to asyncssh."""
    import trio

    from migrate.bridge import Bridge

    with Bridge() as bridge:
        return trio.run(function, bridge)


def _json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.obj = replace(context.obj, output="json")


def _quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.obj = replace(context.obj, quiet=True)


def _verbose(context: click.Context, _parameter: click.Parameter, value: int) -> None:
    if value:
        context.obj = replace(context.obj, verbose=context.obj.verbose + value)


def output_options(function: Callable[P, T]) -> Callable[P, T]:
    """The global --json, -q and -v, behind the command as well."""
    as_json = click.option(
        "--json", is_flag=True, expose_value=False, callback=_json, help="One JSON object on standard output."
    )
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_quiet, help="Print errors only.")
    verbose = click.option("-v", "--verbose", count=True, expose_value=False, callback=_verbose, help="Say more.")
    return as_json(quiet(verbose(function)))
