"""What a process has once: the addresses of its program, limits, file mode mask, directory, flags.

Survives: code, data, heap, stack, argument and environment addresses (so /proc/PID/cmdline and ps are right), auxv,
brk, umask, working directory, resource limits, dumpable, child subreaper, THP setting, personality, oom_score_adj.
Does not survive: a working directory that was deleted (refused); accounting (CPU time, I/O counters, start time).
"""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

from agent.engine.native.tasks.plan import CallPlan, Later
from agent.engine.native.tasks.procfile import ProcFile
from agent.kernel.process import PR_SET_MM_MAP, Prctl
from agent.kernel.procfs import TaskStatus, read_link, read_proc, read_stat
from agent.kernel.syscalls import os_failure
from agent.kernel.unistd import SYS
from protocol.messages import Record, Refusal

_DUMPABLE_BY_ROOT = 2
_NO_FILE = 0xFFFFFFFF
# struct prctl_mm_map: eleven addresses, pointer to auxv, its size, descriptor of the exe.
_MM_MAP = struct.Struct("<11QQII")
_WORD = (1 << 64) - 1
_LIMIT_NAME_COLUMNS = 26


class MemoryMap(Record, frozen=True, kw_only=True):
    """Addresses that the kernel keeps of a program.   Source: PR_SET_MM_MAP in prctl(2)."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes


class Limit(Record, frozen=True, kw_only=True):
    soft: int  # -1: unlimited
    hard: int


class ProcessAttributes(Record, frozen=True, kw_only=True):
    memory_map: MemoryMap
    limits: list[Limit]
    umask: int
    directory: str
    personality: int
    oom_score_adj: int
    dumpable: int
    child_subreaper: bool
    thp_disable: int


class ProcessFiles:
    """The files of /proc/PID that `dump` reads in the freeze, opened before it. Raises: TaskGoneError, KernelError."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.timers = ProcFile(f"/proc/{pid}/timers")
        self.personality = ProcFile(f"/proc/{pid}/personality")
        self.oom_score_adj = ProcFile(f"/proc/{pid}/oom_score_adj")

    def close(self) -> None:
        """Idempotent."""
        for file in (self.timers, self.personality, self.oom_score_adj):
            file.close()


def check(pid: int, container_pid: int) -> list[Refusal]:
    """Refuse what cannot be found again by its path."""
    refusals = []
    for what, name in (("cwd", "working directory"), ("exe", "program"), ("root", "root directory")):
        link = read_link(f"/proc/{pid}/{what}")
        if link.endswith(" (deleted)"):
            refusals.append(
                Refusal(
                    code="deleted-file", pid=container_pid, object=link,
                    message=f"process {container_pid}: its {name} {link} was deleted or replaced",
                    hint="restart the container, so that it runs what is on disk",
                )
            )  # fmt: skip
    if read_link(f"/proc/{pid}/root") != "/":
        refusals.append(
            Refusal(
                code="chroot", pid=container_pid, object=read_link(f"/proc/{pid}/root"),
                message=f"process {container_pid} has changed its root directory (chroot), which is not carried yet",
            )
        )  # fmt: skip
    return refusals


def dump(files: ProcessFiles, status: TaskStatus, plan: CallPlan) -> Later[ProcessAttributes]:
    """Read /proc in the freeze and plan the questions that have no file there."""
    brk = plan.must("brk", SYS.brk, 0)
    dumpable = plan.must("prctl(PR_GET_DUMPABLE)", SYS.prctl, Prctl.GET_DUMPABLE)
    subreaper = plan.reserve(4)
    plan.must("prctl(PR_GET_CHILD_SUBREAPER)", SYS.prctl, Prctl.GET_CHILD_SUBREAPER, subreaper)
    thp_disable = plan.call("prctl(PR_GET_THP_DISABLE)", SYS.prctl, Prctl.GET_THP_DISABLE, 0, 0, 0, 0)
    pid = files.pid

    def read() -> ProcessAttributes:
        stat = read_stat(pid)
        return ProcessAttributes(
            memory_map=MemoryMap(
                start_code=stat.start_code, end_code=stat.end_code, start_data=stat.start_data,
                end_data=stat.end_data, start_brk=stat.start_brk, brk=brk.value, start_stack=stat.start_stack,
                arg_start=stat.arg_start, arg_end=stat.arg_end, env_start=stat.env_start, env_end=stat.env_end,
                auxv=read_proc(f"/proc/{pid}/auxv"),
            ),
            limits=read_limits(pid),
            umask=status.umask or 0,
            directory=read_link(f"/proc/{pid}/cwd"),
            personality=int(files.personality.read(), 16),
            oom_score_adj=int(files.oom_score_adj.read()),
            dumpable=dumpable.value,
            child_subreaper=plan.read(subreaper, 4) != bytes(4),
            thp_disable=0 if thp_disable.errno else thp_disable.value,
        )  # fmt: skip

    return read


def read_limits(pid: int) -> list[Limit]:
    """All resource limits, in the order of their numbers.

    prlimit(2) on a process of another user needs CAP_SYS_RESOURCE; the file does not.   Source: proc_pid_limits(5).
    """
    lines = os.fsdecode(read_proc(f"/proc/{pid}/limits")).splitlines()[1:]
    limits = []
    for line in lines:
        soft, hard = line[_LIMIT_NAME_COLUMNS:].split()[:2]
        limits.append(Limit(soft=_limit(soft), hard=_limit(hard)))
    return limits


def _limit(text: str) -> int:
    return -1 if text == "unlimited" else int(text)


def restore(record: ProcessAttributes, plan: CallPlan) -> None:
    """Plan the process's own calls. `dumpable` has its own step: a change of credentials clears it."""
    the_map = record.memory_map
    auxv = plan.place(the_map.auxv)
    plan.must(
        "prctl(PR_SET_MM_MAP)", SYS.prctl, Prctl.SET_MM, PR_SET_MM_MAP,
        plan.place(
            _MM_MAP.pack(
                the_map.start_code, the_map.end_code, the_map.start_data, the_map.end_data, the_map.start_brk,
                the_map.brk, the_map.start_stack, the_map.arg_start, the_map.arg_end, the_map.env_start,
                the_map.env_end, auxv, len(the_map.auxv), _NO_FILE,
            )
        ),
        _MM_MAP.size, 0,
    )  # fmt: skip
    plan.must("umask", SYS.umask, record.umask)
    plan.must("personality", SYS.personality, record.personality)
    plan.must(f"chdir({record.directory})", SYS.chdir, plan.place(os.fsencode(record.directory) + b"\0"))
    if record.child_subreaper:
        plan.must("prctl(PR_SET_CHILD_SUBREAPER)", SYS.prctl, Prctl.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if record.thp_disable:
        plan.must(
            "prctl(PR_SET_THP_DISABLE)", SYS.prctl, Prctl.SET_THP_DISABLE, record.thp_disable & 1,
            record.thp_disable & ~1, 0, 0,
        )  # fmt: skip


def restore_dumpable(record: ProcessAttributes, plan: CallPlan) -> None:
    """After the credentials. 'Readable by root only' cannot be set; the nearest that can is 'not at all'."""
    value = 0 if record.dumpable == _DUMPABLE_BY_ROOT else record.dumpable
    plan.must("prctl(PR_SET_DUMPABLE)", SYS.prctl, Prctl.SET_DUMPABLE, value, 0, 0, 0)


def restore_limits(record: ProcessAttributes, pid: int, plan: CallPlan) -> None:
    """Set what differs: from outside, which may raise a limit, else by the process itself, which may lower its own."""
    for number, (wanted, now) in enumerate(zip(record.limits, read_limits(pid), strict=True)):
        if wanted == now:
            continue
        try:
            resource.prlimit(pid, number, (wanted.soft, wanted.hard))
        except (PermissionError, ValueError):
            value = struct.pack("<QQ", wanted.soft & _WORD, wanted.hard & _WORD)
            plan.must(
                f"prlimit(resource {number}, soft {wanted.soft}, hard {wanted.hard})", SYS.prlimit64, 0, number,
                plan.place(value), 0,
            )  # fmt: skip


def restore_oom_score(record: ProcessAttributes, pid: int) -> None:
    """From outside. Raises: KernelError: lowering it needs CAP_SYS_RESOURCE."""
    path = f"/proc/{pid}/oom_score_adj"
    if int(read_proc(path)) == record.oom_score_adj:
        return
    try:
        Path(path).write_text(str(record.oom_score_adj), encoding="ascii")
    except OSError as error:
        raise os_failure(f"write {record.oom_score_adj} to {path}", error) from error
