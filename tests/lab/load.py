"""Drive redis_load.py on a client host."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.host import Host, LabError

_PROGRAM = Path(__file__).with_name("redis_load.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Consecutive requests that each waited more than 2 ms."""

    at_monotonic_s: float  # when the first was due, by the client's clock
    ms: float  # the longest wait among them
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What the client saw since its last report."""

    seconds: float
    replies: int
    max_gap_ms: float
    p50_ms: float
    p99_ms: float
    late_send_ms: float  # the client's own delay: how far max_gap_ms can be trusted
    gaps: tuple[Gap, ...]
    local_port: int  # of the one connection
    prefilled_bytes: int = 0
    keys_read_back: int = 0  # at the end: every acknowledged write was there
    dirtied: dict[str, Any] | None = None  # bytes, mb_per_s, keys_read_back


class RedisLoad:
    """The load on `address` ("10.77.0.50:6379"), running and filled when the block begins.

    Leaving the block in order stops it, unless that was done. Raises: LabError: see redis_load.py.
    """

    def __init__(
        self,
        client: Host,
        address: str,
        *,
        prefill_mb: int = 0,
        value_bytes: int = 4096,
        compressible: bool = False,
        period_ms: float = 1.0,
        dirty_mb_per_s: int = 0,
        dirty_set_mb: int = 32,
    ) -> None:
        self._client = client
        self._arguments = [address, f"--prefill-mb={prefill_mb}", f"--value-bytes={value_bytes}"]
        self._arguments += [f"--period-ms={period_ms}", f"--dirty-mb-per-s={dirty_mb_per_s}"]
        self._arguments += [f"--dirty-set-mb={dirty_set_mb}", *(["--compressible"] if compressible else [])]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, str(_PROGRAM), *self._arguments]
        self._process = self._client.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if (line := self._read()) != "ready\n":
            raise LabError(f"the load did not get going: {line}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        if kind is None:
            self.stop()
            return
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return str(self._process.stdout.readline())

    def _ask(self, command: str) -> LoadReport:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, and said why before
        line = self._read()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in answer:
            raise LabError(f"the client saw a fault: {answer['error']}")
        return LoadReport(**{**answer, "gaps": tuple(Gap(**gap) for gap in answer["gaps"])})

    def report(self) -> LoadReport:
        """What was seen since the last report; the load goes on."""
        return self._ask("report")

    def stop(self, *, timeout_s: float = 60.0) -> LoadReport:
        """Stop, read all acknowledged writes back, and say what was seen since the last report."""
        assert self._process is not None
        process = self._process
        try:
            report = self._ask("stop")
        finally:
            self._process = None
            with process:
                try:
                    process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
        if process.returncode != 0:
            raise LabError(f"the load ended with {process.returncode}")
        return report
