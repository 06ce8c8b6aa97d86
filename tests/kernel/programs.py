"""Small programs under test: C compiled once a session, Python fed line by line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def compile_c(source: str, target: Path, *flags: str) -> Path:
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Werror", "-D_GNU_SOURCE", "-x", "c", "-", "-o", str(target), "-pthread", *flags],
        input=source,
        text=True,
        check=True,
    )
    return target


class Puppet:
    """A Python process that does what it is told and answers with the value of `answer`."""

    _LOOP = (
        "import ctypes, mmap, os, signal, sys, time\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for line in sys.stdin:\n"
        "    answer = None\n"
        "    exec(line)\n"
        "    print(repr(answer), flush=True)\n"
    )

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.do("answer = 1")

    def do(self, line: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return eval(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def puppet() -> Iterator[Puppet]:
    it = Puppet()
    try:
        yield it
    finally:
        it.close()


@contextlib.contextmanager
def running(*argv: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([str(part) for part in argv], **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
