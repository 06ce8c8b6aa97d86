"""`migrate doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrate.cli.ps import report_errors
from migrate.cli.settings import SCHEMA, Settings, command, output_options, run_async

if TYPE_CHECKING:
    from migrate.bridge import Bridge
    from protocol.errors import MigrateError
    from protocol.messages import HostReport, HostReportReply


@click.command()
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@output_options
@command
def doctor(settings: Settings, /, *, hosts: tuple[str, ...]) -> int:
    """Ask hosts what they can do; exit status 3 if one lacks something."""
    from migrate.fleet import ask_all, open_fleet
    from protocol import messages
    from protocol.errors import UnsupportedError

    chosen = settings.load_inventory().choose(hosts)

    async def ask(bridge: Bridge) -> tuple[dict[str, HostReportReply], dict[str, MigrateError]]:
        async with open_fleet(bridge, chosen) as fleet:
            return await ask_all(fleet, messages.GetHostReport(), messages.HostReportReply)

    replies, errors = run_async(ask)
    reports = {host: reply.report for host, reply in replies.items()}
    if settings.is_json:
        settings.print_json(
            {"schema": SCHEMA, "hosts": reports, "errors": {host: str(error) for host, error in errors.items()}}
        )
    else:
        for host, report in reports.items():
            settings.print("\n".join(_lines(host, report)))
    status = report_errors(settings, errors)
    lacking = any(not present for report in reports.values() for present in report.features.values())
    return status or (UnsupportedError.exit_status if lacking else 0)


def _lines(host: str, report: HostReport) -> list[str]:
    from migrate import units

    runtimes = ", ".join(f"{runtime.kind} ({runtime.version})" for runtime in report.runtimes) or "none"
    lines = [
        f"{host}: {report.architecture}, kernel {report.kernel}, agent {report.agent_version}",
        f"  cpu       {report.cpu_model or 'unknown'}, {report.cpus} processors, xstate {report.xstate_bytes} bytes",
        f"  memory    {units.size(report.memory_available)} available",
        f"  runtimes  {runtimes}",
        f"  bridge    {report.bridge or 'none'}",
    ]
    for name, present in sorted(report.features.items()):
        note = report.feature_notes.get(name, "")
        lines.append(f"  {'ok ' if present else 'NO '} {name}" + (f": {note}" if note else ""))
    return lines
