"""`migrate status`, `abort` and `recover`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from migrate.cli.ps import report_errors
from migrate.cli.settings import SCHEMA, Settings, command, fail, output_options, run_async
from protocol.errors import MigrateError, UsageError

if TYPE_CHECKING:
    from migrate.bridge import Bridge
    from migrate.fleet import Fleet
    from migrate.recovery import Known

T = TypeVar("T")


@click.command()
@click.argument("migration", metavar="[ID]", default="")
@output_options
@command
def status(settings: Settings, /, *, migration: str) -> int:
    """Show a migration, or all that have not ended, as both sides know them."""
    from migrate.recovery import find
    from migrate.report.text import table

    known, errors = _on_fleet(settings, lambda fleet: find(fleet, migration, unfinished_only=not migration))
    if migration and not known and not errors:
        raise UsageError(f"no host knows migration {migration}", code="no-such-migration")
    if settings.is_json:
        settings.print_json(
            {
                "schema": SCHEMA,
                "migrations": [{"host": item.host, "status": item.status} for item in known],
                "errors": {error.host: str(error) for error in errors},
            }
        )
    else:
        header = ["ID", "CONTAINER", "HOST", "SIDE", "STATE", "PEER", "SINCE", "DETAIL"]
        settings.print(table(header, [_row(item) for item in known]))
    return report_errors(settings, {error.host: error for error in errors})


@click.command()
@click.argument("migration", metavar="ID")
@output_options
@command
def abort(settings: Settings, /, *, migration: str) -> int:
    """End a migration before its commit point; the container runs on at the source."""
    from migrate.recovery import abort as abort_migration

    told = _on_fleet(settings, lambda fleet: abort_migration(fleet, migration, "migrate abort"))
    if settings.is_json:
        settings.print_json({"schema": SCHEMA, "id": migration, "status": "aborted", "hosts": told})
    else:
        settings.print(f"{migration} aborted (told {', '.join(told)})")
    return 0


@click.command()
@click.argument("migration", metavar="[ID]", default="")
@click.option(
    "--source-is-dead",
    is_flag=True,
    help="The source is switched off and will not come back by itself: the target's copy is to run.",
)
@output_options
@command
def recover(settings: Settings, /, *, migration: str, source_is_dead: bool) -> int:
    """Settle a migration that was cut off, or all of them: each side is told what the other's journal says."""
    from migrate.recovery import Settled, find
    from migrate.recovery import recover as recover_one

    if source_is_dead and not migration:
        raise UsageError("--source-is-dead needs the ID of a migration")

    async def recover_all(fleet: Fleet) -> list[Settled | MigrateError]:
        known, _ = await find(fleet, unfinished_only=True)
        wanted = [migration] if migration else list(dict.fromkeys(item.status.migration for item in known))
        outcomes: list[Settled | MigrateError] = []
        for one in wanted:
            try:
                outcomes.append(await recover_one(fleet, one, source_is_dead=source_is_dead))
            except MigrateError as error:
                outcomes.append(error)
        return outcomes

    outcomes = _on_fleet(settings, recover_all)
    settled = [outcome for outcome in outcomes if isinstance(outcome, Settled)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, MigrateError)]
    if settings.is_json and not failed:
        settings.print_json({"schema": SCHEMA, "settled": [_settled_as_json(item) for item in settled]})
    for item in settled if not settings.is_json else []:
        settings.print(f"{item.migration}: {item.container} is {item.owner}'s")
    if not outcomes and not settings.is_json:
        settings.print("nothing to settle")
    return max((fail(settings, error) for error in failed), default=0)


def _settled_as_json(item: object) -> dict[str, object]:
    import dataclasses

    return dataclasses.asdict(item)  # type: ignore[call-overload,no-any-return]


def _on_fleet(settings: Settings, function: Callable[[Fleet], Awaitable[T]]) -> T:
    from migrate.fleet import open_fleet

    hosts = settings.load_inventory().choose(())

    async def run(bridge: Bridge) -> T:
        async with open_fleet(bridge, hosts) as fleet:
            return await function(fleet)

    return run_async(run)


def _row(item: Known) -> list[str]:
    status = item.status
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.since))
    return [status.migration, status.container, item.host, status.side, status.state, status.peer, since, status.detail]
