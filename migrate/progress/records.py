"""Events as records: JSON lines for programs, a log file for later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TextIO

import msgspec

from migrate.events import Event, Transfer


def event_name(event: Event) -> str:
    """'round-ended' for RoundEnded."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(event).__name__).lower()


class JsonLines:
    """One JSON object a line, with its kind in `event`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        """Write it."""
        fields = msgspec.to_builtins(event, str_keys=True, enc_hook=str)
        line = msgspec.json.encode({"event": event_name(event), **fields}).decode()
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream is the caller's."""


class LogFile:
    """One JSON record per change of state, with the time; progress within a phase is left out."""

    def __init__(self, path: Path) -> None:
        import structlog  # 130 ms, for those who asked for a log

        self._file = path.open("a", encoding="utf-8")
        self._log = structlog.wrap_logger(
            structlog.WriteLogger(self._file),
            processors=[structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer()],
        )

    def __call__(self, event: Event) -> None:
        """Write it, unless it is progress only."""
        if isinstance(event, Transfer):
            return
        fields = msgspec.to_builtins(event, str_keys=True, enc_hook=str)
        self._log.msg(event_name(event), **fields)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
