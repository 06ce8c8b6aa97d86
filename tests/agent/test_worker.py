"""How the service hears of its engine and stream processes: answers, failures, deaths. The processes are stand-ins."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any

import pytest

from agent import ipc, worker
from agent.engine import base
from agent.worker import Worker, Workers
from protocol import codec
from protocol.errors import AbortedError, MigrateError, PeerError
from protocol.framing import FrameKind
from protocol.link_messages import LinkAbort, LinkCommit, LinkFailed, LinkRestored, LinkRunning
from protocol.messages import Failure
from protocol.states import Side
from tests.lab.host import PROJECT

# A stream process that answers the records of its service by its own rules.
_STAND_IN = """
import os, signal, socket, sys
from agent import ipc
from agent.engine import base
from protocol.framing import FrameKind
from protocol.messages import Failure
port = ipc.Port(socket.socket(fileno=int(sys.argv[1])), base.ToStream, "service")
while True:
    try:
        frame = port.receive()
    except ipc.PortClosedError:
        break
    if frame.kind is FrameKind.AGENT:
        port.send_frame(FrameKind.AGENT, frame.payload)
        continue
    match record := port.parse(frame):
        case base.StreamMakeKey():
            port.send(base.StreamKey(public_key="key"))
        case base.StreamGetCounters():
            port.send(base.StreamFailed(failure=Failure(
                family="unreachable", code="link-lost", message="the link broke", host="hostB", hint="look at it")))
        case base.StreamReplay():
            (fd,) = port.take_fds(1)
            port.send(base.StreamReplayed(packets=len(os.read(fd, 100))))
        case base.StreamListen(address="die"):
            os.kill(os.getpid(), signal.SIGKILL)
        case base.StreamListen(address="mumble"):
            port.socket.sendall(b"\\xffwhat")
        case base.StreamListen(address="lie"):
            port.send_frame(FrameKind.LOCAL, b"\\x81\\xa4type\\xa4Nope")
        case base.StreamListen(address="deaf"):
            port.send(base.StreamUp())
            signal.pause()
"""


def listen(address: str) -> base.StreamListen:
    return base.StreamListen(
        address=address, ports=[], client_public_key="", peer_address="", migration="aaaa", epoch=1
    )


class Rig:
    def __init__(self) -> None:
        self.lost: list[MigrateError] = []

    async def start(self, name: str = "stream") -> Worker:
        ours, theirs = ipc.make_pair()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _STAND_IN, str(theirs.fileno()), pass_fds=[theirs.fileno()], cwd=PROJECT
        )
        theirs.close()
        made = Worker(name, process)
        made.on_lost = self.lost.append
        made.port = ipc.AsyncPort(ours, base.FromStream, name, on_frame=made._frame, on_closed=made._closed)
        return made


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(bounded())


def test_a_request_gets_its_answer_and_descriptors_go_with_it():
    async def main() -> None:
        rig = Rig()
        stream = await rig.start()
        assert await stream.ask(base.StreamMakeKey(), base.StreamKey) == base.StreamKey(public_key="key")
        read_end, write_end = os.pipe()
        os.write(write_end, b"abc")
        answer = await stream.ask(base.StreamReplay(), base.StreamReplayed, fds=[read_end])
        assert answer.packets == 3
        os.close(read_end)
        os.close(write_end)
        await stream.close()
        assert (stream.process.returncode, rig.lost) == (0, [])

    run(main())


def test_a_reported_failure_reaches_who_waits_now_and_who_asks_later():
    async def main() -> None:
        rig = Rig()
        stream = await rig.start()
        for _ in range(2):
            with pytest.raises(PeerError, match="hostB: the link broke") as caught:
                await stream.ask(base.StreamGetCounters(), base.StreamCounters)
            assert (caught.value.code, caught.value.hint) == ("link-lost", "look at it")
        assert str(rig.lost[0]) == "hostB: the link broke (look at it)"
        await stream.close()

    run(main())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("die", "the stream process ended unexpectedly"),
        ("mumble", "the stream process ended unexpectedly"),
        ("lie", "the stream process is not understood"),
    ],
)
def test_a_process_that_dies_or_talks_nonsense_fails_every_request(how: str, says: str):
    async def main() -> None:
        rig = Rig()
        stream = await rig.start()
        with pytest.raises(MigrateError, match=says):
            await stream.ask(listen(how), base.StreamListening)
        with pytest.raises(MigrateError, match=says if how == "lie" else "gone"):
            await stream.ask(base.StreamMakeKey(), base.StreamUp)
        with pytest.raises(MigrateError, match=says):
            await stream.inbox.get(base.StreamUp)
        assert len(rig.lost) == 1
        await stream.close()

    run(main())


def test_who_waits_is_told_when_we_end_the_process():
    async def main() -> None:
        stream = await Rig().start()
        waiting = asyncio.create_task(stream.inbox.get(base.StreamUp))
        await asyncio.sleep(0)
        await stream.close()
        with pytest.raises(MigrateError, match="the stream process was ended"):
            await waiting

    run(main())


def test_a_process_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "_EXIT_TIMEOUT_S", 0.1)

    async def main() -> None:
        stream = await Rig().start()
        await stream.ask(listen("deaf"), base.StreamUp)
        await stream.close()
        assert stream.process.returncode == -9

    run(main())


class Pair(Rig):
    async def workers(self) -> Workers:
        return Workers(await self.start("engine"), await self.start("stream"), self.lost.append)


def failed(message: str) -> LinkFailed:
    failure = Failure(family="unsupported", code="x", message=message, host="hostB", hint="")
    return LinkFailed(migration="aaaa", failure=failure)


def test_messages_of_the_other_agent_are_kept_until_somebody_takes_them():
    """The stand-in sends back what it was given for the other side."""

    async def main() -> None:
        pair = Pair()
        workers = await pair.workers()
        workers.send_link(LinkCommit(migration="aaaa", epoch=3))
        workers.send_link(LinkRestored(migration="aaaa", parts={"x": 1.0}, pids=[1, 7]))
        restored = await workers.link.get(LinkRestored)
        assert (restored.parts, restored.pids) == ({"x": 1.0}, [1, 7])
        assert (await workers.link.get(LinkRunning, LinkCommit)) == LinkCommit(migration="aaaa", epoch=3)
        await workers.close()
        assert pair.lost == []

    run(main())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (failed("no room"), "hostB: no room"),
        (LinkAbort(migration="aaaa", reason="ctrl-c"), "the source aborted: ctrl-c"),
    ],
)
def test_what_the_other_agent_says_of_its_end_ends_every_wait(message: LinkFailed | LinkAbort, error: str):
    async def main() -> None:
        pair = Pair()
        workers = await pair.workers()
        workers.send_link(message)
        for _ in range(2):
            with pytest.raises(MigrateError) as caught:
                await workers.link.get(LinkRestored)
            assert str(caught.value) == error
        assert [str(lost) for lost in pair.lost] == [error]
        await workers.close()

    run(main())


def test_a_lost_stream_is_a_lost_link_and_is_told_once():
    async def main() -> None:
        pair = Pair()
        workers = await pair.workers()
        waiting = asyncio.create_task(workers.link.get(LinkRunning))
        await asyncio.sleep(0)
        workers.stream.process.kill()
        with pytest.raises(MigrateError, match="the stream process ended unexpectedly"):
            await waiting
        assert len(pair.lost) == 1
        await workers.close()

    run(main())


def test_a_message_that_is_none_fails_the_link():
    async def main() -> None:
        pair = Pair()
        workers = await pair.workers()
        workers.stream.port.send_frame(FrameKind.AGENT, codec.encode(base.StreamUp()))
        with pytest.raises(MigrateError, match="is not understood"):
            await workers.link.get(LinkRunning)
        await workers.close()

    run(main())


def test_an_error_that_was_set_first_stays(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        pair = Pair()
        workers = await pair.workers()
        workers.link.fail(AbortedError("on request"), lasting=True)
        await workers.close()
        with pytest.raises(AbortedError, match="on request"):
            await workers.link.get(LinkRunning)

    run(main())


@pytest.mark.parametrize("fails_at", ["engine", "stream"])
def test_a_process_that_cannot_be_started_leaves_none_behind(monkeypatch: pytest.MonkeyPatch, fails_at: str):
    before = set(os.listdir("/proc/self/fd"))
    started: list[Worker] = []

    async def main() -> None:
        async def spawn(name: str, *_: Any) -> Worker:
            if name == fails_at:
                raise MigrateError(f"cannot start the {name} process: no memory", code="process")
            started.append(await Rig().start(name))
            return started[-1]

        monkeypatch.setattr(worker, "_spawn", spawn)
        with pytest.raises(MigrateError, match=f"cannot start the {fails_at} process"):
            await Workers.start(Side.SOURCE, lambda _: None)

    run(main())
    assert [child.process.returncode for child in started] == ([0] if fails_at == "stream" else [])
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_comes_after_somebody_gave_up_waiting_is_kept_for_the_next():
    async def main() -> None:
        inbox = worker._Inbox()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await inbox.get(base.StreamUp)
        inbox.put(base.StreamUp(peer="late"))
        assert (await inbox.get(base.StreamUp)).peer == "late"

    run(main())
