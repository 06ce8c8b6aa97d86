"""Control messages between coordinator and agent; those between two agents are in protocol.link_messages.

All are frozen, typed and strict: an unknown field or a wrong type ends the connection. A request has exactly one
answer, `Reply` or `Failure`, with its number; an agent may send `Progress` at any time. Times are seconds, sizes
bytes, unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

VERSIONS = (1,)

# Names of containers and hosts, as runc and podman allow them. \Z, for $ would let a newline through.
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,254}\Z")]
MigrationId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{4,64}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=65536)]
Path = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"^/[^\0]*\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of everything that crosses a host."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of a message."""


# ---------------------------------------------------------------- parts


class Refusal(Record, frozen=True, kw_only=True):
    """One reason why something cannot be moved."""

    code: Text  # a slug: io-uring, memory-limit, vdso-differs, ...
    message: Text
    hint: Text = ""
    pid: Count = 0  # as the container sees it; 0: no task in particular
    fd: int = -1
    object: Text = ""  # what it is: 'anon_inode:[io_uring]', '/data/x', ...
    host: Text = ""


class FileIdentity(Record, frozen=True, kw_only=True):
    """A file that must be the same on both hosts: the program, a library, a file open for reading."""

    path: Path  # inside the container
    size: Count
    digest: Text  # xxh3_128 of the contents, hex


class InterfaceAddress(Record, frozen=True, kw_only=True):
    address: Text  # '10.77.0.50'
    prefix: Annotated[int, msgspec.Meta(ge=0, le=128)]
    scope: Text = "global"


class Route(Record, frozen=True, kw_only=True):
    destination: Text  # 'default' or a prefix
    gateway: Text = ""
    interface: Text = ""
    metric: Count = 0
    scope: Text = ""
    source: Text = ""
    protocol: Text = ""


class Neighbour(Record, frozen=True, kw_only=True):
    address: Text
    mac: Text
    interface: Text
    permanent: bool = False


class Interface(Record, frozen=True, kw_only=True):
    """One veth of a container, all that is needed to make it anew."""

    name: Text
    mac: Text
    mtu: Count
    addresses: list[InterfaceAddress] = []
    sysctls: dict[str, str] = {}  # below net.ipv4.conf.NAME / net.ipv6.conf.NAME, only what differs from the default
    up: bool = True
    host_name: Text = ""  # the host end's name on the source
    bridge: Text = ""  # the bridge that the host end is a port of


class Network(Record, frozen=True, kw_only=True):
    """The network namespace of a container."""

    kind: Text  # 'namespace': its own; 'host'; 'none': its own with nothing but lo
    path: Text = ""  # of a named namespace (/run/netns/web1) that config.json points to; '' : made by the runtime
    interfaces: list[Interface] = []
    routes: list[Route] = []
    neighbours: list[Neighbour] = []
    sysctls: dict[str, str] = {}  # net.* that differ from a fresh namespace


class RuntimeInfo(Record, frozen=True, kw_only=True):
    kind: Text
    version: Text
    root: Text


class HostReport(Record, frozen=True, kw_only=True):
    """What a host is and can do, for preflight. Kernel features are asked for, never deduced from a version."""

    host: Text
    architecture: Text
    kernel: Text
    agent_version: Text
    features: dict[str, bool]  # pagemap_scan, wp_async, pidfd_getfd, tcp_repair, time_namespace, ptrace_rseq, ...
    feature_notes: dict[str, str] = {}  # why a feature is false, and what to do
    cpu_model: Text = ""
    cpu_flags: list[str] = []
    xstate_bytes: Count = 0  # size of the NT_X86_XSTATE area
    vdso_digest: Text = ""
    page_bytes: Count = 4096
    memory_available: Count = 0
    cpus: Count = 1
    runtimes: list[RuntimeInfo] = []
    containers: list[str] = []  # names, of all runtimes
    bridge: Text = ""  # '' : none configured, or it does not exist
    wall_clock: float = 0.0
    state_dir_free: Count = 0
    addresses: list[str] = []  # of the host and of its named network namespaces (/run/netns), without a prefix


class ContainerSummary(Record, frozen=True, kw_only=True):
    name: Name
    runtime: Text
    status: Text  # as the runtime says: running, paused, stopped, created
    pid: Count
    memory_bytes: Count = 0
    processes: Count = 0
    bundle: Text = ""
    migration: Text = ""  # id of the unfinished migration that holds it


class ContainerReport(Record, frozen=True, kw_only=True):
    """All that preflight has to know of one container."""

    name: Name
    runtime: Text
    status: Text
    pid: Count
    bundle: Path
    config_json: bytes
    memory_bytes: Count  # resident
    mapped_bytes: Count = 0
    memory_limit: Count = 0  # 0: none
    processes: Count = 0
    threads: Count = 0
    connections: Count = 0  # established TCP
    files: list[FileIdentity] = []
    network: Network
    refusals: list[Refusal] = []
    warnings: list[str] = []
    executable: Text = ""  # of the init process, as a path in the container
    monotonic_offset_ns: int = 0  # the container's CLOCK_MONOTONIC minus its host's: it may have been moved before


class MigrationStatus(Record, frozen=True, kw_only=True):
    """One side's view of a migration."""

    migration: MigrationId
    epoch: Count
    side: Text
    state: Text  # states.State value
    container: Name
    peer: Text
    since: float  # wall clock, for people
    started: float
    coordinator: Text = ""
    detail: Text = ""
    result: dict[str, float] = {}
    copy_alive: bool = True  # False: the host was down, the tasks of this side's copy are gone


class ClockReading(Record, frozen=True, kw_only=True):
    monotonic_ns: int
    boottime_ns: int
    wall_ns: int


class RoundReport(Record, frozen=True, kw_only=True):
    round: Count
    dirty_bytes: Count  # found dirty by the scan of this round
    sent_bytes: Count  # page bytes, before compression, without zero pages
    zero_bytes: Count = 0
    wire_bytes: Count
    ms: float
    scan_ms: float = 0.0
    remaining_bytes: Count = 0  # dirtied again while this round ran: what a cut-over now would have to send


class CutOverReport(Record, frozen=True, kw_only=True):
    outcome: Text  # 'running', 'rolled-back', 'in-doubt'
    downtime_ms: float = 0.0  # from the first stop to RUNNING heard, on the source's monotonic clock
    parts: dict[str, float] = {}  # ms by part, in the order they happened; they add up to the downtime
    target_parts: dict[str, float] = {}  # what the target did within 'restore' and 'commit'; overlaps with the source
    dirty_bytes: Count = 0
    sent_bytes: Count = 0
    wire_bytes: Count = 0
    packets_caught: Count = 0
    packets_dropped: Count = 0
    pids: list[int] = []  # as the container sees them
    connections: Count = 0
    error: Failure | None = None


# ---------------------------------------------------------------- requests, and what answers them


class Hello(Message, frozen=True, kw_only=True):
    """First message of a coordinator. Answer: Welcome."""

    versions: Annotated[list[int], msgspec.Meta(max_length=64)]
    software: Text = ""
    coordinator: Text = ""  # who and where, for locks and logs


class Welcome(Message, frozen=True, kw_only=True):
    version: int
    host: Text
    software: Text
    role: Text = "operate"  # operate or observe


class GetHostReport(Message, frozen=True, kw_only=True):
    """Answer: HostReportReply."""


class HostReportReply(Message, frozen=True, kw_only=True):
    report: HostReport


class ListContainers(Message, frozen=True, kw_only=True):
    """Answer: ContainerList."""


class ContainerList(Message, frozen=True, kw_only=True):
    containers: list[ContainerSummary]


class InspectContainer(Message, frozen=True, kw_only=True):
    """Answer: ContainerReportReply. Runs every `check` of the engine; stops nothing."""

    container: Name
    storage: Text = "none"
    tcp: Text = "keep"
    network: Text = "keep"


class ContainerReportReply(Message, frozen=True, kw_only=True):
    report: ContainerReport


class ReadClock(Message, frozen=True, kw_only=True):
    """Answer: ClockReply, at once."""


class ClockReply(Message, frozen=True, kw_only=True):
    reading: ClockReading


class BeginSource(Message, frozen=True, kw_only=True):
    """Lock the container, make this migration's client key. Answer: SourceBegun."""

    migration: MigrationId
    epoch: Count
    container: Name
    target: Text  # name of the target host, for people
    storage: Text = "none"
    network: Text = "keep"
    tcp: Text = "keep"


class SourceBegun(Message, frozen=True, kw_only=True):
    client_public_key: Text  # OpenSSH format
    report: ContainerReport


class PrepareTarget(Message, frozen=True, kw_only=True):
    """Open the data listener, make network and runtime objects, intercept the exec. Answer: TargetPrepared."""

    migration: MigrationId
    epoch: Count
    source: Text
    container: ContainerReport
    new_name: Name
    client_public_key: Text
    monotonic_offset_ns: int  # container's CLOCK_MONOTONIC = target's + this
    keep_network: bool = True
    source_address: Text = ""  # numeric: the only one that the data listener accepts; '' : any, the client key protects
    streams: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1


class TargetPrepared(Message, frozen=True, kw_only=True):
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    host_key: Text
    warnings: list[str] = []


class VerifyFiles(Message, frozen=True, kw_only=True):
    """Compare files below a bundle's root with the source's. Answer: FilesVerified."""

    container: ContainerReport


class FilesVerified(Message, frozen=True, kw_only=True):
    refusals: list[Refusal]


class ConnectSource(Message, frozen=True, kw_only=True):
    """Connect the data link, seize and arm the tracker. Answer: SourceConnected."""

    migration: MigrationId
    address: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    host_key: Text
    compress: Text = "auto"
    bandwidth: Count = 0  # bytes per second, 0: unlimited
    track: bool = True  # False: stop-copy, no tracker


class SourceConnected(Message, frozen=True, kw_only=True):
    armed_ms: float = 0.0  # how long the container stood for it


class RunRound(Message, frozen=True, kw_only=True):
    """One pre-copy round. Answer: RoundDone. `Progress` comes while it runs."""

    migration: MigrationId
    round: Count


class RoundDone(Message, frozen=True, kw_only=True):
    report: RoundReport


class CutOver(Message, frozen=True, kw_only=True):
    """Freeze, send the rest, commit. Answer: CutOverDone; outcome says how it ended."""

    migration: MigrationId
    freeze_budget_s: Seconds
    stop_copy: bool = False


class CutOverDone(Message, frozen=True, kw_only=True):
    report: CutOverReport


class Abort(Message, frozen=True, kw_only=True):
    """End a migration in order. Answer: Done, or Failure when it is past its commit point."""

    migration: MigrationId
    reason: Text = ""


class Finish(Message, frozen=True, kw_only=True):
    """After CutOver: wait until this side has cleaned up. Answer: Done."""

    migration: MigrationId


class GetStatus(Message, frozen=True, kw_only=True):
    """Answer: StatusReply. `migration` empty: all that the journal knows."""

    migration: Text = ""
    unfinished_only: bool = False


class StatusReply(Message, frozen=True, kw_only=True):
    migrations: list[MigrationStatus]


class Settle(Message, frozen=True, kw_only=True):
    """`recover`: tell a side what the other side's journal says. Answer: Done with the new state in `detail`."""

    migration: MigrationId
    epoch: Count
    peer_state: Text  # states.State value of the other side, or 'unknown'
    source_is_dead: bool = False


class Done(Message, frozen=True, kw_only=True):
    detail: Text = ""


class Failure(Message, frozen=True, kw_only=True):
    """An error instead of an answer."""

    family: Text
    code: Text
    message: Text
    host: Text = ""
    hint: Text = ""
    refusals: list[Refusal] = []


class Progress(Message, frozen=True, kw_only=True):
    """Something moved. Sent without being asked for, a few times a second at most."""

    migration: MigrationId
    phase: Text  # prepare, precopy, cutover, finish
    round: Count = 0
    done_bytes: Count = 0
    total_bytes: Count = 0
    wire_bytes: Count = 0
    detail: Text = ""


RequestBody = (
    Hello | GetHostReport | ListContainers | InspectContainer | ReadClock | BeginSource | PrepareTarget | VerifyFiles
    | ConnectSource | RunRound | CutOver | Abort | Finish | GetStatus | Settle
)  # fmt: skip
ReplyBody = (
    Welcome | HostReportReply | ContainerList | ContainerReportReply | ClockReply | SourceBegun | TargetPrepared
    | FilesVerified | SourceConnected | RoundDone | CutOverDone | StatusReply | Done | Failure
)  # fmt: skip


class Request(Message, frozen=True, kw_only=True):
    number: Count
    body: RequestBody


class Reply(Message, frozen=True, kw_only=True):
    number: Count
    body: ReplyBody


class Notice(Message, frozen=True, kw_only=True):
    body: Progress


Control = Request | Reply | Notice

ANSWERS: dict[type[Message], type[Message]] = {
    Hello: Welcome,
    GetHostReport: HostReportReply,
    ListContainers: ContainerList,
    InspectContainer: ContainerReportReply,
    ReadClock: ClockReply,
    BeginSource: SourceBegun,
    PrepareTarget: TargetPrepared,
    VerifyFiles: FilesVerified,
    ConnectSource: SourceConnected,
    RunRound: RoundDone,
    CutOver: CutOverDone,
    Abort: Done,
    Finish: Done,
    GetStatus: StatusReply,
    Settle: Done,
}
