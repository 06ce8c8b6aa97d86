"""What the agent says to an engine process and hears from it, and what engine and stream say to each other.

One engine process serves one side of one migration. It is started with two sockets (agent.ipc): to the service and
to the stream process. A request has one answer, in order; `EngineFailed` may stand for any answer. When the socket
to the service closes, the engine undoes what it holds (source: registers back, network attached, sockets out of
repair mode, detach; target: the tasks die by EXITKILL) and exits.
"""

from __future__ import annotations

from protocol.messages import Count, Failure, Interface, Message, Record, RoundReport, Text

# ---------------------------------------------------------------- service to the source's engine


class SourceArm(Message, frozen=True, kw_only=True):
    """Seize the container's processes for a moment and arm the tracker. Answer: SourceArmed."""

    pid: Count  # host pid of the container's init
    track: bool
    tcp: Text = "keep"
    storage: Text = "none"


class SourceArmed(Message, frozen=True, kw_only=True):
    stop_ms: float


class SourceRound(Message, frozen=True, kw_only=True):
    """Scan (re-arming), send layout, pages, holes; wait until the target has applied all. Answer: SourceRoundDone."""

    round: Count


class SourceRoundDone(Message, frozen=True, kw_only=True):
    report: RoundReport


class SourceCutOver(Message, frozen=True, kw_only=True):
    """Do what can be done before, then freeze, cut, scan, dump, hand all to the stream.

    Answers: SourceFrozen at once when every task stands (the service freezes the cgroup then, while the engine dumps
    on), then SourceDumped.
    """

    freeze_budget_s: float
    cut: list[Interface]  # cut off in the freeze by agent.network.cut; the service has written the undo ahead


class SourceFrozen(Message, frozen=True, kw_only=True):
    monotonic_ns: int  # CLOCK_MONOTONIC of this host when the first stop was asked for
    tasks: list[int]  # host tids


class SourceDumped(Message, frozen=True, kw_only=True):
    parts: dict[str, float]  # ms by part
    dirty_bytes: Count
    pids: list[int]  # as the container sees them
    connections: Count


class SourceVerifyStop(Message, frozen=True, kw_only=True):
    """Is it the same stop, unbroken since SourceFrozen? Answer: SourceStopVerified."""


class SourceStopVerified(Message, frozen=True, kw_only=True):
    unbroken: bool
    detail: Text = ""


class SourceThaw(Message, frozen=True, kw_only=True):
    """Roll back: registers, sockets, network, detach. Legal at any time; idempotent. Answer: EngineDone."""


class SourceRelease(Message, frozen=True, kw_only=True):
    """After RUNNING: let go of tasks that the service has killed. Answer: EngineDone."""


# ---------------------------------------------------------------- service to the target's engine


class TargetIntercept(Message, frozen=True, kw_only=True):
    """Seize the runtime's init, run `start_argv`, stop at the exec. Answer: TargetIntercepted."""

    pid: Count  # host pid of the runtime's init process, after create
    start_argv: list[Text]
    root: Text = ""


class TargetIntercepted(Message, frozen=True, kw_only=True):
    pid: Count


class TargetRestored(Message, frozen=True, kw_only=True):
    """Sent without a request: everything is applied, the cgroup is FROZEN, registers are set, detached."""

    parts: dict[str, float]
    pids: list[int]  # as the container sees them
    repaired: list[RepairedSocket]


class RepairedSocket(Record, frozen=True, kw_only=True):
    """A TCP socket left in repair mode, for the service to activate at the commit without the engine."""

    pid: Count  # host pid of a holder
    fd: Count  # its number there
    unsent: bytes = b""  # data that had not left the source: queued after repair mode ends


class TargetDiscard(Message, frozen=True, kw_only=True):
    """Kill what was built. Answer: EngineDone."""


class EngineDone(Message, frozen=True, kw_only=True):
    detail: Text = ""


class EngineFailed(Message, frozen=True, kw_only=True):
    failure: Failure


ToSourceEngine = SourceArm | SourceRound | SourceCutOver | SourceVerifyStop | SourceThaw | SourceRelease
FromSourceEngine = (
    SourceArmed | SourceRoundDone | SourceFrozen | SourceDumped | SourceStopVerified | EngineDone | EngineFailed
)
ToTargetEngine = TargetIntercept | TargetDiscard
FromTargetEngine = TargetIntercepted | TargetRestored | EngineDone | EngineFailed


# ---------------------------------------------------------------- engine and stream


class OpenTask(Message, frozen=True, kw_only=True):
    """Engine to stream, both sides: a process whose memory will be read or written.

    The stream opens /proc/PID/mem (source) and checks the start time first, so that a recycled pid is never read.
    """

    task: Count  # our own number for it, the same on both sides
    pid: Count  # host pid
    start_time: Count  # field 22 of /proc/PID/stat


class ReadRuns(Message, frozen=True, kw_only=True):
    """Source: read these page runs and send them. No answer."""

    task: Count
    starts: list[int]
    sizes: list[int]
    # Pages that are zero need not be written where the target has nothing yet: only in anonymous memory.
    anonymous: bool
    final: bool = False  # in the freeze: no throttle, no zero detection


class Flush(Message, frozen=True, kw_only=True):
    """Source: after everything before it is sent, and the target has applied it, answer Flushed."""

    number: Count


class Flushed(Message, frozen=True, kw_only=True):
    number: Count
    read_bytes: Count
    zero_bytes: Count
    wire_bytes: Count
    ms: float


class SectionApplied(Message, frozen=True, kw_only=True):
    """Target engine to stream: the section is applied; later frames may be looked at."""


class ReleasePackets(Message, frozen=True, kw_only=True):
    """Target engine to stream: sockets are restored (in repair mode): inject what was caught, then as it comes.

    `receive_next`: 'LOCAL_IP LOCAL_PORT PEER_IP PEER_PORT' -> next sequence number expected; data segments that end
    at or before it are dropped.
    """

    receive_next: dict[str, int]


class StreamFailed(Message, frozen=True, kw_only=True):
    """Stream to engine or service: the link or a task is gone."""

    failure: Failure


class CapturePackets(Message, frozen=True, kw_only=True):
    """Source engine to stream: one descriptor comes with it, the catcher's AF_PACKET socket. No answer.

    From now every packet on it goes to the target as it comes; a bounded copy is kept for StreamReplay.
    """


class Urgent(Message, frozen=True, kw_only=True):
    """Engine to stream, both sides: a freeze is about to begin, or is over. No answer.

    Meanwhile the stream goes before other processes of its host. The source's keeps caught packets back until
    ForwardPackets: the target has no use for them before it has the last section.
    """

    on: bool


class ForwardPackets(Message, frozen=True, kw_only=True):
    """Source engine to stream, behind the last section: send what was caught, from now on as it comes. No answer."""


EngineToStream = (
    OpenTask | ReadRuns | Flush | CapturePackets | SectionApplied | ReleasePackets | Urgent | ForwardPackets
)  # fmt: skip
StreamToEngine = Flushed | StreamFailed


# ---------------------------------------------------------------- service and stream


class StreamListen(Message, frozen=True, kw_only=True):
    """Target: listen for the one source of this migration. Answer: StreamListening, later StreamUp.

    One descriptor follows when `inject` is set: the AF_PACKET socket into the container.
    """

    address: Text
    ports: list[int]
    client_public_key: Text
    peer_address: Text  # '' : any
    migration: Text
    epoch: Count


class StreamListening(Message, frozen=True, kw_only=True):
    port: Count
    host_key: Text


class StreamInject(Message, frozen=True, kw_only=True):
    """Target: one descriptor comes with it, the AF_PACKET socket into the container. No answer."""


class StreamAttached(Message, frozen=True, kw_only=True):
    """Target, at the commit: the container is on the network. No answer.

    Packets that are answered at once (ARP, a new connection's SYN) are kept until then, or the answer is lost.
    """


class StreamMakeKey(Message, frozen=True, kw_only=True):
    """Source: make the client key of this migration, in memory. Answer: StreamKey."""


class StreamKey(Message, frozen=True, kw_only=True):
    public_key: Text


class StreamConnect(Message, frozen=True, kw_only=True):
    """Source: connect. Answer: StreamUp."""

    address: Text
    port: Count
    host_key: Text
    migration: Text
    epoch: Count
    compress: Text
    bandwidth: Count


class StreamUp(Message, frozen=True, kw_only=True):
    peer: Text = ""


class StreamReplay(Message, frozen=True, kw_only=True):
    """Source, on a roll-back: one descriptor comes with it, the AF_PACKET socket into our own container.

    Every captured packet that was sent to the target is put back there. Answer: StreamReplayed.
    """


class StreamReplayed(Message, frozen=True, kw_only=True):
    packets: Count


class StreamGetCounters(Message, frozen=True, kw_only=True):
    """Answer: StreamCounters. Safe at any time."""


class StreamCounters(Message, frozen=True, kw_only=True):
    page_bytes: Count = 0
    zero_bytes: Count = 0
    wire_bytes: Count = 0
    packets: Count = 0
    packets_dropped: Count = 0


ToStream = (
    StreamListen | StreamInject | StreamAttached | StreamMakeKey | StreamConnect | StreamReplay | StreamGetCounters
)  # fmt: skip
FromStream = (
    StreamListening | StreamKey | StreamUp | StreamReplayed | StreamCounters | StreamFailed
)  # fmt: skip
