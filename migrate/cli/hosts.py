"""`migrate hosts`: list, add, trust, remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrate.cli.settings import SCHEMA, Settings, command, output_options, run_async

if TYPE_CHECKING:
    from migrate.bridge import Bridge
    from migrate.inventory import Host


@click.group()
def hosts() -> None:
    """List and edit the hosts of the inventory."""


@hosts.command(name="list")
@output_options
@command
def list_hosts(settings: Settings, /) -> int:
    """List the hosts."""
    from migrate.report.text import table

    inventory = settings.load_inventory()
    if settings.is_json:
        settings.print_json(
            {"schema": SCHEMA, "inventory": str(inventory.path), "hosts": list(map(_as_json, inventory.hosts.values()))}
        )
        return 0
    rows = [
        [host.name, host.address, str(host.ssh_port), "sshd" if host.agentless else "agent", host.user, _known_by(host)]
        for host in inventory.hosts.values()
    ]
    settings.print(table(["NAME", "ADDRESS", "PORT", "BY", "USER", "KNOWN BY"], rows))
    return 0


@hosts.command()
@click.argument("name")
@click.option("--address", required=True, help="IP address or DNS name; the source's agent reaches it by this too.")
@click.option("--port", type=click.IntRange(1, 65535), help="The agent's port; left out: over sshd, port 22.")
@click.option("--user", help="User to log in as.")
@click.option("--identity", help="Private key file.")
@click.option("--host-key", help="'ssh-ed25519 AAAA...'; left out: it is fetched and shown.")
@click.option("--known-hosts", help="A known_hosts file instead of a host key.")
@click.option("--yes", is_flag=True, help="Trust the key that the host shows, unseen.")
@output_options
@command
def add(settings: Settings, /, *, name: str, yes: bool, **values: str | int | None) -> int:
    """Add a host to the inventory."""
    from migrate.inventory import SSH_PORT
    from migrate.inventory_edit import add_host

    given = {key: value for key, value in values.items() if value is not None}
    if "host_key" not in given and "known_hosts" not in given:
        port = given.get("port", SSH_PORT)
        given["host_key"] = _fetch_and_ask(name, str(given["address"]), int(port), yes=yes)
    add_host(settings.inventory_path, name, given)
    return _say(settings, f"{name} added to {settings.inventory_path}", name)


@hosts.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
@command
def trust(settings: Settings, /, *, name: str, yes: bool) -> int:
    """Fetch a host's key, show its fingerprint, and write it into the inventory."""
    from migrate.inventory import reach
    from migrate.inventory_edit import set_host_key

    path: Path = settings.inventory_path
    address, port = reach(path, name)
    set_host_key(path, name, _fetch_and_ask(name, address, port, yes=yes))
    return _say(settings, f"the key of {name} is in {path}", name)


@hosts.command()
@click.argument("name")
@output_options
@command
def remove(settings: Settings, /, *, name: str) -> int:
    """Take a host out of the inventory."""
    from migrate.inventory_edit import remove_host

    remove_host(settings.inventory_path, name)
    return _say(settings, f"{name} removed from {settings.inventory_path}", name)


def _fetch_and_ask(name: str, address: str, port: int, *, yes: bool) -> str:
    """The key that the host shows, if a person (or --yes) says that it is the right one."""
    from migrate.host_key import fetch

    async def ask(bridge: Bridge) -> tuple[str, str]:
        return await bridge.run(fetch, name, address, port)

    key, fingerprint = run_async(ask)
    click.echo(f"{name} ({address}:{port}) shows the host key {key.split()[0]} {fingerprint}", err=True)
    if not yes:
        click.confirm("Is that the host's own key?", abort=True, err=True)
    return key


def _say(settings: Settings, text: str, name: str) -> int:
    if settings.is_json:
        settings.print_json({"schema": SCHEMA, "host": name, "inventory": str(settings.inventory_path)})
    else:
        settings.print(text)
    return 0


def _known_by(host: Host) -> str:
    return f"known_hosts {host.known_hosts}" if host.known_hosts else " ".join(host.host_key.split()[:1])


def _as_json(host: Host) -> dict[str, object]:
    return {
        "name": host.name,
        "address": host.address,
        "port": host.ssh_port,
        "agentless": host.agentless,
        "user": host.user,
        "identity": str(host.identity or ""),
        "host_key": host.host_key,
        "known_hosts": str(host.known_hosts or ""),
    }
