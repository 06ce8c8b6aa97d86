"""A short time in which this process goes before others of its host: SCHED_FIFO, and no garbage collection."""

from __future__ import annotations

import gc
import logging
import os
import time

_log = logging.getLogger(__name__)

# Above nothing that matters to a host: the kernel's own real-time threads are at 50 and 99.
_PRIORITY = 10
# A host gives real-time tasks 0.95 s of each second, a control group often less (0.2 s); who uses it up stands still
# for the rest of that second. Source: sched-rt-group.rst.
_MAX_CPU_S = 0.05


class Urgency:
    """For the calling thread; `begin` and `end` are idempotent. Without the right to it there is a line in the log."""

    def __init__(self, priority: int = _PRIORITY) -> None:
        self._parameter = os.sched_param(priority)
        self._before: tuple[int, os.sched_param] | None = None
        self._began_s = 0.0
        self._is_on = False
        self._is_told = False

    def begin(self) -> None:
        """From here on, until `end`."""
        if self._is_on:
            return
        self._is_on = True
        gc.disable()
        self._began_s = time.thread_time()
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            # Not for children: the control group of a container takes no real-time task.
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, self._parameter)
        except PermissionError:
            if not self._is_told:
                self._is_told = True
                _log.warning("no right to SCHED_FIFO: the freeze may take longer on a busy host")
            return
        self._before = before

    def relax(self) -> None:
        """Give the priority back when it was used for long: more than a freeze of milliseconds needs."""
        if self._before is not None and time.thread_time() - self._began_s > _MAX_CPU_S:
            self._give_back()

    def end(self) -> None:
        """Undo `begin`."""
        if self._is_on:
            self._is_on = False
            self._give_back()
            gc.enable()

    def _give_back(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            os.sched_setscheduler(0, *before)
