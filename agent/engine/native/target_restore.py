"""The last steps of a target's process, while the source is frozen: state, files, registers, freezer, detach."""

from __future__ import annotations

import contextlib
import resource
import signal

from agent.engine.native import files, sections
from agent.engine.native.injection import Injection
from agent.engine.native.target_task import TargetTask
from agent.engine.native.tasks import credentials, process, registers, rseq, scheduling, signals, threads, timers
from agent.engine.native.tracee import Tracee
from agent.kernel import procfs, ptrace
from agent.kernel.freezer import OpenFreezer
from agent.kernel.unistd import SYS
from protocol.errors import RemoteProtocolError

_FREEZE_TIMEOUT_S = 2.0


class FinalRestore:
    """Raises (all methods): KernelError, UnsupportedError, RemoteProtocolError, TaskGoneError."""

    def __init__(self, task: TargetTask) -> None:
        self._task = task
        self._state: sections.StateSection | None = None
        self._tracees: list[Tracee] = []
        self._injection: Injection

    def apply_state(self, state: sections.StateSection) -> None:
        """Everything of process and threads that needs none of the last pages, in two waves of calls of their own.

        Credentials of all threads first: a change of any makes the process undumpable. Signal actions before pending
        signals: setting 'ignore' throws those away.
        """
        task = self._task
        self._state = state
        self._tracees = task.threads([thread.tid for thread in state.threads])
        _raise_file_limit(task.pid, state)
        self._injection = injection = Injection(task.remote, self._tracees[1:])
        now = credentials.of_status(procfs.read_status(task.pid))
        leader, others = injection.plan()
        signals.restore_actions(state.actions, leader)
        process.restore(state.attributes, leader)
        for thread, plan in zip(state.threads, (leader, *others), strict=True):
            credentials.restore(thread.credentials, now, plan)
        injection.run(leader, others)
        leader, others = injection.plan()
        process.restore_dumpable(state.attributes, leader)
        for thread, plan in zip(state.threads, (leader, *others), strict=True):
            threads.restore(thread.attributes, plan)
            signals.restore_pending(thread.pending, plan, tgid=task.container_pid, tid=thread.tid)
        injection.run(leader, others)
        process.restore_oom_score(state.attributes, task.pid)
        for thread, tracee in zip(state.threads, self._tracees, strict=True):
            scheduling.restore(thread.scheduling, tracee.tid)

    def apply_files(self, section: sections.FilesStateSection, network_namespace: str = "") -> files.RestoredFiles:
        """Open files, sockets still in repair mode. `network_namespace`: path; '': the process's own."""
        task = self._task
        context = files.RestoreContext(pid=task.pid, remote=task.remote, network_namespace=network_namespace)
        return files.restore(section.files, context)

    def complete(self, freezer: OpenFreezer | None) -> None:
        """All pages are there: what the kernel acts on at once, registers, the freezer while all stand, then let go.

        `freezer`: None in a rehearsal.
        """
        state = self._state
        if state is None:
            raise RemoteProtocolError("complete, but no state came")
        task = self._task
        # After the last pages, so that none is made twice.
        task.lock()
        leader, others = self._injection.plan()
        for thread, plan in zip(state.threads, (leader, *others), strict=True):
            rseq.restore(thread.rseq, plan)
        timers.restore(state.timers, leader)
        process.restore_limits(state.attributes, task.pid, leader)
        self._injection.run(leader, others)
        self._restore_ignored_trap(state)
        task.remote.unmap_scratch()
        shared = state.threads[0].pending.shared
        for thread, tracee in zip(state.threads, self._tracees, strict=True):
            waiting = signals.PendingSignals(private=thread.pending.private, shared=shared)
            registers.restore(
                thread.registers, tracee,
                has_unblocked_signal=signals.is_unblocked_pending(waiting, thread.registers.blocked),
            )  # fmt: skip
        if freezer is not None:
            freezer.freeze()
            freezer.wait_frozen(_FREEZE_TIMEOUT_S)
        for tracee in self._tracees:
            ptrace.set_options(tracee.tid, ptrace.Option.NONE)
        for tracee in self._tracees[::-1]:
            tracee.detach()

    def _restore_ignored_trap(self, state: sections.StateSection) -> None:
        """The traps at the ends of batches have made an ignored SIGTRAP the default; this call ends in none."""
        action = signals.ignored_trap(state.actions)
        if action is not None:
            remote = self._task.remote
            remote.reset()
            remote.call(SYS.rt_sigaction, signal.SIGTRAP, remote.place(action), 0, signals.SIGSET_BYTES)


def _raise_file_limit(pid: int, state: sections.StateSection) -> None:
    """Descriptors are put under their numbers before the limits are set; it must be wide enough for them."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    wanted = state.attributes.limits[resource.RLIMIT_NOFILE]
    with contextlib.suppress(ValueError, PermissionError):  # told with a better text when all limits are set
        if soft != resource.RLIM_INFINITY and soft < hard:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, max(hard, wanted.hard)))
