"""`migrate container` and `migrate check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrate.cli.parameters import DURATION, RATE
from migrate.cli.settings import SCHEMA, Settings, command, output_options, run_async
from migrate.request import MigrationRequest, Strategy
from protocol.errors import MigrateError, UnsupportedError

if TYPE_CHECKING:
    from migrate.coordinator import CheckOutcome, Ending

F = TypeVar("F", bound=Callable[..., Any])

_WHAT_MOVES = (
    click.argument("name"),
    click.option("--to", "target", required=True, metavar="HOST", help="Where to."),
    click.option("--from", "source", metavar="HOST", help="Where from; left out: the hosts are asked who runs it."),
    click.option(
        "--strategy",
        type=click.Choice([strategy.value for strategy in Strategy]),
        default="auto",
        show_default=True,
        help="stop-copy freezes first and copies then.",
    ),
    click.option("--engine", type=click.Choice(["auto", "native", "criu"]), default="auto", show_default=True),
    click.option(
        "--storage",
        type=click.Choice(["auto", "shared", "sync", "none"]),
        default="auto",
        show_default=True,
        help="auto, none: the target has the bundle already; the files in use are compared.",
    ),
    click.option("--network", type=click.Choice(["keep", "none"]), default="keep", show_default=True),
    click.option("--tcp", type=click.Choice(["keep", "close", "fail"]), default="keep", show_default=True),
    click.option("--streams", type=click.IntRange(1, 16), default=1, show_default=True, help="Data connections."),
    click.option("--tunnel", is_flag=True, help="Send the data through this machine."),
    click.option("--name", "new_name", metavar="NEW", help="The container's name at the target."),
)

_HOW_IT_MOVES = (
    click.option("--max-downtime", "max_downtime_s", type=DURATION, default="300ms", show_default=True),
    click.option("--max-rounds", type=click.IntRange(1, 1000), default=30, show_default=True),
    click.option("--timeout", "timeout_s", type=DURATION, default="10m", show_default=True, help="Until the cut-over."),
    click.option(
        "--bandwidth", type=RATE, default="0", show_default=True, help="Bytes per second, 0: unlimited. 50M, 1gbit."
    ),
    click.option("--compress", type=click.Choice(["auto", "none", "lz4", "zstd"]), default="auto", show_default=True),
    click.option(
        "--freeze-budget",
        "freeze_budget_s",
        type=DURATION,
        help="Past it the container is thawed again.  [default: 2s; stop-copy: the timeout]",
    ),
    click.option("--dry-run", is_flag=True, help="As `migrate check`."),
)


def _with(options: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command()
@_with(_WHAT_MOVES)
@_with(_HOW_IT_MOVES)
@output_options
@command
def container(settings: Settings, /, *, dry_run: bool, **options: Any) -> int:
    """Move the running container NAME to another host."""
    request = _request(**options)
    if dry_run:
        return _check(settings, request)
    from migrate.report import text

    ending = _migrate(settings, request)
    if settings.is_json:
        settings.print_json(ending.result)
    elif ending.error is None:
        settings.print(text.summary(ending.result))
    else:
        click.echo(text.failure(ending.result), err=True)
    return ending.exit_status


@click.command()
@_with(_WHAT_MOVES)
@output_options
@command
def check(settings: Settings, /, **options: Any) -> int:
    """Say whether the container NAME could be moved: every reason against it at once. Touches nothing."""
    return _check(settings, _request(**options))


def _request(*, name: str, strategy: str, **options: Any) -> MigrationRequest:
    return MigrationRequest(container=name, strategy=Strategy(strategy), **options)


def _migrate(settings: Settings, request: MigrationRequest) -> Ending:
    from migrate.coordinator import Ending, migrate
    from migrate.report.tally import Tally

    try:
        inventory = settings.load_inventory()
        observers = settings.observers()
    except MigrateError as error:
        return Ending(result=Tally(request).result(error), error=error)
    try:
        return run_async(lambda bridge: migrate(bridge, inventory, request, [*observers]))
    finally:
        for observer in observers:
            observer.close()


def _check(settings: Settings, request: MigrationRequest) -> int:
    from migrate.coordinator import check as run_check

    inventory = settings.load_inventory()
    outcome = run_async(lambda bridge: run_check(bridge, inventory, request))
    if settings.is_json:
        settings.print_json(_as_json(request, outcome))
    else:
        _print_outcome(settings, request, outcome)
    return UnsupportedError.exit_status if outcome.survey.preflight.refusals else 0


def _as_json(request: MigrationRequest, outcome: CheckOutcome) -> dict[str, object]:
    found = outcome.survey.preflight
    seen = outcome.survey.container
    return {
        "schema": SCHEMA,
        "container": request.container,
        "source": outcome.source,
        "destination": outcome.target,
        "feasible": not found.refusals,
        "refusals": list(found.refusals),
        "warnings": list(found.warnings),
        "memory_bytes": seen.memory_bytes,
        "processes": seen.processes,
        "threads": seen.threads,
        "connections": seen.connections,
        "clock_offset_ns": outcome.survey.offset.estimate_ns,
        "clock_error_ns": outcome.survey.offset.error_ns,
    }


def _print_outcome(settings: Settings, request: MigrationRequest, outcome: CheckOutcome) -> None:
    from migrate import units
    from migrate.report.text import refusal_lines

    found, seen = outcome.survey.preflight, outcome.survey.container
    for warning in found.warnings:
        settings.warn(f"warning: {warning}")
    if found.refusals:
        head = f"{request.container} cannot move from {outcome.source} to {outcome.target}:"
        click.echo("\n".join([head, *refusal_lines(found.refusals)]), err=True)
        return
    settings.print(
        f"{request.container} can move from {outcome.source} to {outcome.target}: "
        f"{units.size(seen.memory_bytes)}, {units.count(seen.processes, 'process', 'processes')}, "
        f"{units.count(seen.threads, 'thread')}, {units.count(seen.connections, 'connection')}"
    )
