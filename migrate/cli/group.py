"""The group of commands, each imported when it is called, and the global options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click

from migrate.cli.settings import Settings

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a command is, and its line in the help."""

    module: str
    attribute: str
    help: str


_COMMANDS: dict[str, _Entry] = {
    "container": _Entry("migrate.cli.container", "container", "Move a running container to another host."),
    "check": _Entry("migrate.cli.container", "check", "Say whether a container could be moved, and touch nothing."),
    "ps": _Entry("migrate.cli.ps", "ps", "List the containers of the hosts."),
    "status": _Entry("migrate.cli.migrations", "status", "Show migrations, as both sides know them."),
    "abort": _Entry("migrate.cli.migrations", "abort", "End a migration before its commit point."),
    "recover": _Entry("migrate.cli.migrations", "recover", "Settle migrations that were cut off past that point."),
    "hosts": _Entry("migrate.cli.hosts", "hosts", "List and edit the hosts of the inventory."),
    "doctor": _Entry("migrate.cli.doctor", "doctor", "Say what the hosts can do, and what they lack."),
}


class LazyGroup(click.Group):
    """Knows its commands by name; imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's interface
        """In the order in which people need them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  as above
        """Import it."""
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  as above
        """The help's list, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--inventory", type=click.Path(path_type=Path), help="hosts.toml; else MIGRATE_INVENTORY, ~/.config, /etc."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, as --output json.")
@click.option("--output", type=click.Choice(["text", "json", "jsonl"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", count=True, help="Say more: every round.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
@click.option("--log-file", type=click.Path(path_type=Path), help="Append events as JSON records.")
@click.version_option(package_name="migrate")
@click.pass_context
def cli(
    context: click.Context,
    *,
    inventory: Path | None,
    as_json: bool,
    output: str,
    quiet: bool,
    verbose: int,
    no_progress: bool,
    color: str,
    log_file: Path | None,
) -> None:
    """Move running containers between hosts: their memory is copied while they run, connections stay open."""
    context.obj = Settings(
        inventory=inventory,
        output="json" if as_json else output,
        quiet=quiet,
        verbose=verbose,
        progress=not no_progress,
        color=color,
        log_file=log_file,
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with the exit status."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    try:
        status = cli.main(args=arguments, prog_name="migrate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return status if isinstance(status, int) else 0
