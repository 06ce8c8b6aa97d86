"""Fetch the key that a host shows; whether to trust it is for a person to say. Runs in the bridge's thread."""

from __future__ import annotations

import asyncio

import asyncssh

from migrate.session import reason_of
from protocol.errors import PeerError

FETCH_S = 10.0


async def fetch(name: str, address: str, port: int) -> tuple[str, str]:
    """(the key in OpenSSH format, its fingerprint).

    Raises: PeerError: not reached, or it shows none.
    """
    try:
        key = await asyncio.wait_for(
            asyncssh.get_server_host_key(address, port, server_host_key_algs=["ssh-ed25519"], config=None), FETCH_S
        )
    except (asyncssh.KeyExchangeFailed, asyncssh.ProtocolNotSupported):
        key = await _any_key(name, address, port)
    except (asyncssh.Error, OSError) as error:
        raise PeerError(f"cannot reach {address}:{port}: {reason_of(error)}", host=name) from error
    if key is None:
        raise PeerError(f"{address}:{port} shows no host key", code="host-key", host=name)
    return key.export_public_key("openssh").decode().strip(), key.get_fingerprint()


async def _any_key(name: str, address: str, port: int) -> asyncssh.SSHKey | None:
    try:
        return await asyncio.wait_for(asyncssh.get_server_host_key(address, port, config=None), FETCH_S)
    except (asyncssh.Error, OSError) as error:
        raise PeerError(f"cannot reach {address}:{port}: {reason_of(error)}", host=name) from error
