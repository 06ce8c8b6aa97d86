"""The target's engine: the order of work, from the runtime's init to a container that is complete and frozen."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal

from agent.engine import base
from agent.engine.native import sections
from agent.engine.native.intercept import InterceptedProcess, intercept_exec
from agent.engine.native.ports import Ports
from agent.engine.native.rehearsal import Rehearsal
from agent.engine.native.stages import Clock, Stage
from agent.engine.native.target_restore import FinalRestore
from agent.engine.native.target_task import TargetTask
from agent.engine.native.tree import INIT_TASK
from agent.kernel import pidfd
from agent.kernel.freezer import Freezer, OpenFreezer
from agent.kernel.urgent import Urgency
from protocol.errors import MigrateError, RemoteProtocolError, TaskGoneError

_log = logging.getLogger(__name__)

_STARTER_TIMEOUT_S = 10.0


class TargetEngine:
    """One container on its way in. Every method may raise MigrateError; `discard` is legal then and always."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._intercepted: InterceptedProcess | None = None
        self._task: TargetTask | None = None
        self._final: FinalRestore | None = None
        self._rehearsal = Rehearsal()
        self._urgency = Urgency()
        self._freezer: Freezer
        self._open_freezer: OpenFreezer | None = None
        self._pidfd = -1
        self._repaired: list[base.RepairedSocket] = []
        self._clock: Clock | None = None
        self.stage: Stage | None = None

    # ------------------------------------------------------------ requests of the service

    def intercept(self, request: base.TargetIntercept) -> base.TargetIntercepted:
        """Let the runtime build the container, and take it over before its first instruction."""
        self._pidfd = pidfd.pidfd_open(request.pid)
        self._freezer = Freezer.of(request.pid)
        self._open_freezer = OpenFreezer(self._freezer)
        intercepted = intercept_exec(request.pid, request.start_argv)
        self._intercepted = intercepted
        status = intercepted.wait_starter(_STARTER_TIMEOUT_S)
        if status:
            raise MigrateError(
                f"`{' '.join(request.start_argv)}` ended with status {status}: {intercepted.starter_output()}",
                code="start-failed",
            )
        self._rehearsal.start()
        self._task = TargetTask(INIT_TASK, intercepted.tracee)
        self.stage = Stage.INTERCEPTED
        return base.TargetIntercepted(pid=request.pid)

    def rehearse(self) -> None:
        """After `intercept`, while nobody waits for anything."""
        self._rehearsal.begin_target()

    def _be_urgent(self, *, on: bool) -> None:
        """Between the last round and RUNNING."""
        if on:
            gc.collect()
            self._urgency.begin()
        else:
            self._urgency.end()
        self._ports.stream.send(base.Urgent(on=on))

    def close(self) -> None:
        """Whatever is not the container; idempotent."""
        self._urgency.end()
        self._rehearsal.close()
        if self._open_freezer is not None:
            self._open_freezer.close()

    def discard(self) -> None:
        """Kill what was built; idempotent."""
        self.close()
        if self._task is not None:
            self._task.close()
            self._task = None
        if self._pidfd >= 0:
            with contextlib.suppress(TaskGoneError):
                pidfd.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                if self.stage is Stage.COMPLETE:
                    # A frozen task dies when it is thawed, without another instruction of its program.
                    self._freezer.thaw()
            os.close(self._pidfd)
            self._pidfd = -1
        if self._intercepted is not None:
            self._reap(self._intercepted)
            self._intercepted = None

    def _reap(self, intercepted: InterceptedProcess) -> None:
        """A dead task that we traced is a zombie until we have looked; while it is frozen it is not dead yet."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(intercepted.tracee.tid, os.WNOHANG | 0x40000000)
        if intercepted.starter.poll() is None:
            intercepted.starter.kill()
            intercepted.starter.wait()

    # ------------------------------------------------------------ sections of the source

    def apply(self, payload: bytes) -> base.TargetRestored | None:
        """One section; the last gives the answer that the service waits for."""
        section = sections.decode(payload)
        # The last pages have no part in these: they are written, and what follows is brought, meanwhile.
        is_beside_pages = isinstance(section, sections.StateSection | sections.FilesStateSection)
        if is_beside_pages:
            self._ports.stream.send(base.SectionApplied())
        restored = self._apply(section)
        if not is_beside_pages:
            # Before any answer: once the service has that, nobody needs this process any more.
            self._ports.stream.send(base.SectionApplied())
        return restored

    def _apply(self, section: sections.Section) -> base.TargetRestored | None:
        task, final = self._task, self._final
        if task is None:
            raise RemoteProtocolError("a section came before the container was there")
        match section:
            case sections.StateSection():
                self._apply_state(task, section)
            case sections.FilesStateSection():
                self._apply_files(final, section)
            case sections.CompleteSection():
                return self._complete(task, final)
            case _:
                self._build(task, section)
        return None

    def _build(self, task: TargetTask, section: sections.Section) -> None:
        """What may come before the freeze."""
        match section:
            case sections.BeginSection():
                task.begin(section)
                self._ports.stream.send(task.opened())
                self.stage = Stage.STRIPPED
            case sections.LayoutSection():
                if self._clock is None:
                    self._be_urgent(on=False)
                task.lay_out(section.areas)
                self.stage = Stage.FILLING
            case sections.ProtectSection():
                task.protect(section)
            case sections.HolesSection():
                task.drop(section)
            case sections.ThreadsSection():
                self._make_threads(task, section)

    def _make_threads(self, task: TargetTask, section: sections.ThreadsSection) -> None:
        task.make_threads(section.tids)
        self.stage = Stage.THREADED
        if not section.in_freeze:
            self._rehearsal.refresh_target()
            self._be_urgent(on=True)

    def _apply_state(self, task: TargetTask, section: sections.StateSection) -> None:
        self._clock = Clock()
        self._final = FinalRestore(task)
        self._final.apply_state(section)
        self._clock.part("restore tasks")
        self.stage = Stage.FINAL

    def _apply_files(self, final: FinalRestore | None, section: sections.FilesStateSection) -> None:
        if final is None or self._clock is None:
            raise RemoteProtocolError("files came before the state of the task")
        self._clock.part("wait for files")
        restored = final.apply_files(section)
        self._repaired = restored.repaired
        self._ports.stream.send(base.ReleasePackets(receive_next=restored.receive_next))
        self._clock.part("restore files")
        self.stage = Stage.FILES

    def _complete(self, task: TargetTask, final: FinalRestore | None) -> base.TargetRestored:
        if final is None or self._clock is None or self.stage is not Stage.FILES:
            raise RemoteProtocolError("complete, but not all has come")
        final.complete(self._open_freezer)
        self._clock.part("registers and freezer")
        self.stage = Stage.COMPLETE
        return base.TargetRestored(parts=self._clock.parts, pids=task.own_pids, repaired=self._repaired)
