"""The engine process: one tracer thread, two sockets. `python -m agent.engine.native.main --side source ...`."""

from __future__ import annotations

import abc
import argparse
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from agent.engine import base
from agent.engine.native.ports import Ports, ServiceGoneError
from agent.engine.native.source_engine import SourceEngine
from agent.engine.native.target_engine import TargetEngine
from agent.ipc import Port, PortClosedError
from protocol.errors import MigrateError, family_of
from protocol.framing import Frame, FrameKind
from protocol.messages import Failure

_log = logging.getLogger("agent.engine.native")


def _failure_of(error: BaseException) -> Failure:
    if not isinstance(error, MigrateError):
        _log.error("unexpected", exc_info=error)
        text = f"the engine failed: {type(error).__name__}: {error}"
        return Failure(family=MigrateError.code, code="engine", message=text)
    return Failure(family=family_of(error), code=error.code, message=error.message, host=error.host, hint=error.hint)


class _Loop(abc.ABC):
    """Takes what comes on the two sockets, one at a time."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    def run(self) -> None:
        """Until the service closes its socket; then `end`."""
        try:
            while True:
                self._once()
        except ServiceGoneError:
            _log.info("the agent has closed; ending")
        finally:
            self.end()

    def _once(self) -> None:
        try:
            port, frame = self._ports.next_frame()
        except ServiceGoneError:
            raise
        except PortClosedError as error:
            self._ports.answer(base.EngineFailed(failure=_failure_of(error)))
            return
        handle: Callable[[Frame], None] = self.request if port is self._ports.service else self.from_stream
        try:
            handle(frame)
        except ServiceGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the engine must still be able to undo
            self._ports.answer(base.EngineFailed(failure=_failure_of(error)))

    @abc.abstractmethod
    def request(self, frame: Frame) -> None:
        """A frame of the service."""

    @abc.abstractmethod
    def from_stream(self, frame: Frame) -> None:
        """A frame of the stream that nobody was waiting for."""

    @abc.abstractmethod
    def end(self) -> None:
        """The service is gone."""


class SourceLoop(_Loop):
    """Side source."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        self._engine = SourceEngine(ports)

    def request(self, frame: Frame) -> None:
        engine = self._engine
        record = self._ports.service.parse(frame)
        answer: Any
        match record:
            case base.SourceArm():
                self._ports.answer(engine.arm(record))
                engine.rehearse()
                return
            case base.SourceRound():
                answer = engine.round(record)
            case base.SourceCutOver():
                engine.cut_over(record)
                return
            case base.SourceVerifyStop():
                answer = engine.verify_stop()
            case base.SourceThaw():
                engine.thaw()
                answer = base.EngineDone()
            case base.SourceRelease():
                engine.release()
                answer = base.EngineDone()
            case _:
                raise MigrateError(f"{type(record).__name__} is no request to a source's engine", code="process")
        self._ports.answer(answer)

    def from_stream(self, frame: Frame) -> None:
        record = self._ports.stream.parse(frame)
        if isinstance(record, base.StreamFailed):
            self._ports.answer(base.EngineFailed(failure=record.failure))

    def end(self) -> None:
        self._engine.release()


class TargetLoop(_Loop):
    """Side target."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        self._engine = TargetEngine(ports)
        self._is_done = False

    def request(self, frame: Frame) -> None:
        record = self._ports.service.parse(frame)
        answer: Any
        match record:
            case base.TargetIntercept():
                self._ports.answer(self._engine.intercept(record))
                self._engine.rehearse()
                return
            case base.TargetDiscard():
                self._engine.discard()
                answer = base.EngineDone()
            case _:
                raise MigrateError(f"{type(record).__name__} is no request to a target's engine", code="process")
        self._ports.answer(answer)

    def from_stream(self, frame: Frame) -> None:
        if frame.kind is FrameKind.SECTION:
            restored = self._engine.apply(frame.payload)
            if restored is not None:
                self._is_done = True
                self._ports.answer(restored)
            return
        record = self._ports.stream.parse(frame)
        if isinstance(record, base.StreamFailed) and not self._is_done:
            self._ports.answer(base.EngineFailed(failure=record.failure))

    def end(self) -> None:
        # A complete container is frozen and no more ours: it stays as it is, whatever becomes of the agent.
        if self._is_done:
            self._engine.close()
        else:
            self._engine.discard()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one side of one migration; returns when the agent closes its socket."""
    parser = argparse.ArgumentParser(prog="agent.engine.native.main", description=__doc__)
    parser.add_argument("--side", choices=["source", "target"], required=True)
    parser.add_argument("--service-fd", type=int, required=True)
    parser.add_argument("--stream-fd", type=int, required=True)
    parser.add_argument("--log-level", default="warning")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr,
        format=f"%(asctime)s {options.side} engine %(levelname)s %(message)s",
    )  # fmt: skip
    is_source = options.side == "source"
    ports = Ports(
        Port(
            socket.socket(fileno=options.service_fd), base.ToSourceEngine if is_source else base.ToTargetEngine, "agent"
        ),
        Port(socket.socket(fileno=options.stream_fd), base.StreamToEngine, "stream"),
    )
    loop = SourceLoop(ports) if is_source else TargetLoop(ports)
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
