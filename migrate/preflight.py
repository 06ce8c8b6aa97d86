"""Whether a container can move: every refusal and every warning at once, from reports alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from migrate.request import MigrationRequest, not_carried
from protocol.messages import ContainerReport, HostReport, Refusal

MIB = 1 << 20
# Page tables and the kernel's own records of a process come on top of what is resident.
LIMIT_FACTOR, LIMIT_EXTRA_BYTES = 1.05, 8 * MIB
# The target's copy stays within 1.1 x the source's; a host driven to its last page starts to kill.
HOST_FACTOR, HOST_EXTRA_BYTES = 1.1, 64 * MIB
MAX_WALL_DIFFERENCE_S = 1.0
MIN_STATE_DIR_BYTES = 1 * MIB  # A journal that cannot be written cannot commit.

# Features of HostReport.features without which nothing moves; (name, what it is for).
_BOTH_SIDES = (
    ("root", "to trace processes and build containers"),
    ("pidfd_getfd", "to take sockets out of a process"),
    ("freezer", "to hold the container still while ownership changes"),
)
_SOURCE_TRACKING = (
    ("pagemap_scan", "to find the pages that changed"),
    ("wp_async", "to track changes while the container runs"),
)
_CONNECTIONS = (("tcp_repair", "to carry TCP connections"),)
_NETWORK = (("packet_socket", "to catch what is sent to the container while it moves"),)
_TARGET_ONLY = (
    ("time_namespace", "to let the container's monotonic clock go on"),
    ("ns_last_pid", "to give processes their pids back"),
)

# In /proc/cpuinfo, but nothing that a program's instructions could miss.
_CPU_FLAGS_OF_THE_HOST = frozenset(
    """
    acpi aperfmperf arat arch_capabilities arch_perfmon bts constant_tsc cpuid cqm cqm_llc cqm_mbm_local
    cqm_mbm_total cqm_occup_llc dca ds_cpl dtes64 dtherm dts epb ept ept_ad est extd_apicid flexpriority
    flush_l1d fsrm_hv hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req hypervisor ibpb ibrs ibrs_enhanced ida
    intel_pt invpcid_single mba md_clear monitor nonstop_tsc nopl npt nrip_save ospke_hv pbe pdcm pebs pln pti
    pts rdt_a rep_good retpoline smx ss ssbd stibp svm tm tm2 tpr_shadow tsc_adjust tsc_deadline_timer
    tsc_known_freq tsc_reliable tsc_scale vmcb_clean vme vmx vnmi vpid xtopology xtpr zen
    """.split()  # noqa: SIM905  a table of words
)


@dataclass(frozen=True, slots=True)
class Preflight:
    """The outcome: feasible if there is no refusal."""

    refusals: tuple[Refusal, ...]
    warnings: tuple[str, ...]


def preflight(
    source: HostReport,
    target: HostReport,
    container: ContainerReport,
    request: MigrationRequest,
    files: Sequence[Refusal] = (),
) -> Preflight:
    """All that speaks against moving `container`; `files` is what the target found different in its bundle."""
    refusals = [
        *not_carried(request),
        *_container(container, request),
        *_machines(source, target),
        *_kernels(source, target, container, request),
        *_runtime(target, container),
        *_memory(target, container),
        *_names(target, request),
        *_network(target, container, request),
        *(_located(refusal, source.host) for refusal in container.refusals),
        *(_located(refusal, target.host) for refusal in files),
    ]
    return Preflight(tuple(_without_repeats(refusals)), tuple(_warnings(source, target, container, request)))


def _container(container: ContainerReport, request: MigrationRequest) -> Iterator[Refusal]:
    if container.status != "running":
        yield Refusal(
            code="not-running",
            message=f"{request.container} is {container.status}, not running",
            hint="a container that does not run is moved by copying its bundle",
        )


def _machines(source: HostReport, target: HostReport) -> Iterator[Refusal]:
    if source.architecture != target.architecture:
        yield _at(
            target,
            "architecture",
            f"{source.host} is {source.architecture}, {target.host} is {target.architecture}",
            "choose a target of the same architecture",
        )
        return  # flags and vDSO of another architecture differ anyway
    missing = sorted(set(source.cpu_flags) - set(target.cpu_flags) - _CPU_FLAGS_OF_THE_HOST)
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        yield _at(
            target,
            "cpu-flags",
            f"the CPU ({target.cpu_model}) lacks {', '.join(missing[:10])}{more}, which programs may be using",
            f"choose a target with the CPU of {source.host} or a newer one of its kind",
        )
    if source.xstate_bytes != target.xstate_bytes:
        yield _at(
            target,
            "xstate-size",
            f"its extended registers take {target.xstate_bytes} bytes, those of {source.host} {source.xstate_bytes}",
            "choose a target with the same CPU features enabled",
        )
    if source.page_bytes != target.page_bytes:
        yield _at(target, "page-size", f"its pages have {target.page_bytes} bytes, not {source.page_bytes}")
    if source.vdso_digest != target.vdso_digest:
        yield _at(
            target,
            "vdso-differs",
            f"its kernel ({target.kernel}) has another vDSO than that of {source.host} ({source.kernel})",
            "run the same kernel build on both hosts",
        )


def _kernels(
    source: HostReport, target: HostReport, container: ContainerReport, request: MigrationRequest
) -> Iterator[Refusal]:
    either: tuple[tuple[str, str], ...] = _BOTH_SIDES
    if container.connections and request.tcp == "keep":
        either += _CONNECTIONS
    if container.network.interfaces and request.network == "keep":
        either += _NETWORK
    for host, needed in ((source, either + _source_features(request)), (target, either + _TARGET_ONLY)):
        for name, purpose in needed:
            if host.features.get(name, True):
                continue
            note = host.feature_notes.get(name, "")
            yield _at(
                host, f"feature-{name.replace('_', '-')}", f"needs {name} {purpose}" + (f": {note}" if note else "")
            )
    for host in (source, target):
        if host.state_dir_free < MIN_STATE_DIR_BYTES:
            yield _at(
                host,
                "state-dir-full",
                f"the agent's state directory has {host.state_dir_free} bytes left; the journal could not be written",
                "free some space there",
            )


def _runtime(target: HostReport, container: ContainerReport) -> Iterator[Refusal]:
    kinds = sorted({runtime.kind for runtime in target.runtimes})
    if container.runtime not in kinds:
        yield _at(
            target,
            "runtime-missing",
            f"has no runtime {container.runtime} (it has {', '.join(kinds) or 'none'})",
            f"install {container.runtime} there and list it under [[runtimes]] in agent.toml",
        )


def _memory(target: HostReport, container: ContainerReport) -> Iterator[Refusal]:
    within = int(container.memory_bytes * LIMIT_FACTOR) + LIMIT_EXTRA_BYTES
    if container.memory_limit and container.memory_limit < within:
        yield _at(
            target,
            "memory-limit",
            f"{container.name} uses {_mib(container.memory_bytes)} of its limit of {_mib(container.memory_limit)}; "
            f"a copy needs {_mib(within)} while it is built",
            "raise the container's memory limit",
        )
    needed = int(container.memory_bytes * HOST_FACTOR) + HOST_EXTRA_BYTES
    if target.memory_available < needed:
        yield _at(
            target,
            "memory-available",
            f"{_mib(target.memory_available)} of memory are available, {_mib(needed)} are needed",
            "free memory there, or choose another target",
        )


def _names(target: HostReport, request: MigrationRequest) -> Iterator[Refusal]:
    if request.target_name in target.containers:
        yield _at(
            target,
            "name-taken",
            f"has a container {request.target_name} already",
            "choose another name by --name, or delete that container",
        )


def _network(target: HostReport, container: ContainerReport, request: MigrationRequest) -> Iterator[Refusal]:
    network = container.network
    if network.kind == "host":
        yield Refusal(
            code="host-network",
            message=f"{container.name} uses the host's network: that address cannot move with it",
            hint="give the container a network namespace of its own",
        )
    bridged = [interface.name for interface in network.interfaces if interface.bridge]
    if request.network == "keep" and bridged and not target.bridge:
        yield _at(
            target,
            "bridge-missing",
            f"has no bridge for {', '.join(bridged)} of {container.name}",
            "make one on the container's network and set network.bridge in agent.toml",
        )
    taken = sorted(_moving_addresses(container) & set(target.addresses)) if request.network == "keep" else []
    if taken:
        yield _at(
            target,
            "address-taken",
            f"{', '.join(taken)} of {container.name} is there already, on the host or in one of its network namespaces",
            "remove what has it: `ip netns list` and `ip address` on that host show where",
        )


def _moving_addresses(container: ContainerReport) -> set[str]:
    """What comes to the target with the container, as HostReport.addresses writes it."""
    found = set()
    for interface in container.network.interfaces:
        for own in interface.addresses if interface.bridge else ():
            try:
                address = ipaddress.ip_address(own.address)
            except ValueError:
                continue  # it is refused or carried by the agents; here it clashes with nothing
            if not address.is_link_local:
                found.add(str(address))
    return found


def _warnings(
    source: HostReport, target: HostReport, container: ContainerReport, request: MigrationRequest
) -> Iterator[str]:
    yield from container.warnings
    difference_s = target.wall_clock - source.wall_clock
    if abs(difference_s) > MAX_WALL_DIFFERENCE_S:
        yield (
            f"the wall clock of {target.host} is {difference_s:+.1f} s against that of {source.host}: "
            "the container will see its time jump"
        )
    if source.agent_version != target.agent_version:
        yield f"agents differ: {source.host} has {source.agent_version}, {target.host} {target.agent_version}"
    if request.network == "none" and container.connections:
        yield f"--network none: {container.connections} TCP connections will be cut off"
    needed = {name for name, _ in _BOTH_SIDES + _source_features(request)}
    unknown = sorted(needed - source.features.keys())
    if unknown:
        yield f"{source.host} does not say whether it has {', '.join(unknown)}"


def _source_features(request: MigrationRequest) -> tuple[tuple[str, str], ...]:
    return _SOURCE_TRACKING if request.is_live else ()


def _at(host: HostReport, code: str, message: str, hint: str = "") -> Refusal:
    return Refusal(code=code, message=message, hint=hint, host=host.host)


def _located(refusal: Refusal, host: str) -> Refusal:
    if refusal.host:
        return refusal
    return Refusal(
        code=refusal.code,
        message=refusal.message,
        hint=refusal.hint,
        pid=refusal.pid,
        fd=refusal.fd,
        object=refusal.object,
        host=host,
    )


def _without_repeats(refusals: Sequence[Refusal]) -> list[Refusal]:
    """The engine and preflight may find the same thing (a host network, say); one of them is enough."""
    seen: set[tuple[str, int, int, str]] = set()
    kept = []
    for refusal in refusals:
        key = (refusal.code, refusal.pid, refusal.fd, refusal.object or refusal.message)
        alone = (refusal.code, 0, -1, "")
        if key in seen or (refusal.code == "host-network" and alone in seen):
            continue
        seen |= {key, alone}
        kept.append(refusal)
    return kept


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f} MiB"
