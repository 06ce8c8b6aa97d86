"""Ctrl-C and SIGTERM during a migration: the first aborts in order, past the commit point it is refused."""

from __future__ import annotations

import enum
import signal

import trio

from migrate.events import Observer, Warned
from migrate.phases.session import Session
from protocol import messages as m
from protocol.errors import MigrateError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stage(enum.Enum):
    """What an interrupt may do now."""

    ABORTABLE = "abortable"  # cancel what is being waited for, then unwind
    CUTTING_OVER = "cutting-over"  # the source decides: ask it
    UNWINDING = "unwinding"  # it is being undone already
    COMMITTED = "committed"  # too late


class Interrupts:
    """Turns signals into an orderly end. One per migration."""

    def __init__(self, tell: Observer) -> None:
        self._tell = tell
        self._stage = Stage.ABORTABLE
        self._session: Session | None = None
        self.requested = False
        self.scope = trio.CancelScope()

    def cutting_over(self, session: Session) -> None:
        """From here the source decides how it ends."""
        self._session = session
        self._stage = Stage.CUTTING_OVER

    def unwinding(self) -> None:
        """It is being undone."""
        self._stage = Stage.UNWINDING

    def committed(self) -> None:
        """The container runs at the target."""
        self._stage = Stage.COMMITTED

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Handle signals until cancelled. In the main thread only."""
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            async for _ in signals:
                await self.interrupt()

    async def interrupt(self) -> None:
        """What one signal does."""
        match self._stage:
            case Stage.ABORTABLE:
                self.requested = True
                self.scope.cancel()
            case Stage.CUTTING_OVER:
                self.requested = True
                await self._ask_source()
            case Stage.UNWINDING:
                self._tell(Warned(text="the migration is being undone; this is bounded, please wait"))
            case Stage.COMMITTED:
                self._tell(
                    Warned(text="not aborted: the container runs at the target already; waiting for the clean-up")
                )

    async def _ask_source(self) -> None:
        assert self._session is not None
        session = self._session
        try:
            await session.source.request(m.Abort(migration=session.migration, reason="interrupted"), m.Done)
        except MigrateError as error:
            self._tell(Warned(text=f"not aborted: {error.message}"))
