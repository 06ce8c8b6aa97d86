"""Credentials of each thread: who it is and what it may.

Survives: real, effective, saved and file system user and group, supplementary groups, capabilities (permitted,
effective, inheritable, bounding, ambient), secure bits, no_new_privs, parent death signal.
Does not survive: a seccomp filter that the program installed itself (refused; the runtime installs its own on the
target); keyrings; a capability that the target's runtime did not give.
"""

from __future__ import annotations

import re
import struct

import msgspec

from agent.engine.native.tasks.plan import CallPlan, Later
from agent.kernel.process import PR_CAP_AMBIENT_CLEAR_ALL, PR_CAP_AMBIENT_RAISE, Prctl
from agent.kernel.procfs import TaskStatus
from agent.kernel.unistd import SYS
from protocol.errors import UnsupportedError
from protocol.messages import Record, Refusal

# linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
_SECCOMP_FILTER = 2


class Credentials(Record, frozen=True, kw_only=True):
    uids: list[int]  # real, effective, saved, file system
    gids: list[int]
    groups: list[int]
    permitted: int
    effective: int
    inheritable: int
    bounding: int
    ambient: int
    no_new_privs: bool
    securebits: int = 0
    death_signal: int = 0


class Seccomp(Record, frozen=True, kw_only=True):
    mode: int
    filters: int


def of_status(status: TaskStatus) -> Credentials:
    """From /proc/PID/status; secure bits and death signal are not in it and stay 0."""
    return Credentials(
        uids=list(status.uids), gids=list(status.gids), groups=list(status.groups),
        permitted=status.cap_permitted, effective=status.cap_effective, inheritable=status.cap_inheritable,
        bounding=status.cap_bounding, ambient=status.cap_ambient, no_new_privs=status.no_new_privs,
    )  # fmt: skip


_FILTERS = re.compile(rb"^Seccomp_filters:\s*(\d+)", re.MULTILINE)
_MODE = re.compile(rb"^Seccomp:\s*(\d+)", re.MULTILINE)


def seccomp_of_status(data: bytes) -> Seccomp:
    """Mode and number of filters of a thread, from the text of its status (the number since Linux 5.9)."""
    mode, filters = _MODE.search(data), _FILTERS.search(data)
    return Seccomp(mode=int(mode[1]) if mode else 0, filters=int(filters[1]) if filters else 0)


def check(statuses: list[bytes], container_pid: int) -> list[Refusal]:
    """Refuse filters of the program's own.

    What the runtime installed is on every thread, one filter; preflight cannot see who installed it, the target
    compares it with its own again.
    """
    found = {(seccomp.mode, seccomp.filters) for seccomp in map(seccomp_of_status, statuses)}
    if len(found) == 1 and found <= {(0, 0), (_SECCOMP_FILTER, 1)}:
        return []
    shown = ", ".join(f"mode {mode} with {filters} filters" for mode, filters in sorted(found))
    return [
        Refusal(
            code="seccomp", pid=container_pid, object="seccomp",
            message=f"process {container_pid} has seccomp filters of its own ({shown}), which are not carried",
            hint="only the filter that the runtime installs from config.json is made again on the target",
        )
    ]  # fmt: skip


def check_same_seccomp(wanted: Seccomp, here: Seccomp) -> None:
    """Raises: UnsupportedError: the target's runtime installed other filters than the source's task has."""
    if wanted != here:
        raise UnsupportedError(
            f"the source's task has seccomp mode {wanted.mode} with {wanted.filters} filters, the runtime here "
            f"installed mode {here.mode} with {here.filters}",
            code="seccomp-differs",
            hint="the program installed a filter itself, or the runtimes differ in what they install",
        )


def dump(status: TaskStatus, plan: CallPlan) -> Later[Credentials]:
    """From the thread's status, read in the freeze, and two injected questions."""
    from_status = of_status(status)
    where = plan.reserve(4)
    plan.must("prctl(PR_GET_PDEATHSIG)", SYS.prctl, Prctl.GET_PDEATHSIG, where)
    bits = plan.must("prctl(PR_GET_SECUREBITS)", SYS.prctl, Prctl.GET_SECUREBITS)

    def read() -> Credentials:
        (signal,) = struct.unpack("<i", plan.read(where, 4))
        return msgspec.structs.replace(from_status, securebits=bits.value, death_signal=signal)

    return read


def restore(record: Credentials, now: Credentials, plan: CallPlan) -> None:
    """Plan what changes `now` (the target's thread) into `record`, in the order that keeps the right to go on."""
    before = msgspec.structs.replace(now, securebits=record.securebits, death_signal=record.death_signal)
    if record.securebits:
        plan.must("prctl(PR_SET_SECUREBITS)", SYS.prctl, Prctl.SET_SECUREBITS, record.securebits)
    if before != record:
        _restore_identity(record, now, plan)
    if record.no_new_privs and not now.no_new_privs:
        plan.must("prctl(PR_SET_NO_NEW_PRIVS)", SYS.prctl, Prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if record.death_signal:
        # A change of credentials clears it, so it comes after them.
        plan.must("prctl(PR_SET_PDEATHSIG)", SYS.prctl, Prctl.SET_PDEATHSIG, record.death_signal)


def _restore_identity(record: Credentials, now: Credentials, plan: CallPlan) -> None:
    for number in range(_LAST_CAPABILITY + 1):
        if (now.bounding & ~record.bounding) >> number & 1:
            plan.must("prctl(PR_CAPBSET_DROP)", SYS.prctl, Prctl.CAPBSET_DROP, number, 0, 0, 0)
    if record.groups != now.groups:
        groups = plan.place(struct.pack(f"<{len(record.groups)}I", *record.groups))
        plan.must("setgroups", SYS.setgroups, len(record.groups), groups)
    if record.gids != now.gids:
        plan.must("setresgid", SYS.setresgid, *record.gids[:3])
        plan.must("setfsgid", SYS.setfsgid, record.gids[3])
    if record.uids != now.uids:
        plan.must("prctl(PR_SET_KEEPCAPS)", SYS.prctl, Prctl.SET_KEEPCAPS, 1, 0, 0, 0)
        plan.must("setresuid", SYS.setresuid, *record.uids[:3])
        plan.must("setfsuid", SYS.setfsuid, record.uids[3])
        plan.must("prctl(PR_SET_KEEPCAPS)", SYS.prctl, Prctl.SET_KEEPCAPS, 0, 0, 0, 0)
    header = plan.place(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0))
    sets = (record.effective, record.permitted, record.inheritable)
    data = [value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in sets]
    plan.must("capset", SYS.capset, header, plan.place(struct.pack("<6I", *data)))
    if record.ambient != now.ambient or record.uids != now.uids:
        plan.must("prctl(PR_CAP_AMBIENT)", SYS.prctl, Prctl.CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        for number in range(_LAST_CAPABILITY + 1):
            if record.ambient >> number & 1:
                plan.must("prctl(PR_CAP_AMBIENT)", SYS.prctl, Prctl.CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
