"""Two engine processes and the streams between them: a migration without agents, in one test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from agent import ipc
from agent.engine import base
from agent.kernel.freezer import Freezer
from tests.survival.bundle import Container
from tests.survival.pipe import StreamPipe

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 30.0


class EngineError(AssertionError):
    """An engine answered EngineFailed."""

    def __init__(self, failure: Any) -> None:
        super().__init__(f"{failure.code}: {failure.message} ({failure.hint})")
        self.failure = failure


class Engine:
    """One engine process."""

    def __init__(self, side: str) -> None:
        heard = base.FromSourceEngine if side == "source" else base.FromTargetEngine
        ours, service = ipc.make_pair()
        stream_end, stream = ipc.make_pair()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "agent.engine.native.main", "--side", side, "--service-fd", str(service.fileno()),
                "--stream-fd", str(stream.fileno()), "--log-level", "info",
            ],
            pass_fds=[service.fileno(), stream.fileno()], cwd=ROOT,
        )  # fmt: skip
        service.close()
        stream.close()
        self.port = ipc.Port(ours, heard, f"{side} engine")
        self.stream = ipc.Port(stream_end, base.EngineToStream, f"{side} engine's stream")

    def hear(self) -> Any:
        record = self.port.parse(self.port.receive(_TIMEOUT_S))
        if isinstance(record, base.EngineFailed):
            raise EngineError(record.failure)
        return record

    def ask(self, request: Any) -> Any:
        self.port.send(request)
        return self.hear()

    def close(self) -> None:
        self.port.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class Migration:
    """A container on its way from `source`, which runs, to `target`, which is not created yet."""

    def __init__(self, source: Container, target: Container) -> None:
        self.source = source
        self.target = target
        self.source_pid = source.pid
        target.create()
        self.target_pid = target.pid
        self.engines = {side: Engine(side) for side in ("source", "target")}
        self.pipe = StreamPipe(self.engines["source"].stream, self.engines["target"].stream)
        self.pipe.start()
        self.restored: base.TargetRestored
        self.downtime_ms = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.close()
        self.pipe.join(5)

    def prepare(self) -> base.SourceArmed:
        intercepted = self.engines["target"].ask(
            base.TargetIntercept(pid=self.target_pid, start_argv=self.target.start_argv)
        )
        assert isinstance(intercepted, base.TargetIntercepted)
        armed = self.engines["source"].ask(base.SourceArm(pid=self.source_pid, track=True))
        assert isinstance(armed, base.SourceArmed)
        return armed

    def round(self, number: int) -> Any:
        return self._watched(lambda: self.engines["source"].ask(base.SourceRound(round=number)).report)

    def cut_over(self, budget_s: float = 5.0) -> base.SourceDumped:
        """Up to the point where the container is whole at both ends and runs at neither."""

        def run() -> base.SourceDumped:
            frozen = self.engines["source"].ask(base.SourceCutOver(freeze_budget_s=budget_s, cut=[]))
            assert isinstance(frozen, base.SourceFrozen)
            dumped = self.engines["source"].hear()
            assert isinstance(dumped, base.SourceDumped)
            Freezer.of(self.source_pid).freeze()
            self.restored = self.engines["target"].hear()
            assert isinstance(self.restored, base.TargetRestored)
            self.downtime_ms = (time.monotonic_ns() - frozen.monotonic_ns) / 1e6
            return dumped

        dumped: base.SourceDumped = self._watched(run)
        return dumped

    def _watched(self, run: Any) -> Any:
        try:
            return run()
        except (EngineError, TimeoutError) as error:
            if self.pipe.error is not None:
                raise AssertionError(f"the pipe: {self.pipe.error!r}") from self.pipe.error
            target = self.engines["target"].port
            target.socket.settimeout(1)
            try:
                if target.has_frame() or target._read():
                    raise AssertionError(f"the target says {target.parse(target.receive(1))}; {error}") from error
            except (BlockingIOError, TimeoutError):
                pass
            if self.pipe.error is not None:
                raise AssertionError(f"the pipe: {self.pipe.error!r}") from self.pipe.error
            raise

    def commit(self) -> None:
        """The target runs, the source's copy is killed without another instruction."""
        unbroken = self.engines["source"].ask(base.SourceVerifyStop())
        assert unbroken.unbroken, unbroken.detail
        Freezer.of(self.target_pid).thaw()
        freezer = Freezer.of(self.source_pid)
        os.kill(self.source_pid, 9)
        freezer.thaw()
        self.engines["source"].ask(base.SourceRelease())

    def roll_back(self) -> None:
        """The source runs on, the target is gone."""
        self.engines["source"].ask(base.SourceThaw())
        Freezer.of(self.source_pid).thaw()
        self.engines["target"].ask(base.TargetDiscard())

    def move(self, rounds: int = 2) -> base.SourceDumped:
        """All of it."""
        self.prepare()
        for number in range(rounds):
            self.round(number)
        dumped = self.cut_over()
        self.commit()
        return dumped
