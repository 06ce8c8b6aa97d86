"""The asyncio side of a link: one SSH connection, one channel, one sans-IO protocol connection.

Everything here runs in the bridge's thread. A request is one coroutine; its answer wakes one future.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import asyncssh

from migrate.errors import LinkLostError, error_from_failure
from migrate.inventory import Host
from protocol import messages
from protocol.connection import NEED_DATA, Connection, ConnectionClosed, Role
from protocol.errors import PeerError, ProtocolError, RemoteProtocolError, UsageError

SUBSYSTEM = "migrate-agent"
AGENTLESS_COMMAND = "migrate-agent --stdio"
CONNECT_S = 10.0  # TCP, key exchange and authentication together, on a host that is short of CPU.
HELLO_S = 20.0  # An agentless agent starts a Python first.
KEEPALIVE_S = 5.0
KEEPALIVE_COUNT = 3
MAX_STDERR_BYTES = 4096  # Enough for 'command not found'; the rest is in the agent's own log.


class _Client(asyncssh.SSHClient):
    """Keeps the host key that was presented, so that an error can name it."""

    presented: asyncssh.SSHKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002
        """Called for a key that is not trusted."""
        self.presented = key
        return False


class AgentSession(asyncssh.SSHClientSession[bytes]):
    """A conversation with one agent. `connect` first; `abort` may be called at any time."""

    def __init__(self, host: Host, on_progress: Callable[[messages.Progress], None]) -> None:
        self._host = host
        self._on_progress = on_progress
        self._protocol = Connection(Role.COORDINATOR)
        self._waiting: dict[int, asyncio.Future[messages.ReplyBody]] = {}
        self._ssh: asyncssh.SSHClientConnection | None = None
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._stderr = bytearray()
        self._lost: LinkLostError | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ called through the bridge

    async def connect(self, hello: messages.Hello) -> messages.Welcome:
        """Connect, authenticate, start the agent's session, greet.

        Raises: PeerError: unreachable, another host key, refused; UsageError: the identity file is of no use.
        """
        host = self._host
        client = _Client()
        try:
            self._ssh = await asyncio.wait_for(self._open(client), CONNECT_S)
        except asyncssh.HostKeyNotVerifiable as error:
            raise _host_key_error(host, client.presented, error) from error
        except asyncssh.PermissionDenied as error:
            raise PeerError(
                f"{host.user}@{host.address}:{host.ssh_port} refuses our key: {error.reason}",
                code="permission-denied",
                host=host.name,
                hint="put the public key of the inventory's identity into the authorized_keys of the "
                + ("host" if host.agentless else "agent"),
            ) from error
        except asyncssh.KeyExchangeFailed as error:
            raise PeerError(
                f"{host.address}:{host.ssh_port}: no common key exchange, perhaps no key of the kind we know it by: "
                f"{error.reason}",
                code="host-key",
                host=host.name,
                hint=f"compare its host keys; if it was installed anew: migrate hosts trust {host.name}",
            ) from error
        except (asyncssh.Error, OSError) as error:
            raise PeerError(
                f"cannot reach {host.address}:{host.ssh_port}: {reason_of(error)}",
                host=host.name,
                hint="is the host up and sshd running?" if host.agentless else "is the agent running?",
            ) from error
        await self._start_agent(self._ssh)
        try:
            reply = await asyncio.wait_for(self.request(hello), HELLO_S)
        except TimeoutError as error:
            raise PeerError(f"no greeting within {HELLO_S:.0f} s", code="no-agent", host=host.name) from error
        assert isinstance(reply, messages.Welcome)
        return reply

    async def request(self, body: messages.RequestBody) -> messages.ReplyBody:
        """Ask, and wait for the answer, however long it takes.

        Raises: the error that the agent reported, rebuilt; LinkLostError: the link ended first.
        """
        if self._lost is not None:
            raise self._lost
        assert self._channel is not None
        number = self._protocol.next_number
        data = self._protocol.send(messages.Request(number=number, body=body))
        future: asyncio.Future[messages.ReplyBody] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._channel.write(data)
            reply = await future
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, messages.Failure):
            raise error_from_failure(reply, self._host.name)
        return reply

    async def close(self) -> None:
        """End the session in order."""
        if self._channel is not None:
            self._channel.close()
        if self._ssh is not None:
            self._ssh.close()
            await self._ssh.wait_closed()

    def abort(self) -> None:
        """Drop the transport now, without a word to the other side."""
        self._lose(LinkLostError("the connection was aborted by us", code="aborted", host=self._host.name))
        if self._ssh is not None:
            self._ssh.abort()

    # ------------------------------------------------------------ called by asyncssh

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """The channel is open."""
        self._channel = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        """Bytes of the agent, or of its standard error."""
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._stderr += data[: MAX_STDERR_BYTES - len(self._stderr)]
            return
        self._protocol.receive_data(data)
        self._pump()

    def eof_received(self) -> bool:
        """The agent says no more."""
        self._protocol.receive_data(b"")
        self._pump()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is gone."""
        said = self._stderr.decode(errors="replace").strip()
        reason = f": {reason_of(exc)}" if exc else ""
        self._lose(
            LinkLostError(
                f"the connection to the agent ended{reason}" + (f"; it said: {said}" if said else ""),
                code="link-lost",
                host=self._host.name,
            )
        )

    # ------------------------------------------------------------ inside

    async def _open(self, client: _Client) -> asyncssh.SSHClientConnection:
        host = self._host
        return await asyncssh.connect(
            host.address,
            host.ssh_port,
            username=host.user,
            client_factory=lambda: client,
            client_keys=[_read_key(host)] if host.identity else (),
            agent_path=None if host.identity else (),
            known_hosts=_known_hosts(host),
            config=None,
            keepalive_interval=KEEPALIVE_S,
            keepalive_count_max=KEEPALIVE_COUNT,
            connect_timeout=CONNECT_S,
            login_timeout=CONNECT_S,
        )

    async def _start_agent(self, ssh: asyncssh.SSHClientConnection) -> None:
        try:
            if self._host.agentless:
                await ssh.create_session(lambda: self, AGENTLESS_COMMAND, encoding=None)
            else:
                await ssh.create_session(lambda: self, subsystem=SUBSYSTEM, encoding=None)
        except (asyncssh.Error, OSError) as error:
            raise PeerError(
                f"{self._host.address}:{self._host.ssh_port} starts no agent: {reason_of(error)}",
                code="no-agent",
                host=self._host.name,
                hint="is migrate-agent installed there?"
                if self._host.agentless
                else "does the port belong to an agent?",
            ) from error

    def _pump(self) -> None:
        """Act on every event that the protocol has, then set the timer anew."""
        try:
            while (event := self._protocol.next_event()) is not NEED_DATA:
                match event:
                    case messages.Reply(number=number, body=body):
                        future = self._waiting.get(number)
                        if future is not None and not future.done():
                            future.set_result(body)
                    case messages.Notice(body=body):
                        self._on_progress(body)
                    case ConnectionClosed():
                        return  # connection_lost follows, and knows why
                    case messages.Request():
                        raise RemoteProtocolError("an agent asks nothing")  # the protocol refused it before
            if pongs := self._protocol.data_to_send():
                self._write(pongs)
        except ProtocolError as error:
            self._break(error)
            return
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._protocol.next_deadline(time.monotonic())
        if due is not None and self._lost is None:
            delay_s = max(0.0, due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._quiet_too_long)

    def _quiet_too_long(self) -> None:
        try:
            self._write(self._protocol.handle_timeout(time.monotonic()))
        except ProtocolError as error:
            self._break(error)
            return
        self._set_timer()

    def _write(self, data: bytes) -> None:
        if data and self._channel is not None and not self._channel.is_closing():
            self._channel.write(data)

    def _break(self, error: ProtocolError) -> None:
        self._lose(LinkLostError(f"the agent broke the protocol: {error}", code="protocol", host=self._host.name))
        if self._ssh is not None:
            self._ssh.abort()

    def _lose(self, error: LinkLostError) -> None:
        if self._lost is not None:
            return
        self._lost = error
        if self._timer is not None:
            self._timer.cancel()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


def _read_key(host: Host) -> asyncssh.SSHKey:
    assert host.identity is not None
    try:
        return asyncssh.read_private_key(host.identity)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError, OSError) as error:
        raise UsageError(
            f"identity {host.identity} of host {host.name}: {reason_of(error)}",
            code="identity",
            hint="for a key with a passphrase leave identity out and load it into ssh-agent",
        ) from error


def _known_hosts(host: Host) -> object:
    """What asyncssh takes as known_hosts: never None, which would trust any host."""
    if host.known_hosts is not None:
        try:
            return asyncssh.read_known_hosts(str(host.known_hosts))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"known_hosts {host.known_hosts} of host {host.name}: {reason_of(error)}", code="known-hosts"
            ) from error
    try:
        key = asyncssh.import_public_key(host.host_key)
    except asyncssh.KeyImportError as error:
        raise UsageError(f"host_key of host {host.name}: {error}", code="host-key-format") from error
    return ([key], [], [])


def _host_key_error(host: Host, presented: asyncssh.SSHKey | None, error: asyncssh.Error) -> PeerError:
    expected = f"the host key of {host.known_hosts}"
    if host.host_key:
        expected = asyncssh.import_public_key(host.host_key).get_fingerprint()
    got = presented.get_fingerprint() if presented is not None else f"none of it ({error.reason})"
    return PeerError(
        f"{host.address}:{host.ssh_port} has another host key: expected {expected}, got {got}",
        code="host-key",
        host=host.name,
        hint=f"if the host was installed anew: migrate hosts trust {host.name}",
    )


def reason_of(error: Exception) -> str:
    """What went wrong with a connection, in words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, asyncssh.Error):
        return error.reason or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # asyncio's own text says only what was called
    return str(error) or type(error).__name__
