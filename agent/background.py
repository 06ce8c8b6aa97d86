"""Tasks that nobody may be waiting for: what goes wrong in one is in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from protocol.errors import MigrateError

_log = logging.getLogger(__name__)


def start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Run `work` as a task. Its failure is logged as `name` when it ends, and raised to whoever awaits the task."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell)
    return task


def _tell(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if isinstance(error, MigrateError):
        _log.warning("%s: %s", task.get_name(), error)
    elif error is not None:
        _log.error("%s failed", task.get_name(), exc_info=error)
