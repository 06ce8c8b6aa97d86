"""What a person asked for: one frozen record, and the parsers of its durations and rates."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from protocol.messages import Refusal

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?|bit|b/s|bit/s)", re.IGNORECASE)
_PREFIXES = "kmgt"


class Strategy(enum.Enum):
    """How the memory gets there."""

    AUTO = "auto"  # pre-copy, as long as it is the only live one
    PRE_COPY = "pre-copy"
    POST_COPY = "post-copy"
    STOP_COPY = "stop-copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequest:
    """One migration, as asked for. Times in seconds, rates in bytes per second."""

    container: str
    target: str
    source: str | None = None  # None: ask the hosts of the inventory who runs it
    new_name: str | None = None  # None: keep the name
    strategy: Strategy = Strategy.AUTO
    max_downtime_s: float = 0.3
    max_rounds: int = 30
    timeout_s: float = 600.0
    bandwidth: int = 0  # 0: unlimited
    streams: int = 1
    compress: str = "auto"
    engine: str = "auto"
    storage: str = "auto"
    network: str = "keep"
    tcp: str = "keep"
    tunnel: bool = False
    freeze_budget_s: float | None = None  # None: 2 s; stop-copy, which copies all in the freeze: the timeout

    @property
    def target_name(self) -> str:
        """The container's name at the target."""
        return self.new_name or self.container

    @property
    def is_live(self) -> bool:
        """Whether memory is copied while the container runs."""
        return self.strategy is not Strategy.STOP_COPY

    @property
    def storage_on_wire(self) -> str:
        """The storage mode that the agents are told. `auto` carries no files, and relies on VerifyFiles."""
        return "none" if self.storage == "auto" else self.storage

    @property
    def effective_freeze_budget_s(self) -> float:
        """How long the container may stand before it is thawed again."""
        if self.freeze_budget_s is not None:
            return self.freeze_budget_s
        return 2.0 if self.is_live else self.timeout_s


def not_carried(request: MigrationRequest) -> list[Refusal]:
    """What the request asks for and this version does not do yet."""
    wishes = [
        (request.strategy is Strategy.POST_COPY, "post-copy", "--strategy post-copy", "use --strategy pre-copy"),
        (request.engine == "criu", "engine-criu", "--engine criu", "use --engine native"),
        (
            request.storage == "sync",
            "storage-sync",
            "--storage sync",
            "copy bundle and volumes yourself and use --storage none, or use --storage shared where they are shared",
        ),
        (request.tunnel, "tunnel", "--tunnel", "let the source reach the target's data_ports"),
        (request.streams > 1, "streams", f"--streams {request.streams}", "use one stream"),
    ]
    return [
        Refusal(code=code, message=f"{option} is not carried yet", hint=hint)
        for asked, code, option, hint in wishes
        if asked
    ]


def parse_duration(text: str) -> float:
    """Seconds from '300ms', '2s', '10m', '1.5h'; a bare number is seconds.

    Raises: ValueError: another form.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: 300ms, 2s, 10m, 1h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def parse_rate(text: str) -> int:
    """Bytes per second from '0', '50M', '64MiB', '1gbit' (bits, as tc writes them).

    Raises: ValueError: another form.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a rate: 50M, 64MiB, 1gbit")
    power = _PREFIXES.index(match[2].lower()) + 1 if match[2] else 0
    size = float(match[1]) * (1024 if match[3] else 1000) ** power
    return int(size / 8 if match[4].lower().startswith("bit") else size)
