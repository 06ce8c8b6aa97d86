"""Hosts as threads: each has a network and a mount namespace of its own, which end with it.

What runs in `Host.run` and `Host.sh`, the agent's functions and programs alike, sees only that host.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from agent.network.inspect import inspect_network
from agent.network.namespaces import inside, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.messages import Network

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_P = ParamSpec("_P")
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def _enter() -> None:
    for result in (
        _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET),
        _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        _libc.mount(b"run", b"/run", b"tmpfs", 0, None),
    ):
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Host:
    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_enter)
        self.tid = self.run(threading.get_native_id)
        self.processes: list[subprocess.Popen[str]] = []
        self.sh("ip link set lo up")

    def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._thread.submit(work, *args, **kwargs).result()

    def sh(self, command: str) -> str:
        return self.run(_run, shlex.split(command))

    def open(self, kind: int, family: int = socket.AF_INET) -> socket.socket:
        return self.run(open_inside, self.tid, kind, None, family)

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a program that says one line when it is ready, and wait for that line."""
        process = self.run(_start, shlex.split(command))
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), command
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._thread.shutdown()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)


def open_inside(pid: int, kind: int, address: tuple[str, int] | None, family: int = socket.AF_INET) -> socket.socket:
    """A socket of the namespace of `pid`: it belongs there whoever uses it."""
    with inside(namespace_of(pid)):
        made = socket.socket(family, kind)
        made.settimeout(5.0)
        if address is not None:
            made.bind(address)
        if kind == socket.SOCK_STREAM and address is not None:
            made.listen()
        return made


class Container:
    """A process in a network namespace of its own, with eth0 on br0 of its host."""

    def __init__(self, host: Host, *, port: str = "veth1", plugged: bool = True) -> None:
        self.host = host
        self.pid = host.start("unshare --net sh -c 'echo ready; exec sleep 600'").pid
        if not plugged:
            return
        host.sh(f"ip link add {port} type veth peer name eth0 address 02:00:00:00:00:50 netns {self.pid}")
        host.sh(f"ip link set {port} master br0 up")
        self.sh("ip link set lo up")
        self.sh("ip address add 10.77.0.50/24 dev eth0")
        self.sh("ip -6 address add fd77::50/64 dev eth0 nodad")
        self.sh("ip link set eth0 up")

    def sh(self, command: str) -> str:
        return self.host.sh(f"nsenter --net=/proc/{self.pid}/ns/net -- {command}")

    def open(self, kind: int, port: int) -> socket.socket:
        return self.host.run(open_inside, self.pid, kind, ("10.77.0.50", port))

    def network(self) -> Network:
        inspection = self.host.run(inspect_network, self.pid, "br0")
        assert inspection.refusals == []
        return inspection.network


class Lan:
    """Two hosts with a bridge br0 each, joined by a third bridge, on which a client sits."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self.switch = self._host("switch")
        self.switch.sh("ip link add lan type bridge")
        self.switch.sh("ip link set lan up")
        self.one, self.two = self._bridged("one", 11), self._bridged("two", 12)
        self.client = self._host("client")
        self._wire(self.client, "eth0")
        self.client.sh("ip address add 10.77.0.9/24 dev eth0")
        self.client.sh("ip -6 address add fd77::9/64 dev eth0 nodad")
        self.client.sh("ip link set eth0 up")

    def close(self) -> None:
        for host in reversed(self.hosts):
            host.close()

    def _host(self, name: str) -> Host:
        host = Host(name)
        self.hosts.append(host)
        return host

    def _wire(self, host: Host, device: str) -> None:
        self.switch.sh(f"ip link add to-{host.name} type veth peer name {device} netns {host.tid}")
        self.switch.sh(f"ip link set to-{host.name} master lan up")

    def _bridged(self, name: str, number: int) -> Host:
        host = self._host(name)
        self._wire(host, "uplink")
        host.sh("ip link add br0 type bridge")
        host.sh("ip link set uplink master br0 up")
        host.sh(f"ip address add 10.77.0.{number}/24 dev br0")
        host.sh("ip link set br0 up")
        return host
