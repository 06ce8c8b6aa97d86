"""The dump of one frozen process, but for its pages and open files.

What can be opened, placed and planned before the freeze is; in it, one batch of calls runs in each thread at the same
time, and the thread has its own registers back before anything else is done.
"""

from __future__ import annotations

import contextlib
import signal

import msgspec

from agent.engine.native import sections, tree
from agent.engine.native.freeze import FrozenProcess
from agent.engine.native.injection import ARENA_BYTES, Injection
from agent.engine.native.tasks import (
    credentials, memory, procfs, process, registers, rseq, scheduling, signals, threads, timers,
)  # fmt: skip
from agent.engine.native.tasks.plan import CallPlan, Later
from agent.engine.native.tracee import Tracee
from agent.kernel import ptrace
from agent.kernel.memory import process_vm_read
from agent.kernel.unistd import SYS
from protocol.errors import MigrateError, TaskGoneError, UnsupportedError
