"""An engine's two sockets, waited for together: whoever waits for the stream still hears the service."""

from __future__ import annotations

import select
import time
from typing import Any, TypeVar

from agent.engine import base
from agent.ipc import Port, PortClosedError
from protocol.errors import AbortedError, MigrateError, error_from_wire
from protocol.framing import Frame, FrameKind
from protocol.messages import Failure

R = TypeVar("R")


def raise_failure(failure: Failure) -> MigrateError:
    """An error that another process reported, to be raised."""
    return error_from_wire(
        family=failure.family, code=failure.code, message=failure.message, host=failure.host, hint=failure.hint
    )


class ServiceGoneError(PortClosedError):
    """The service has closed its socket: undo everything and end."""


class Ports:
    """The socket to the service and the one to the stream process."""

    def __init__(self, service: Port, stream: Port) -> None:
        self.service = service
        self.stream = stream
        self.stream_is_gone = False
        self._poll = select.poll()
        for port in (service, stream):
            self._poll.register(port.fileno(), select.POLLIN)

    def next_frame(self) -> tuple[Port, Frame]:
        """The next frame of either; the service's first.

        Raises: ServiceGoneError. PortClosedError: the stream process is gone (raised once).
        """
        while True:
            ready = self._ready(timeout_s=None)
            if self.service in ready:
                return self.service, self._take_service()
            if self.stream in ready:
                return self.stream, self._take_stream()

    def wait_stream(self, record_type: type[R], timeout_s: float) -> R:
        """The stream's next record, which must be a `record_type`.

        Raises: ServiceGoneError. AbortedError: the service asks for something else now. MigrateError: the stream
        reports a failure, or is gone, or says nothing in `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise MigrateError(f"the stream has not answered in {timeout_s:.0f} s", code="stream-timeout")
            ready = self._ready(timeout_s=left_s)
            if self.stream in ready:
                record = self.stream.parse(self._take_stream())
                if isinstance(record, base.StreamFailed):
                    raise raise_failure(record.failure)
                if isinstance(record, record_type):
                    return record
                raise MigrateError(f"the stream sent {type(record).__name__} out of turn", code="process")
            if self.service in ready:
                self._raise_if_service_closed()
                raise AbortedError("ended by the agent while it ran")

    def has_service_frame(self) -> bool:
        """Whether the service wants something now; a closed socket counts."""
        return self.service in self._ready(timeout_s=0)

    def _ready(self, timeout_s: float | None) -> list[Port]:
        ready = [port for port in (self.service, self.stream) if port.has_frame()]
        if ready:
            return ready
        events = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        fds = {fd for fd, _ in events}
        return [port for port in (self.service, self.stream) if port.fileno() in fds]

    def _take_service(self) -> Frame:
        try:
            return self.service.receive()
        except PortClosedError as error:
            raise ServiceGoneError(error.message) from error

    def _raise_if_service_closed(self) -> None:
        """Look at the service's next frame without taking it away."""
        if not self.service.has_frame():
            try:
                self.service._read()
            except PortClosedError as error:
                raise ServiceGoneError(error.message) from error

    def _take_stream(self) -> Frame:
        try:
            return self.stream.receive()
        except PortClosedError:
            self._poll.unregister(self.stream.fileno())
            self.stream_is_gone = True
            raise

    def send_section(self, payload: bytes) -> None:
        """To the other engine. Raises: PortClosedError."""
        self.stream.send_frame(FrameKind.SECTION, payload)

    def answer(self, record: Any) -> None:
        """To the service. Raises: ServiceGoneError."""
        try:
            self.service.send(record)
        except PortClosedError as error:
            raise ServiceGoneError(error.message) from error
