"""The source's engine: the order of work, from arming the tracker to letting go."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Sequence

from agent.engine import base
from agent.engine.native import files, sections, tree
from agent.engine.native.freeze import FrozenProcess, freeze_process
from agent.engine.native.ports import Ports
from agent.engine.native.rehearsal import Rehearsal
from agent.engine.native.source_dump import TaskDump
from agent.engine.native.source_task import Found, SourceTask
from agent.engine.native.stages import Clock, Deadline
from agent.ipc import PortClosedError
from agent.kernel.freezer import Freezer, OpenFreezer
from agent.kernel.urgent import Urgency
from agent.network import cut as network_cut
from protocol.errors import MigrateError, TaskGoneError, UnsupportedError
from protocol.messages import RoundReport

_log = logging.getLogger(__name__)

# A round of a large container over a slow link; the service has the time limit that matters.
_FLUSH_TIMEOUT_S = 24 * 3600.0
# Before the freeze the target makes threads and protections: milliseconds, on a loaded host seconds.
_AHEAD_TIMEOUT_S = 60.0
# Letting other tasks of this host run just before ours stop them: without it the container starts its freeze late.
_SETTLE_S = 0.006


class SourceEngine:
    """One container on its way out.

    Every method may raise MigrateError; `thaw` is legal then and always.
    """

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._task: SourceTask | None = None
        self._rehearsal = Rehearsal()
        self._urgency = Urgency()
        self._flushes = 0
        self._freeze: _Freeze | None = None
        self._catchers: _Freeze | None = None  # of a container that has gone: it forwards until this process ends

    # ------------------------------------------------------------ before the freeze

    def arm(self, request: base.SourceArm) -> base.SourceArmed:
        """Seize for a moment, arm the tracker, tell stream and target what comes."""
        refused = tree.check(request.pid)
        if refused:
            raise UnsupportedError(refused[0].message, code=refused[0].code, hint=refused[0].hint)
        self._rehearsal.start()
        self._task = SourceTask(request.pid, tree.INIT_TASK, tcp=request.tcp, storage=request.storage)
        begin = self._task.begin()
        stop_ms = self._task.arm()
        self._ports.stream.send(self._task.opened())
        self._send([begin])
        return base.SourceArmed(stop_ms=stop_ms)

    def rehearse(self) -> None:
        """After `arm`, while nobody waits for anything."""
        self._rehearsal.begin_source()

    def round(self, request: base.SourceRound) -> base.SourceRoundDone:
        """Everything that has changed since the last round, and wait until the target has it."""
        task = self._armed
        started = time.monotonic()
        scan = self._send_dirty()
        scan_ms = (time.monotonic() - started) * 1000
        flushed = self._flush(_FLUSH_TIMEOUT_S)
        return base.SourceRoundDone(
            report=RoundReport(
                round=request.round, dirty_bytes=scan.dirty_bytes,
                sent_bytes=max(0, flushed.read_bytes - flushed.zero_bytes), zero_bytes=flushed.zero_bytes,
                wire_bytes=flushed.wire_bytes, ms=(time.monotonic() - started) * 1000, scan_ms=scan_ms,
                remaining_bytes=task.dirty_bytes(),
            )
        )  # fmt: skip

    def _send_dirty(self) -> Found:
        """What has changed since the last scan: areas, pages, holes."""
        task = self._armed
        task.layout.look()
        self._send(task.layout.changed())
        scan = task.scan()
        self._send(task.layout.opened_for(scan.ranges))
        for runs in scan.reads(task.number, final=False):
            self._ports.stream.send(runs)
        self._send(scan.holes(task.number))
        return scan

    def _flush(self, timeout_s: float) -> base.Flushed:
        self._flushes += 1
        self._ports.stream.send(base.Flush(number=self._flushes))
        while True:
            flushed = self._ports.wait_stream(base.Flushed, timeout_s)
            if flushed.number == self._flushes:  # else: of a round that was given up
                return flushed

    # ------------------------------------------------------------ the freeze

    def cut_over(self, request: base.SourceCutOver) -> None:
        """All that can be done before, then the freeze; answers. After an error the container runs on, nothing is held.

        It stays urgent until the service has what it waits for: verify_stop, thaw or release end that.
        """
        freeze = _Freeze(self._ports, self._armed, request)
        self._freeze = freeze
        try:
            self._prepare(freeze)
            self._settle()
            dumped = freeze.run()
            self._ports.answer(dumped)
            self._ports.stream.send(base.ForwardPackets())
        except BaseException:
            self._freeze = None
            freeze.undo()
            # Nobody has heard of a dump: nobody can have given the container away.
            freeze.let_go()
            self._not_urgent()
            raise

    def _settle(self) -> None:
        """From here no garbage collection, and no other task of this host before ours."""
        gc.collect()
        gc.freeze()
        time.sleep(_SETTLE_S)
        self._urgency.begin()

    def _prepare(self, freeze: _Freeze) -> None:
        """The target builds all that is known; whatever takes long is opened, planned and looked up."""
        task = self._armed
        freeze.prepare()
        task.layout.look()
        self._send(task.layout.changed())
        self._send(task.layout.finished())
        self._send([freeze.dump.threads_section()])
        self._rehearsal.refresh_source()
        self._flush(_AHEAD_TIMEOUT_S)
        if task.is_copied:
            # All this took many times what a freeze takes: what was written meanwhile goes ahead too.
            self._send_dirty()
            self._send(task.layout.finished())
            self._flush(_AHEAD_TIMEOUT_S)
        self._ports.stream.send(base.Urgent(on=True))

    # ------------------------------------------------------------ after it

    def verify_stop(self) -> base.SourceStopVerified:
        """Whether every task still stands where it was dumped."""
        if self._freeze is None:
            return base.SourceStopVerified(unbroken=False, detail="nothing is frozen")
        detail = self._freeze.broken()
        self._urgency.end()
        return base.SourceStopVerified(unbroken=not detail, detail=detail)

    def thaw(self) -> None:
        """Everything back, in the order that loses nothing; idempotent. On request of the service only, see `release`.

        The control group is thawed last.
        """
        freeze, self._freeze = self._freeze, None
        if freeze is not None:
            freeze.undo()
            freeze.let_go()
            self._not_urgent()
        self._rehearsal.close()
        if self._task is not None:
            self._task.close()
            self._task = None

    def release(self) -> None:
        """Let go and change nothing: the tasks stay frozen, their sockets in repair mode, the network cut off.

        For tasks that the service has killed, which their runtime can delete then; and for those of a dump that was
        handed over, when the service is gone: what it has decided is not known here, the next agent knows it.
        """
        freeze, self._freeze = self._freeze, None
        if freeze is not None:
            freeze.release()
            self._catchers = freeze
            self._not_urgent()
        self._rehearsal.close()
        if self._task is not None:
            self._task.close()
            self._task = None

    # ------------------------------------------------------------ helpers

    def _not_urgent(self) -> None:
        self._urgency.end()
        with contextlib.suppress(PortClosedError):
            self._ports.stream.send(base.Urgent(on=False))

    @property
    def _armed(self) -> SourceTask:
        if self._task is None:
            raise MigrateError("nothing is armed", code="process")
        return self._task

    def _send(self, list_of_sections: Sequence[sections.Section]) -> None:
        for section in list_of_sections:
            self._ports.send_section(sections.encode(section))


class _Freeze:
    """One freeze of one container, with the undo of each step beside it."""

    def __init__(self, ports: Ports, task: SourceTask, request: base.SourceCutOver) -> None:
        self._ports = ports
        self._task = task
        self._request = request
        self._frozen: FrozenProcess | None = None
        self._files: files.PreparedDump | None = None
        self._cuts: list[network_cut.Cut] = []
        self._group = Freezer.of(task.pid)
        self._freezer = OpenFreezer(self._group)
        self._is_held = False
        self.dump: TaskDump

    def prepare(self) -> None:
        """Before anything stops."""
        task = self._task
        for interface in self._request.cut:
            prepared = network_cut.prepare_cut(interface)
            self._cuts.append(prepared)
            self._ports.stream.send(base.CapturePackets(), [prepared.capture_socket().fileno()])
        self._files = files.PreparedDump.prepare(task.pid, task.tcp, task.storage)
        self.dump = TaskDump(task.pid, task.number)

    def run(self) -> base.SourceDumped:
        """Stop, look, hand over. Everything sent is in the order in which the target applies it."""
        task, ports = self._task, self._ports
        clock = Clock()
        deadline = Deadline(self._request.freeze_budget_s)
        self._frozen = freeze_process(task.pid, self._request.freeze_budget_s)
        clock.part("freeze")
        self._cut()
        clock.part("network cut")
        # Before our own scratch is among the areas.
        task.layout.look(in_freeze=True)
        clock.part("areas")
        self.dump.start(self._frozen, task.layout.lines)
        clock.part("ask threads")
        scan = task.scan_final()
        clock.part("scan")
        self.dump.finish()
        clock.part("answers")
        self._hold()
        clock.part("freeze group")
        ports.answer(base.SourceFrozen(monotonic_ns=clock.started_ns, tasks=sorted(self._frozen.tracees)))
        deadline.check()
        for section in (*self.dump.threads_changed(), *task.layout.changed()):
            ports.send_section(sections.encode(section))
        # Before the pages, in which it has no part: the target works on it while they are on their way.
        state = self.dump.state()
        ports.send_section(sections.encode(state))
        clock.part("dump tasks")
        for section in task.layout.opened_for(scan.ranges):
            ports.send_section(sections.encode(section))
        for runs in scan.reads(task.number, final=True):
            ports.stream.send(runs)
        for section in (*scan.holes(task.number), *task.layout.finished()):
            ports.send_section(sections.encode(section))
        clock.part("hand over pages")
        deadline.check()
        assert self._files is not None
        dumped_files = self._files.dump()
        clock.part("dump files")
        deadline.check()
        ports.send_section(sections.encode(sections.FilesStateSection(task=task.number, files=dumped_files)))
        ports.send_section(sections.encode(sections.CompleteSection()))
        clock.part("hand over rest")
        return base.SourceDumped(
            parts=clock.parts, dirty_bytes=scan.dirty_bytes, pids=[state.threads[0].tid],
            connections=sum(isinstance(record, files.TcpConnection) for record in dumped_files.objects),
        )  # fmt: skip

    def _hold(self) -> None:
        """From here on our end is no thaw: a task that ran while its sockets are in repair mode could not send."""
        self._is_held = True
        self._freezer.freeze()

    def let_go(self) -> None:
        """Undo `_hold`, after `undo`."""
        if self._is_held:
            self._is_held = False
            with contextlib.suppress(TaskGoneError):
                self._group.thaw()

    def _cut(self) -> None:
        for prepared in self._cuts:
            prepared.cut()

    def broken(self) -> str:
        """Why the stop is not the same any more; '': it is."""
        if self._frozen is None:
            return "nothing is frozen"
        return "" if self._frozen.still_frozen() else "a task has left its stop"

    def undo(self) -> None:
        """Sockets out of repair mode, network back, and only then the tasks: each step whatever the others did."""
        with contextlib.ExitStack() as steps:
            steps.callback(self._close)
            if self._frozen is not None:
                steps.callback(self._frozen.thaw)
            for prepared in self._cuts:
                if prepared.is_cut:
                    steps.callback(prepared.uncut)
            if self._files is not None:
                steps.callback(self._files.undo)
            if hasattr(self, "dump"):
                steps.callback(self.dump.undo)

    def release(self) -> None:
        """Detach. The control group holds what lives; the catchers stay, packets may come here for a while yet."""
        if self._frozen is not None:
            self._frozen.thaw()
        self._close_files()

    def _close(self) -> None:
        for prepared in self._cuts:
            prepared.close()
        self._cuts.clear()
        self._close_files()

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()
            self._files = None
        self._freezer.close()
        if hasattr(self, "dump"):
            self.dump.close()
