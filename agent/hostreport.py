"""What this host is and can do. Every feature is asked for by using it; a version number decides nothing."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from agent import arch
from agent.host import Host
from agent.kernel import freezer, memory, pagemap, pidfd, procfs, ptrace, userfaultfd
from agent.kernel.namespaces import Namespace, unshare
from agent.kernel.syscalls import syscall
from agent.kernel.types import Fd, Tid
from agent.kernel.unistd import SYS
from agent.network.namespaces import NAMED_DIRECTORIES, inside
from protocol.errors import MigrateError, UnsupportedError
from protocol.messages import HostReport, RuntimeInfo

AGENT_VERSION = "0.1.0"
# include/uapi/linux/tcp.h
_TCP_REPAIR = 19


def _probe_userfaultfd() -> None:
    fd = Fd(syscall(SYS.userfaultfd, userfaultfd.O_CLOEXEC))
    try:
        userfaultfd.enable(fd)
    finally:
        os.close(fd)


def _probe_pagemap_scan() -> None:
    fd = pagemap.open_pagemap(os.getpid())
    try:
        area = next(area for area in procfs.read_maps(os.getpid()) if "w" in area.perms)
        pagemap.scan(fd, area.start, area.end, mask=pagemap.Category.PRESENT)
    finally:
        os.close(fd)


def _probe_pidfd() -> None:
    read_end, write_end = os.pipe()
    handle = pidfd.pidfd_open(os.getpid())
    try:
        os.close(pidfd.pidfd_getfd(handle, read_end))
    finally:
        for fd in (read_end, write_end, handle):
            os.close(fd)


def _probe_tcp_repair() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)


def _probe_freezer() -> None:
    if not freezer.versions():
        raise UnsupportedError("neither the v1 freezer controller nor cgroup2 is mounted")


def _probe_time_namespace() -> None:
    # It would hold for all later children of the thread: so in one that ends at once.
    with ThreadPoolExecutor(1) as throwaway:
        throwaway.submit(unshare, Namespace.TIME).result()


def _probe_packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def _probe_ns_last_pid() -> None:
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        raise UnsupportedError("/proc/sys/kernel/ns_last_pid cannot be written")


def _probe_root() -> None:
    if os.geteuid() != 0:
        raise UnsupportedError("the agent does not run as root")


# feature: (probe, what to do when it fails)
_PROBES: dict[str, tuple[Callable[[], None], str]] = {
    "root": (_probe_root, "run the agent as root"),
    "wp_async": (_probe_userfaultfd, "needs Linux 6.7 with CONFIG_USERFAULTFD"),
    "pagemap_scan": (_probe_pagemap_scan, "needs Linux 6.7"),
    "pidfd_getfd": (_probe_pidfd, "needs Linux 5.6"),
    "tcp_repair": (_probe_tcp_repair, "needs CAP_NET_ADMIN"),
    "time_namespace": (_probe_time_namespace, "needs Linux 5.6 with CONFIG_TIME_NS"),
    "freezer": (_probe_freezer, "needs a cgroup v1 freezer or cgroup v2"),
    "packet_socket": (_probe_packet_socket, "needs CAP_NET_RAW and CONFIG_PACKET"),
    "ns_last_pid": (_probe_ns_last_pid, "needs CONFIG_CHECKPOINT_RESTORE"),
}


def _features() -> tuple[dict[str, bool], dict[str, str]]:
    works: dict[str, bool] = {}
    notes: dict[str, str] = {}
    for name, (probe, remedy) in _PROBES.items():
        try:
            probe()
        except (OSError, MigrateError, StopIteration) as error:
            works[name] = False
            notes[name] = f"{error}; {remedy}"
        else:
            works[name] = True
    return works, notes


def vdso_digest() -> str:
    """SHA-256 of this process's vDSO; two hosts whose vDSOs differ cannot exchange processes. '' : none."""
    for area in procfs.read_maps(os.getpid()):
        if area.path == "[vdso]":
            data = memory.process_vm_read(os.getpid(), area.start, area.end - area.start)
            return hashlib.sha256(data).hexdigest()
    return ""


def xstate_bytes() -> int:
    """Size of a thread's extended registers, as ptrace hands them out; two hosts must agree on it."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as child:
        try:
            tid = Tid(child.pid)
            ptrace.seize(tid, ptrace.Option.EXITKILL)
            ptrace.interrupt(tid)
            ptrace.wait(tid)
            return len(ptrace.get_regset(tid, arch.current().extended_note))
        finally:
            child.kill()


def _cpu() -> tuple[str, list[str]]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return (model[1] if model else ""), sorted(flags[1].split()) if flags else []


# A control group's files: limit, use, and the name in memory.stat of what can be taken away at once.
# Source: cgroup-v1/memory.rst (hierarchical figures), cgroup-v2.rst.
_TOP_GROUPS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
)


def _memory_available() -> int:
    """Bytes that new containers can have: of the machine, and of the topmost group that is seen here.

    That group is the machine's own unless the agent lives in a cgroup namespace, as in a system container.
    """
    available = int(psutil.virtual_memory().available)
    for directory, limit_name, usage_name, reclaimable_name in _TOP_GROUPS:
        try:
            limit, usage, statistics = (
                Path(directory, name).read_text(encoding="ascii") for name in (limit_name, usage_name, "memory.stat")
            )
        except OSError:
            continue  # another version, or the root of version 2, which has no limit
        if limit.strip() != "max":
            found = re.search(rf"^{reclaimable_name} (\d+)$", statistics, re.MULTILINE)
            reclaimable = int(found[1]) if found else 0
            available = min(available, max(0, int(limit) - int(usage) + reclaimable))
    return available


def _addresses(container_pids: Iterable[int]) -> list[str]:
    """IP addresses of this host, its named network namespaces and its containers, without loopback and link-local ones.

    A container that moves here must not bring one of these.
    """
    places = [f"/proc/{pid}/ns/net" for pid in container_pids]
    for directory in NAMED_DIRECTORIES:
        with contextlib.suppress(OSError):
            places += [f"{directory}/{name}" for name in os.listdir(directory)]
    found = _own_addresses()
    for place in places:
        # One that has gone, or a file that is no namespace, has no addresses.
        with contextlib.suppress(OSError, MigrateError), inside(place):
            found |= _own_addresses()
    return sorted(found)


def _own_addresses() -> set[str]:
    """Of the network namespace that the calling thread is in."""
    found = set()
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family in {socket.AF_INET, socket.AF_INET6}:
                parsed = ipaddress.ip_address(address.address.partition("%")[0])
                if not parsed.is_loopback and not parsed.is_link_local:
                    found.add(str(parsed))
    return found


def collect(host: Host) -> HostReport:
    """The whole report; takes some tens of milliseconds."""
    features, notes = _features()
    model, flags = _cpu()
    runtimes = []
    names: list[str] = []
    pids: list[int] = []
    for runtime in host.runtimes:
        try:
            runtimes.append(RuntimeInfo(kind=runtime.kind, version=runtime.version(), root=runtime.root))
            found = runtime.containers()
            names += [item.name for item in found]
            pids += [item.pid for item in found if item.pid]
        except MigrateError as error:
            features[f"runtime_{runtime.kind}"] = False
            notes[f"runtime_{runtime.kind}"] = error.message
    for kind, why in host.missing_runtimes.items():
        features[f"runtime_{kind}"] = False
        notes[f"runtime_{kind}"] = why
    bridge = host.settings.network.bridge
    if bridge and not Path(f"/sys/class/net/{bridge}/bridge").exists():
        notes["bridge"] = f"{bridge} of agent.toml is not a bridge of this host"
        bridge = ""
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(host.state_dir).free
    return HostReport(
        host=host.name, architecture=arch.current().name, kernel=platform.release(), agent_version=AGENT_VERSION,
        features=features, feature_notes=notes, cpu_model=model, cpu_flags=flags,
        xstate_bytes=xstate_bytes(), vdso_digest=vdso_digest(),
        page_bytes=os.sysconf("SC_PAGE_SIZE"), memory_available=_memory_available(),
        cpus=psutil.cpu_count() or 1, runtimes=runtimes, containers=sorted(names), bridge=bridge,
        wall_clock=time.time(), state_dir_free=free, addresses=_addresses(pids),
    )  # fmt: skip
