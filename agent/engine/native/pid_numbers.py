"""Choosing the numbers of new threads in a container's pid namespace.

clone3's set_tid needs a capability that containers do not have, so a helper of ours inside the pid namespace writes
/proc/sys/kernel/ns_last_pid instead: the next number follows it. The helper is no member of the container's cgroup,
and takes a number far from all that are wanted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
from collections.abc import Collection
from typing import NoReturn

from agent.kernel.namespaces import Namespace, setns
from agent.kernel.process import Prctl, prctl
from agent.kernel.syscalls import syscall
from agent.kernel.unistd import SYS
from protocol.errors import KernelError, MigrateError

_LAST_PID = "/proc/sys/kernel/ns_last_pid"
_CANDIDATES = (30000, 25000, 20000, 15000, 10000, 5000)
# Threads that appear while we work mostly follow those that are there.
_DISTANCE = 1000
# struct clone_args (linux/sched.h), 11 u64: exit_signal is the fifth, set_tid and its size the ninth and tenth.
_CLONE_ARGUMENTS = struct.Struct("<11Q")
_NUMBER = struct.Struct("<i")
_TIMEOUT_S = 10.0


class PidNumbers:
    """Sets what the next number in the pid namespace of `pid` will be. Close it before the container runs.

    Raises: KernelError, MigrateError: the helper cannot be started.
    """

    def __init__(self, pid: int, avoid: Collection[int]) -> None:
        own = _far_from(avoid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._process = os.fork()
        if self._process == 0:
            _run_helper(theirs, namespace, own)
        os.close(namespace)
        theirs.close()
        ours.settimeout(_TIMEOUT_S)
        self._socket = ours
        try:
            self._answer("start a helper in the pid namespace")
        except MigrateError:
            self.close()
            raise

    def set_next(self, number: int) -> None:
        """The next thread or process of the namespace gets `number`, if it is free. Raises: KernelError."""
        self._socket.send(_NUMBER.pack(number - 1))
        self._answer(f"write {number - 1} to {_LAST_PID}")

    def _answer(self, call: str) -> None:
        data = self._socket.recv(_NUMBER.size)
        if not data:
            raise MigrateError(f"{call}: the helper is gone", code="process")
        (code,) = _NUMBER.unpack(data)
        if code:
            raise KernelError(call, code, os.strerror(code))

    def release(self) -> None:
        """Tell the helper to end, without waiting for it; idempotent."""
        self._socket.close()

    def close(self) -> None:
        """End the helper and wait for it; idempotent."""
        self.release()
        if self._process:
            os.waitpid(self._process, 0)
            self._process = 0


def _far_from(avoid: Collection[int]) -> int:
    for candidate in _CANDIDATES:
        if all(abs(candidate - number) > _DISTANCE for number in avoid):
            return candidate
    raise MigrateError("no free number for a helper in the container's pid namespace", code="pids")


def _run_helper(port: socket.socket, namespace: int, own: int) -> NoReturn:
    """In the child: make a grandchild inside the namespace, wait for it, and end. Never returns."""
    status = 1
    try:
        _keep_only(port.fileno(), namespace)
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
        setns(namespace, Namespace.PID)
        number = (ctypes.c_int * 1)(own)
        arguments = _CLONE_ARGUMENTS.pack(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1, 0)
        grandchild = syscall(SYS.clone3, arguments, _CLONE_ARGUMENTS.size, name=f"clone3(set_tid {own})")
        if grandchild == 0:
            _serve(port)
        port.close()
        os.waitpid(grandchild, 0)
        status = 0
    except KernelError as error:
        port.send(_NUMBER.pack(error.errno))
    finally:
        os._exit(status)


def _keep_only(*kept: int) -> None:
    """Nobody must find our sockets open in a helper: that they are closed is a message."""
    previous = 2
    for fd in (*sorted(kept), 1 << 20):
        os.closerange(previous + 1, fd)
        previous = fd


def _serve(port: socket.socket) -> NoReturn:
    status = 1
    try:
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
        last = os.open(_LAST_PID, os.O_WRONLY | os.O_CLOEXEC)
        port.send(_NUMBER.pack(0))
        while data := port.recv(_NUMBER.size):
            (number,) = _NUMBER.unpack(data)
            try:
                os.pwrite(last, b"%d" % number, 0)
                port.send(_NUMBER.pack(0))
            except OSError as error:
                port.send(_NUMBER.pack(error.errno or 1))
        status = 0
    except OSError as error:
        port.send(_NUMBER.pack(error.errno or 1))
    finally:
        os._exit(status)
