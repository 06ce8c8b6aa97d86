"""How coordinators reach the service: the agent's own SSH listener, or the stdin and stdout of `--stdio`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import asyncssh

from agent import reclaim
from agent.host import Host
from agent.service import ROLES, SUBSYSTEM, Service, Session
from agent.settings import Settings
from protocol.errors import MigrateError, UsageError

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
# asyncssh sends no keepalives unless told to; without them a pulled link hangs for good.
_KEEPALIVE_S = 5


async def serve(host: Host) -> None:
    """Listen until cancelled. Raises: UsageError: keys or address cannot be used."""
    service = Service(host)
    await _settle(host)
    settings = host.settings
    address, port = settings.listen_address
    _check_keys(settings)

    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        await _serve_process(service, process)

    try:
        listener = await asyncssh.listen(
            address, port, server_host_keys=[settings.host_key], authorized_client_keys=settings.authorized_keys,
            process_factory=handle, encoding=None, line_editor=False, password_auth=False, kbdint_auth=False,
            public_key_auth=True, gss_host=None, allow_scp=False, agent_forwarding=False, x11_forwarding=False,
            keepalive_interval=_KEEPALIVE_S, keepalive_count_max=3, compression_algs=["none"], login_timeout=15,
        )  # fmt: skip
    except (OSError, asyncssh.Error, ValueError) as error:
        raise UsageError(f"cannot listen on {address}:{port}: {error}") from error
    _log.info("listening on %s:%d as %s", address, port, host.name)
    async with listener:
        try:
            await listener.wait_closed()
        finally:
            listener.close()  # nothing new is begun while the rest is undone
            await service.shut_down()


def _check_keys(settings: Settings) -> None:
    for key, path, hint in (
        ("host_key", settings.host_key, f"make one: ssh-keygen -t ed25519 -N '' -f {settings.host_key}"),
        ("authorized_keys", settings.authorized_keys, "as for sshd: the public keys of those who may move containers"),
    ):
        if not Path(path).is_file():
            raise UsageError(f"{key} = {path!r} is not there", hint=hint)


async def _settle(host: Host) -> None:
    for line in await reclaim.settle_at_start(host):
        _log.warning("%s", line)


async def _serve_process(service: Service, process: asyncssh.SSHServerProcess[bytes]) -> None:
    if process.subsystem != SUBSYSTEM and process.command != f"{SUBSYSTEM} --stdio":
        process.stderr.write(f"this is a migrate-agent: the only subsystem is {SUBSYSTEM}\n".encode())
        process.exit(1)
        return
    connection = process.get_extra_info("connection")
    # asyncssh gives every value that the option was written with; one without a value is True.
    given = connection.get_key_option("migrate-role", ["operate"])
    role = str(given[0]) if isinstance(given, list) and len(given) == 1 else str(given)
    if role not in ROLES:
        process.stderr.write(f"migrate-role={role!r} of this key is none of {', '.join(ROLES)}\n".encode())
        process.exit(1)
        return
    # None when the connection was lost meanwhile.
    address = str((process.get_extra_info("peername") or ("unknown",))[0])
    session = Session(
        service, write=process.stdout.write, role=role, peer=f"{connection.get_extra_info('username')}@{address}",
        peer_address=address,
    )  # fmt: skip
    try:
        await session.run(lambda: process.stdin.read(_READ_BYTES))
    except (asyncssh.Error, OSError) as error:
        _log.info("%s: %s", address, error)
    finally:
        process.exit(0)


async def serve_stdio(host: Host) -> None:
    """One session over stdin and stdout, for `ssh HOST migrate-agent --stdio`; ends with it."""
    service = Service(host)
    await _settle(host)
    loop = asyncio.get_running_loop()
    # Whatever prints by accident must not reach the wire.
    wire_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, wire_out)
    client: Any = os.environ.get("SSH_CONNECTION", "local").split()[0]
    session = Session(service, write=transport.write, role="operate", peer=client, peer_address=client)
    try:
        await session.run(lambda: reader.read(_READ_BYTES))
        for migration in list(service.migrations.values()):
            try:
                await migration.finish()
            except MigrateError as error:
                _log.warning("%s: %s", migration.id, error)
    finally:
        await service.shut_down()
        transport.close()
