"""`migrate ps`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrate.cli.settings import SCHEMA, Settings, command, output_options, run_async

if TYPE_CHECKING:
    from migrate.bridge import Bridge
    from protocol.errors import MigrateError
    from protocol.messages import ContainerList


@click.command()
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="Only this host; may be repeated.")
@output_options
@command
def ps(settings: Settings, /, *, hosts: tuple[str, ...]) -> int:
    """List the containers of all hosts of the inventory."""
    from migrate import units
    from migrate.fleet import ask_all, open_fleet
    from migrate.report.text import table
    from protocol import messages

    chosen = settings.load_inventory().choose(hosts)

    async def ask(bridge: Bridge) -> tuple[dict[str, ContainerList], dict[str, MigrateError]]:
        async with open_fleet(bridge, chosen) as fleet:
            return await ask_all(fleet, messages.ListContainers(), messages.ContainerList)

    lists, errors = run_async(ask)
    found = [(host, item) for host, answer in lists.items() for item in answer.containers]
    if settings.is_json:
        settings.print_json(
            {
                "schema": SCHEMA,
                "containers": [
                    {
                        "name": item.name,
                        "host": host,
                        "runtime": item.runtime,
                        "status": item.status,
                        "pid": item.pid,
                        "memory_bytes": item.memory_bytes,
                        "processes": item.processes,
                        "bundle": item.bundle,
                        "migration": item.migration,
                    }
                    for host, item in found
                ],
                "errors": {host: str(error) for host, error in errors.items()},
            }
        )
    else:
        rows = [
            [item.name, host, item.runtime, item.status, str(item.pid), units.size(item.memory_bytes), item.migration]
            for host, item in sorted(found, key=lambda pair: (pair[1].name, pair[0]))
        ]
        settings.print(table(["NAME", "HOST", "RUNTIME", "STATUS", "PID", "MEMORY", "MIGRATION"], rows))
    return report_errors(settings, errors)


def report_errors(settings: Settings, errors: dict[str, MigrateError]) -> int:
    """Say which hosts did not answer; gives the exit status for that."""
    if not settings.is_json:
        for error in errors.values():
            click.echo(f"error: {error}", err=True)
    return max((error.exit_status for error in errors.values()), default=0)
