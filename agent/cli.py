"""The command line `migrate-agent`."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from protocol.errors import MigrateError


class _Group(click.Group):
    """`migrate-agent --stdio` is a command in the guise of an option, as sshd subsystems like it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["stdio", *args[1:]] if args[:1] == ["--stdio"] else args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """The agent of a host: moves containers in and out for a coordinator.

    As an sshd subsystem, or without a daemon: migrate-agent --stdio
    """


_config = click.option(
    "--config", type=click.Path(path_type=Path), default=None, help="agent.toml (default: /etc/migrate/agent.toml)"
)
_verbose = click.option("-v", "--verbose", is_flag=True, help="log more")


def _start_logging(*, verbose: bool) -> None:
    import logging

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )  # fmt: skip
    logging.getLogger("asyncssh").setLevel(logging.WARNING)


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Until it ends, or a signal asks it to end in order."""
    import asyncio
    import signal

    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        click.echo("migrate-agent: stopped", err=True)


@command.command()
@_config
@_verbose
def serve(config: Path | None, verbose: bool) -> None:
    """Listen for coordinators until told to stop."""
    import asyncio

    from agent import host, server, settings

    _start_logging(verbose=verbose)

    asyncio.run(_until_stopped(server.serve(host.open_host(settings.load(config)))))


@command.command(hidden=True)
@_config
@_verbose
def stdio(config: Path | None, verbose: bool) -> None:
    """One session over stdin and stdout."""
    import asyncio

    from agent import host, server, settings

    _start_logging(verbose=verbose)
    asyncio.run(_until_stopped(server.serve_stdio(host.open_host(settings.load(config)))))


@command.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="the whole report as one JSON object")
def doctor(config: Path | None, as_json: bool) -> None:
    """Say what this host can do, and what it lacks."""
    import msgspec

    from agent import host, hostreport, settings

    report = hostreport.collect(host.open_host(settings.load(config)))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
        return
    click.echo(f"{report.host}: Linux {report.kernel} on {report.architecture}, agent {report.agent_version}")
    for name, works in sorted(report.features.items()):
        note = report.feature_notes.get(name, "")
        click.echo(f"  {'ok ' if works else 'NO '} {name}{': ' + note if note else ''}")
    for runtime in report.runtimes:
        click.echo(f"  ok  {runtime.kind}: {runtime.version} ({runtime.root})")
    if not all(report.features.values()):
        raise SystemExit(3)


def main() -> None:
    """Entry point; errors of ours become one line and their exit status."""
    try:
        command(standalone_mode=True)
    except MigrateError as error:
        click.echo(f"migrate-agent: {error}", err=True)
        raise SystemExit(error.exit_status) from None
