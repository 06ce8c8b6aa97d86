"""What /proc/PID tells of a process, parsed. Source: proc(5) and its pages (proc_pid_maps(5), ...).

Every read raises TaskGoneError when the process is dead, and KernelError for anything else.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from pathlib import Path

import msgspec

from agent.kernel.syscalls import failure, os_failure
from agent.kernel.types import Pid, Tid


def read_proc(path: str) -> bytes:
    """All of a small file below /proc. Raises: TaskGoneError, KernelError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(descriptor, 1 << 20):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _gone_or(f"read({path})", error) from error


def _gone_or(call: str, error: OSError) -> Exception:
    if error.errno in {errno.ENOENT, errno.ESRCH}:
        return failure(call, errno.ESRCH, "no such process")
    return os_failure(call, error)


class MemoryArea(msgspec.Struct, frozen=True, gc=False):
    r"""One line of /proc/PID/maps. `path` is '' for plain anonymous memory, '[heap]' and the like for special areas.

    A file's own name may end in ' (deleted)' or hold '\012': the kernel's text is ambiguous there; who must be sure
    compares device and inode.
    """

    start: int
    end: int
    perms: str
    offset: int
    device: int
    inode: int
    path: str
    deleted: bool = False

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def protection(self) -> int:
        """PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4."""
        return (self.perms[0] == "r") | (self.perms[1] == "w") << 1 | (self.perms[2] == "x") << 2

    @property
    def is_shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def is_file(self) -> bool:
        """Backed by an object with an inode: a file, memfd, shared anonymous memory, System V memory."""
        return self.inode != 0

    @property
    def is_kernel_page(self) -> bool:
        """vDSO, its data, vsyscall, uprobes: made by the kernel, never copied."""
        return self.path in KERNEL_PAGES


KERNEL_PAGES = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})

_AREA = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([-rwxps]{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)(?: *|  *(\S[^\n]*))$",
    re.MULTILINE,
)
_DELETED = b" (deleted)"


@functools.lru_cache(maxsize=1024)
def _area_path(raw: bytes) -> tuple[str, bool]:
    deleted = raw.endswith(_DELETED)
    if deleted:
        raw = raw[: -len(_DELETED)]
    return os.fsdecode(raw.replace(b"\\012", b"\n")), deleted


@functools.lru_cache(maxsize=256)
def _device(raw: bytes) -> int:
    major, minor = raw.split(b":")
    return os.makedev(int(major, 16), int(minor, 16))


@functools.lru_cache(maxsize=64)
def _permissions(raw: bytes) -> str:
    return raw.decode("ascii")


def parse_maps(data: bytes) -> list[MemoryArea]:
    areas = []
    for start, end, perms, offset, device, inode, path in _AREA.findall(data):
        name, deleted = _area_path(path) if path else ("", False)
        areas.append(
            MemoryArea(
                int(start, 16), int(end, 16), _permissions(perms), int(offset, 16), _device(device), int(inode), name,
                deleted,
            )
        )  # fmt: skip
    return areas


def read_maps(pid: int) -> list[MemoryArea]:
    """The areas of a process in address order; none for a zombie or a kernel thread."""
    return parse_maps(read_proc(f"/proc/{pid}/maps"))


_SMAPS_HEAD = re.compile(rb"^([0-9a-f]+)-[0-9a-f]+ [-rwxps]{4} ")


def read_vm_flags(pid: int) -> dict[int, frozenset[str]]:
    """VmFlags of each area by its start ('gd' grows down, 'lo' locked, 'dc' not copied by fork, ...).

    Slow: the kernel walks all page tables for it. Source: smaps in proc(5).
    """
    flags: dict[int, frozenset[str]] = {}
    start = 0
    for line in read_proc(f"/proc/{pid}/smaps").split(b"\n"):
        if line.startswith(b"VmFlags:"):
            flags[start] = frozenset(line[8:].decode("ascii").split())
        elif head := _SMAPS_HEAD.match(line):
            start = int(head[1], 16)
    return flags


class TaskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """/proc/PID/task/TID/status. Signal and capability sets are masks; ids of namespaces go from ours inwards."""

    name: str
    state: str  # one letter
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int
    uids: tuple[int, ...]  # real, effective, saved, filesystem
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    umask: int | None  # None for a zombie
    ns_tgid: tuple[int, ...]
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    threads: int
    sig_pending: int
    shared_pending: int
    sig_blocked: int
    sig_ignored: int
    sig_caught: int
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp: int  # 0 none, 1 strict, 2 filter
    rss_bytes: int
    locked_bytes: int


def _fields(data: bytes) -> dict[str, str]:
    return {
        key: value.strip()
        for key, colon, value in (line.partition(":") for line in os.fsdecode(data).split("\n"))
        if colon
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def parse_status(data: bytes) -> TaskStatus:
    f = _fields(data)
    return TaskStatus(
        name=f["Name"],
        state=f["State"][0],
        tgid=int(f["Tgid"]),
        pid=int(f["Pid"]),
        ppid=int(f["PPid"]),
        tracer_pid=int(f["TracerPid"]),
        uids=_numbers(f["Uid"]),
        gids=_numbers(f["Gid"]),
        groups=_numbers(f["Groups"]),
        umask=int(f["Umask"], 8) if "Umask" in f else None,
        ns_tgid=_numbers(f["NStgid"]),
        ns_pid=_numbers(f["NSpid"]),
        ns_pgid=_numbers(f["NSpgid"]),
        ns_sid=_numbers(f["NSsid"]),
        threads=int(f["Threads"]),
        sig_pending=int(f["SigPnd"], 16),
        shared_pending=int(f["ShdPnd"], 16),
        sig_blocked=int(f["SigBlk"], 16),
        sig_ignored=int(f["SigIgn"], 16),
        sig_caught=int(f["SigCgt"], 16),
        cap_inheritable=int(f["CapInh"], 16),
        cap_permitted=int(f["CapPrm"], 16),
        cap_effective=int(f["CapEff"], 16),
        cap_bounding=int(f["CapBnd"], 16),
        cap_ambient=int(f["CapAmb"], 16),
        no_new_privs=f.get("NoNewPrivs") == "1",
        seccomp=int(f.get("Seccomp", "0")),
        rss_bytes=_kib(f.get("VmRSS")),
        locked_bytes=_kib(f.get("VmLck")),
    )


def _kib(text: str | None) -> int:
    return int(text.split()[0]) * 1024 if text else 0


def _task_path(pid: int, tid: int | None) -> str:
    return f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"


def read_status(pid: int, tid: int | None = None) -> TaskStatus:
    """Of a process (its leader), or of one thread."""
    return parse_status(read_proc(f"{_task_path(pid, tid)}/status"))


def read_namespace_pids(pid: int, tid: int | None = None) -> tuple[int, ...]:
    """The thread's numbers, from this /proc's pid namespace to its own (the last)."""
    data = read_proc(f"{_task_path(pid, tid)}/status")
    line = data[data.index(b"\nNSpid:") + 7 :]
    return tuple(map(int, line[: line.index(b"\n")].split()))


def read_tracer(pid: int, tid: int | None = None) -> Pid | None:
    """Who traces it. None: nobody (or somebody outside this pid namespace)."""
    return Pid(read_status(pid, tid).tracer_pid) or None


class TaskStat(msgspec.Struct, frozen=True, kw_only=True):
    """/proc/PID/stat. The addresses are 0 without the right to ptrace."""

    pid: int
    name: str
    state: str
    ppid: int
    pgid: int
    sid: int
    tty: int
    flags: int
    priority: int
    nice: int
    threads: int
    start_time_ticks: int  # since boot; with the pid it names a process for good
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int  # as wait(2) gives it


def read_stat(pid: int, tid: int | None = None) -> TaskStat:
    data = read_proc(f"{_task_path(pid, tid)}/stat")
    opening, closing = data.index(b"("), data.rindex(b")")
    f = data[closing + 2 :].split()  # f[0] is field 3 of proc_pid_stat(5)
    (
        ppid, pgid, sid, tty, flags, priority, nice, threads, start_time, start_code, end_code, start_stack,
        exit_signal, rt_priority, policy, start_data, end_data, start_brk, arg_start, arg_end, env_start, env_end,
        exit_code,
    ) = (
        int(f[number - 3])
        for number in (4, 5, 6, 7, 9, 18, 19, 20, 22, 26, 27, 28, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51, 52)
    )  # fmt: skip
    return TaskStat(
        pid=int(data[:opening]), name=os.fsdecode(data[opening + 1 : closing]), state=chr(f[0][0]), ppid=ppid,
        pgid=pgid, sid=sid, tty=tty, flags=flags, priority=priority, nice=nice, threads=threads,
        start_time_ticks=start_time, start_code=start_code, end_code=end_code, start_stack=start_stack,
        exit_signal=exit_signal, rt_priority=rt_priority, policy=policy, start_data=start_data, end_data=end_data,
        start_brk=start_brk, arg_start=arg_start, arg_end=arg_end, env_start=env_start, env_end=env_end,
        exit_code=exit_code,
    )  # fmt: skip


def read_start_time(pid: int) -> int:
    """Field 22 of stat: clock ticks since boot."""
    data = read_proc(f"/proc/{pid}/stat")
    return int(data[data.rindex(b")") + 2 :].split()[19])


class FdInfo(msgspec.Struct, frozen=True, kw_only=True):
    """/proc/PID/fdinfo/N: the common fields, and the lines of the descriptor's own kind as they stand."""

    position: int
    flags: int  # O_*, with O_CLOEXEC when the descriptor has it
    mount_id: int
    inode: int
    lines: tuple[str, ...]

    def value(self, key: str) -> str | None:
        """Of the first line 'key: value'."""
        return next((line[len(key) + 1 :].strip() for line in self.lines if line.startswith(f"{key}:")), None)

    def lines_of(self, key: str) -> list[str]:
        """All lines that begin with `key`, as epoll ('tfd'), inotify ('inotify') and locks ('lock') have them."""
        return [line for line in self.lines if line.startswith(key)]


_COMMON_FDINFO = {"pos", "flags", "mnt_id", "ino"}


def parse_fdinfo(data: bytes) -> FdInfo:
    lines = os.fsdecode(data).splitlines()
    common = {key: value for key, _, value in (line.partition(":") for line in lines) if key in _COMMON_FDINFO}
    return FdInfo(
        position=int(common.get("pos", "0")),
        flags=int(common.get("flags", "0"), 8),
        mount_id=int(common.get("mnt_id", "0")),
        inode=int(common.get("ino", "0")),
        lines=tuple(line for line in lines if line.partition(":")[0] not in _COMMON_FDINFO),
    )


def read_fdinfo(pid: int, number: int) -> FdInfo:
    """Raises: TaskGoneError: the process is dead, or has no such descriptor."""
    return parse_fdinfo(read_proc(f"/proc/{pid}/fdinfo/{number}"))


def _numbers_in(path: str) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(path) if name.isdigit())
    except OSError as error:
        raise _gone_or(f"listdir({path})", error) from error


def task_ids(pid: int) -> list[Tid]:
    """The threads of a process, in order of their numbers."""
    return [Tid(number) for number in _numbers_in(f"/proc/{pid}/task")]


def descriptors(pid: int) -> list[int]:
    return _numbers_in(f"/proc/{pid}/fd")


def children(pid: int) -> list[Pid]:
    """The children of all its threads. Exact only while they stand still. Source: CONFIG_PROC_CHILDREN."""
    found: list[Pid] = []
    for tid in task_ids(pid):
        found += [Pid(int(word)) for word in read_proc(f"/proc/{pid}/task/{tid}/children").split()]
    return sorted(found)


def read_comm(pid: int, tid: int | None = None) -> bytes:
    """The name of a thread, without the newline that /proc adds."""
    return read_proc(f"{_task_path(pid, tid)}/comm").removesuffix(b"\n")


def read_link(path: str) -> str:
    """A link below /proc/PID: exe, cwd, root, fd/N, ns/KIND."""
    try:
        return str(Path(path).readlink()) if not path.endswith("/") else path
    except OSError as error:
        raise _gone_or(f"readlink({path})", error) from error
