"""One side of a migration in this process: the real journal and undo, stand-ins for processes, runtime and freezer."""

from __future__ import annotations

import asyncio
import json
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import containers, reclaim, undo, worker
from agent.engine import base
from agent.engine.native import files
from agent.host import Host
from agent.journal import Journal
from agent.kernel.freezer import Freezer
from agent.network import build
from agent.runtimes.base import RuntimeContainer
from agent.settings import Settings
from agent.source import SourceMigration
from agent.target import TargetMigration
from agent.worker import Workers
from protocol import link_messages as link
from protocol import messages as m
from protocol.errors import MigrateError, TaskGoneError
from protocol.states import Side, State

ID = "side-test-1"

Answer = msgspec.Struct | BaseException | Callable[[], Any] | None


class FakeWorker:
    """Answers by a table; what is not in it is never answered."""

    def __init__(self, name: str, answers: dict[type, Answer], log: list[Any]) -> None:
        self.inbox = worker._Inbox()
        self.log = log
        self.answers = answers
        self.is_closed = False
        self.port = types.SimpleNamespace(send=lambda record, _fds=(): self.log.append(type(record).__name__))
        self.process = types.SimpleNamespace(kill=lambda: log.append(f"{name} killed"), wait=self._wait)

    async def _wait(self) -> int:
        return 0

    async def ask(self, record: Any, *answers: type, fds: Any = (), despite_failure: bool = False) -> Any:
        self.log.append(type(record).__name__)
        answer = self.answers.get(type(record))
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer = answer()
        if isinstance(answer, msgspec.Struct):
            self.inbox.put(answer)
        return await self.inbox.get(*answers, despite_failure=despite_failure)

    async def close(self) -> None:
        self.is_closed = True
        self.inbox.fail(MigrateError("the process was ended", code="ended"), lasting=True, closed=True)


class Runtime:
    """A runtime whose create can be held up."""

    kind: str = "runc"
    root: str = "/run/runc"

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.may_create = threading.Event()
        self.may_create.set()
        self.creating = threading.Event()
        self.there: set[str] = set()

    def version(self) -> str:
        return "fake"

    def containers(self) -> list[RuntimeContainer]:
        return [RuntimeContainer(name=name, pid=1, status="created", bundle="/b") for name in self.there]

    def find(self, name: str) -> RuntimeContainer | None:
        return next((item for item in self.containers() if item.name == name), None)

    def create(self, name: str, bundle: str, **_: Any) -> RuntimeContainer:
        self.creating.set()
        assert self.may_create.wait(10)
        self.there.add(name)
        return RuntimeContainer(name=name, pid=4711, status="created", bundle=bundle)

    def start_argv(self, name: str) -> list[str]:
        return ["runc", "start", name]

    def delete(self, name: str) -> None:
        self.log.append(f"{name} deleted")
        self.there.discard(name)


class FakeFreezer:
    paths = ("/sys/fs/cgroup/freezer/no-such-group",)

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def freeze(self) -> None:
        self.log.append("frozen")

    def wait_frozen(self, timeout_s: float) -> None:
        pass

    def thaw(self) -> None:
        self.log.append("thawed")

    def processes(self) -> list[int]:
        return [4711]


class Network:
    """A built network."""

    def __init__(self, log: list[Any], error: Exception | None = None) -> None:
        self.log, self.error = log, error
        self.host_names = ["mg1"]

    def attach(self) -> None:
        self.log.append("attached")
        if self.error is not None:
            raise self.error

    def announce(self) -> None:
        self.log.append("announced")

    def close(self) -> None:
        self.log.append("network closed")


class SideRig:
    """Everything that happens, in order, is in `log`."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.journal = Journal(tmp_path / "state")
        self.runtime = Runtime(self.log)
        self.host = Host(
            name="hostA", settings=Settings(state_dir=str(tmp_path / "state")), journal=self.journal,
            runtimes=(self.runtime,), missing_runtimes={},
        )  # fmt: skip
        self.bundle = tmp_path / "bundle"
        self.bundle.mkdir()
        self.config = json.dumps({"process": {"args": ["sh"]}})
        (self.bundle / "config.json").write_text(self.config)
        self.report = m.ContainerReport(
            name="web1", runtime="runc", status="running", pid=4711, bundle=str(self.bundle),
            config_json=self.config.encode(), memory_bytes=1, network=m.Network(kind="none"), executable="/bin/sh",
        )  # fmt: skip
        self.may_start_workers = asyncio.Event()
        self.may_start_workers.set()
        self.starting = asyncio.Event()
        self.started: list[Workers] = []
        self.engine: dict[type, Answer] = {
            base.SourceArm: base.SourceArmed(stop_ms=1.0),
            base.SourceCutOver: base.SourceFrozen(monotonic_ns=0, tasks=[4711]),
            base.SourceVerifyStop: base.SourceStopVerified(unbroken=True),
            base.SourceThaw: base.EngineDone(),
            base.SourceRelease: base.EngineDone(),
            base.TargetIntercept: base.TargetIntercepted(pid=4711),
        }
        self.stream: dict[type, Answer] = {
            base.StreamMakeKey: base.StreamKey(public_key="ssh-ed25519 AAAA"),
            base.StreamConnect: base.StreamUp(),
            base.StreamListen: base.StreamListening(port=7100, host_key="ssh-ed25519 AAAA"),
            base.StreamGetCounters: base.StreamCounters(),
        }
        web1 = RuntimeContainer(name="web1", pid=4711, status="running", bundle=str(self.bundle))
        monkeypatch.setattr(Workers, "start", self._start_workers)
        monkeypatch.setattr(Workers, "send_link", lambda _, message: self.log.append(message))
        monkeypatch.setattr(containers, "find", lambda *_: containers.Found(self.runtime, web1))
        monkeypatch.setattr(containers, "report", lambda *_, **__: self.report)
        monkeypatch.setattr(Freezer, "of", lambda _: FakeFreezer(self.log))
        monkeypatch.setattr(Freezer, "at", lambda _: FakeFreezer(self.log))
        monkeypatch.setattr(undo, "open_runtime", lambda *_: self.runtime)
        monkeypatch.setattr(files, "leave_repair_everywhere", self._gone)
        monkeypatch.setattr(build, "remove_network", lambda *_: None)
        monkeypatch.setattr(reclaim, "activate_sockets", lambda _: self.log.append("sockets activated"))
        for name in ("kill_source_copy", "delete_source_container", "forget_source_network"):
            monkeypatch.setattr(reclaim, name, lambda _, name=name: self.log.append(name))

    def _gone(self, pid: int) -> int:
        raise TaskGoneError(f"process {pid} is gone")

    async def _start_workers(self, side: Side, on_lost: Any) -> Workers:
        self.starting.set()
        await self.may_start_workers.wait()
        engine: Any = FakeWorker("engine", self.engine, self.log)
        stream: Any = FakeWorker("stream", self.stream, self.log)
        self.started.append(Workers(engine, stream, on_lost))
        return self.started[-1]

    def source(self) -> SourceMigration:
        request = m.BeginSource(migration=ID, epoch=1, container="web1", target="hostB")
        return SourceMigration(self.host, request, "ann")

    def target(self) -> TargetMigration:
        request = m.PrepareTarget(
            migration=ID, epoch=1, source="hostB", container=self.report, new_name="web1",
            client_public_key="ssh-ed25519 AAAA", monotonic_offset_ns=0,
        )  # fmt: skip
        return TargetMigration(self.host, request, "ann")

    @property
    def live(self) -> Workers:
        return self.started[-1]

    def state(self, side: Side) -> State:
        entry = self.journal.find(ID, side)
        assert entry is not None
        return entry.state

    def sent(self, kind: type) -> list[Any]:
        """Messages of one kind to the other agent."""
        return [item for item in self.log if isinstance(item, kind)]

    def all_closed(self) -> bool:
        return all(process.is_closed for live in self.started for process in (live.engine, live.stream))  # type: ignore[attr-defined]

    def restored(self) -> None:
        """The target's engine has built everything."""
        self.live.stream.inbox.put(base.StreamUp())
        self.live.link.put(link.LinkFreezing(migration=ID))
        self.live.engine.inbox.put(base.TargetRestored(parts={}, pids=[1], repaired=[]))

    def dumped(self) -> None:
        self.live.engine.inbox.put(base.SourceDumped(parts={}, dirty_bytes=0, pids=[1], connections=0))

    def link_restored(self) -> None:
        self.live.link.put(link.LinkRestored(migration=ID))
