"""A process that does what it is told over its stdin, and system calls in it while it stands."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from agent.engine.native.remote import RemoteSyscalls
from agent.engine.native.tracee import Tracee
from agent.kernel.namespaces import in_network_namespace
from agent.kernel.types import Pid, Tid

_PROGRAM = """
import os
names = {}
while True:
    line = b''
    while not line.endswith(b'\\n'):
        more = os.read(0, 65536)
        if not more: os._exit(0)
        line += more
    try:
        code = eval(line)
        try:
            result = ('value', eval(code, names))
        except SyntaxError:
            exec(code, names); result = ('value', None)
    except BaseException as error:
        result = ('error', type(error).__name__ + ': ' + str(error))
    out = (repr(result) + '\\n').encode()
    while out: out = out[os.write(1, out):]
"""


class Puppet:
    """`run` evaluates or executes Python in the process and gives the value."""

    def __init__(self, *, namespace: str = "", program_argv: list[str] | None = None) -> None:
        argv = program_argv or [sys.executable, "-S", "-c", _PROGRAM]
        with in_network_namespace(namespace) if namespace else contextlib.nullcontext():
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        self.pid = self.process.pid
        self.run("import os, socket, select, fcntl, struct, array, time, signal")

    def run(self, code: str):
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write((repr(code) + "\n").encode())
        line = b""
        while not line.endswith(b"\n"):
            piece = self.process.stdout.read(65536)
            assert piece, f"the puppet died at {code!r}"
            line += piece
        kind, value = ast.literal_eval(line.decode())
        assert kind == "value", f"{code!r}: {value}"
        return value

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[RemoteSyscalls]:
    """The process seized and stopped; it goes on as if nothing had been."""
    tracee = Tracee(Tid(pid), Pid(pid))
    tracee.seize()
    tracee.interrupt()
    tracee.wait_stop()
    with RemoteSyscalls(tracee) as remote:
        remote.map_scratch()
        yield remote
    tracee.detach()


def links(pid: int) -> dict[int, str]:
    return {int(path.name): str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
