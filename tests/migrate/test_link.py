"""How an agent is reached, and what is said when the conversation breaks."""

from __future__ import annotations

import asyncio

import pytest
import trio

from migrate.bridge import Bridge
from migrate.errors import LinkLostError, RefusedError
from migrate.inventory import load
from migrate.link import open_link
from protocol import messages as m
from protocol.errors import PeerError, UnsupportedError, UsageError
from protocol.framing import FrameKind, encode_frame
from tests.migrate.fake_agent import DropConnectionError


def with_link(fakes, body, *, on_progress=None, host="hostA"):
    async def main(bridge):
        async with open_link(bridge, load(fakes.inventory).host(host), on_progress) as link:
            return await body(link)

    with Bridge() as bridge:
        return trio.run(main, bridge)


async def list_containers(link):
    return (await link.request(m.ListContainers(), m.ContainerList)).containers


def test_a_link_greets_and_asks(fakes):
    assert [item.name for item in with_link(fakes, list_containers)] == ["web1"]
    (hello,) = fakes.source.asked(m.Hello)
    assert "pid" in hello.coordinator


def test_a_host_without_a_port_is_reached_by_sshd_and_a_command(fakes, monkeypatch):
    monkeypatch.setattr("migrate.inventory.SSH_PORT", fakes.source.port)
    text = fakes.inventory.read_text().replace(f"port = {fakes.source.port}\n", "")
    fakes.inventory.write_text(text)
    assert load(fakes.inventory).host("hostA").agentless
    assert [item.name for item in with_link(fakes, list_containers)] == ["web1"]


def test_known_hosts_may_stand_for_the_host_key(fakes, tmp_path):
    known = tmp_path / "known_hosts"
    key = fakes.source.host_key.export_public_key().decode().strip()
    known.write_text(f"[127.0.0.1]:{fakes.source.port} {key}\n")
    fakes.write_inventory(hostA={"host_key": "", "known_hosts": str(known)})
    assert with_link(fakes, list_containers)
    known.write_text(f"[127.0.0.1]:{fakes.source.port} {fakes.target.host_key.export_public_key().decode()}")
    with pytest.raises(PeerError) as caught:
        with_link(fakes, list_containers)
    assert caught.value.code == "host-key"


def test_a_host_of_another_kind_of_key_is_not_trusted(fakes):
    import asyncssh

    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode().strip()
    fakes.write_inventory(hostA={"host_key": other})
    with pytest.raises(PeerError) as caught:
        with_link(fakes, list_containers)
    assert caught.value.code == "host-key"


def test_a_missing_identity_is_a_usage_error(fakes):
    fakes.write_inventory(hostA={"identity": "/nowhere/id"})
    with pytest.raises(UsageError, match="/nowhere/id of host hostA: No such file"):
        with_link(fakes, list_containers)


def test_an_error_of_the_agent_comes_back_as_its_own_class(fakes):
    def refuse(body, agent):
        raise UnsupportedError("no such container", code="no-such-container", host="hostA", hint="look again")

    fakes.source.handlers[m.ListContainers] = refuse
    with pytest.raises(UnsupportedError) as caught:
        with_link(fakes, list_containers)
    assert (caught.value.code, caught.value.host, caught.value.hint) == ("no-such-container", "hostA", "look again")


def test_refusals_of_the_agent_come_back_whole(fakes):
    def refuse(body, agent):
        raise RefusedError([m.Refusal(code="a", message="one"), m.Refusal(code="b", message="two")])

    fakes.source.handlers[m.ListContainers] = refuse
    with pytest.raises(UnsupportedError, match="one"):
        with_link(fakes, list_containers)


def test_a_cut_connection_ends_the_request(fakes):
    def drop(body, agent):
        raise DropConnectionError

    fakes.source.handlers[m.ListContainers] = drop
    with pytest.raises(LinkLostError, match="the connection to the agent ended"):
        with_link(fakes, list_containers)


def test_a_request_on_a_lost_link_fails_at_once(fakes):
    def drop(body, agent):
        raise DropConnectionError

    fakes.source.handlers[m.ListContainers] = drop

    async def twice(link):
        with pytest.raises(LinkLostError):
            await list_containers(link)
        with pytest.raises(LinkLostError):
            await link.request(m.ReadClock(), m.ClockReply)

    with_link(fakes, twice)


def test_an_agent_that_breaks_the_protocol_is_dropped(fakes):
    async def babble(process, connection, request):
        process.stdout.write(encode_frame(FrameKind.CONTROL, b"\xc1"))

    fakes.source._answer = babble
    with pytest.raises(PeerError, match="broke the protocol"):
        with_link(fakes, list_containers)


def test_a_late_answer_to_a_cancelled_request_does_no_harm(fakes):
    async def late(body, agent):
        await asyncio.sleep(0.2)
        return agent.healthy(body)

    fakes.source.handlers[m.ReadClock] = late

    async def body(link):
        with trio.move_on_after(0.05):
            await link.request(m.ReadClock(), m.ClockReply)
        await trio.sleep(0.3)
        return await list_containers(link)

    assert len(with_link(fakes, body)) == 1


def test_requests_may_overlap_and_answers_come_in_any_order(fakes):
    order = []

    async def slow(body, agent):
        await asyncio.sleep(0.2)
        return agent.healthy(body)

    fakes.source.handlers[m.ReadClock] = slow

    async def body(link):
        async def clock():
            await link.request(m.ReadClock(), m.ClockReply)
            order.append("clock")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clock)
            await fakes_asked(fakes.source, m.ReadClock)
            await list_containers(link)
            order.append("list")

    with_link(fakes, body)
    assert order == ["list", "clock"]


async def fakes_asked(agent, kind):
    await trio.to_thread.run_sync(agent.wait_asked, kind)


def test_notices_reach_trio(fakes):
    seen = []

    async def answer(process, connection, request):
        if isinstance(request.body, m.ListContainers):
            progress = m.Progress(migration="m0123456789", phase="precopy", round=1, done_bytes=5)
            process.stdout.write(connection.send(m.Notice(body=progress)))
        reply = m.Reply(number=request.number, body=fakes.source.healthy(request.body))
        process.stdout.write(connection.send(reply))

    fakes.source._answer = answer

    async def body(link):
        await list_containers(link)
        await trio.testing.wait_all_tasks_blocked()

    import trio.testing

    with_link(fakes, body, on_progress=lambda progress: seen.append(progress.done_bytes))
    assert seen == [5]
