"""One asyncio loop in a thread of its own, for asyncssh, behind trio.

One await in trio is one task in asyncio. When the trio side is cancelled the task is cancelled and waited for, so
that nothing runs on behind the coordinator's back; a task that does not end has its transport aborted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import trio

from protocol.errors import PeerError

T = TypeVar("T")

UNWIND_S = 5.0  # SSH closes in round trips; a link that needs longer than this is gone.


class Bridge:
    """The thread and its loop; a context manager. Calls come from trio only."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="asyncio", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what is left, stop the loop, wait for the thread; bounded (the thread is a daemon)."""
        closing = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
        try:
            closing.result(UNWIND_S)
        except concurrent.futures.TimeoutError:
            closing.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(UNWIND_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` in the loop's thread, soon; its result is not waited for."""
        self._loop.call_soon_threadsafe(function, *args)

    async def run(
        self,
        function: Callable[..., Coroutine[Any, Any, T]],
        *args: object,
        abort: Callable[[], object] | None = None,
        unwind_s: float = UNWIND_S,
    ) -> T:
        """Await `function(*args)` as one asyncio task.

        On cancellation the task is cancelled and waited for, `unwind_s` at most; then `abort` runs in the loop's
        thread, and the task gets as long again to notice.

        Raises: what the coroutine raises; PeerError: the loop was closed under it.
        """
        token = trio.lowlevel.current_trio_token()
        finished = trio.Event()
        tasks: list[asyncio.Task[T]] = []

        def wake(_task: asyncio.Task[T]) -> None:
            try:
                token.run_sync_soon(finished.set)
            except trio.RunFinishedError:
                return  # trio has ended: nobody waits any more

        def start() -> None:
            task = self._loop.create_task(function(*args))
            tasks.append(task)
            task.add_done_callback(wake)

        def cancel() -> None:
            tasks[0].cancel()  # runs after `start`: the loop keeps the order of its callbacks

        self._loop.call_soon_threadsafe(start)
        try:
            await finished.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            if not await _bounded_wait(finished, unwind_s) and abort is not None:
                self._loop.call_soon_threadsafe(abort)
                await _bounded_wait(finished, unwind_s)
            if finished.is_set() and not tasks[0].cancelled():
                tasks[0].exception()  # it is superseded by the cancellation; asyncio wants it taken note of
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError as error:
            raise PeerError("the connection was closed while an answer was waited for") from error


async def _bounded_wait(event: trio.Event, timeout_s: float) -> bool:
    with trio.move_on_after(timeout_s, shield=True):
        await event.wait()
    return event.is_set()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
