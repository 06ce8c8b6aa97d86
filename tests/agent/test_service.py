"""A real agent in a test host, spoken to over SSH as a coordinator speaks."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from protocol import messages as m
from protocol.errors import RemoteProtocolError
from protocol.framing import FrameKind, encode_frame
from tests.agent.coordinator import connect, session
from tests.agent.inside import call
from tests.lab import Lab
from tests.lab.containers import Container, ContainerHost
from tests.lab.host import BIN, make_key

pytestmark = pytest.mark.root


class Rig:
    def __init__(self, lab: Lab, directory: Path) -> None:
        self.operator = lab.identity
        self.observer = directory / "observer"
        self.mistyped = directory / "mistyped"
        self.stranger = directory / "stranger"
        keys = [lab.public_key]
        keys += [f'migrate-role="observe" {make_key(self.observer, "observer")}']
        keys += [f'migrate-role="observer" {make_key(self.mistyped, "mistyped")}']
        make_key(self.stranger, "stranger")
        self.host = lab.add_host("hostA")
        self.host.install_agent(keys)
        self.agent = self.host.start_agent()

    @property
    def log(self) -> str:
        return self.host.agent_log.read_text()


@pytest.fixture(scope="module")
def rig(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(lab, tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def counter(rig: Rig) -> Container:
    return rig.host.add_runc_container("counter", args=["sleep", "600"], ip="10.77.0.50/24")


@pytest.fixture(autouse=True)
def the_agent_outlives_every_test(rig: Rig):
    yield
    assert rig.agent.poll() is None
    assert "Traceback" not in rig.log


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(40):
            await main

    asyncio.run(bounded())


def ask(rig: Rig, *bodies: m.Message, identity: Path | None = None) -> list[Any]:
    """The answers of one session."""
    answers: list[Any] = []

    async def main() -> None:
        async with session(rig.host, identity or rig.operator) as agent:
            await agent.hello()
            answers.extend([await agent.ask(body) for body in bodies])

    run(main())
    return answers


def test_hello_is_answered_by_name_version_and_role(rig: Rig):
    async def main() -> None:
        async with session(rig.host, rig.operator) as agent:
            welcome = await agent.hello()
            assert (welcome.host, welcome.version, welcome.role) == ("hostA", 1, "operate")
            assert welcome.software.startswith("migrate-agent ")

    run(main())


def test_a_coordinator_of_another_version_is_told(rig: Rig):
    async def main() -> None:
        async with session(rig.host, rig.operator) as agent:
            answer = await agent.ask(m.Hello(versions=[99]))
            assert (answer.code, answer.family) == ("version", "unsupported")
            assert "99" in answer.message

    run(main())


def test_the_host_report_crosses_whole(rig: Rig):
    (answer,) = ask(rig, m.GetHostReport())
    assert isinstance(answer, m.HostReportReply), answer
    report = answer.report
    assert (report.host, report.bridge) == ("hostA", "cbr0")
    assert all(report.features.values()), report.feature_notes
    assert [runtime.kind for runtime in report.runtimes] == ["runc"]


def test_containers_are_listed_with_pid_memory_and_state(rig: Rig, counter: Container):
    (answer,) = ask(rig, m.ListContainers())
    found = {item.name: item for item in answer.containers}["counter"]
    assert (found.status, found.pid, found.runtime) == ("running", counter.pid_in_host, "runc")
    assert (found.processes, found.bundle, found.migration) == (1, str(counter.bundle), "")
    assert found.memory_bytes > 0


def test_a_running_container_is_inspected_and_not_stopped(rig: Rig, counter: Container):
    (answer,) = ask(rig, m.InspectContainer(container="counter"))
    assert isinstance(answer, m.ContainerReportReply), answer
    report = answer.report
    assert (report.refusals, report.processes, report.threads) == ([], 1, 1)
    assert (report.pid, report.bundle, report.status) == (counter.pid_in_host, str(counter.bundle), "running")
    assert report.executable in {file.path for file in report.files}
    assert all(file.size > 0 for file in report.files)
    assert (report.network.kind, report.network.path) == ("namespace", "/run/netns/counter")
    assert report.monotonic_offset_ns == 0
    assert json.loads(report.config_json)["process"]["args"] == ["sleep", "600"]


def test_a_container_under_migration_is_listed_with_its_id(rig: Rig, counter: Container):
    call(
        rig.host,
        "from agent.journal import Journal; from protocol.states import Event, Side\n"
        "Journal(Path('/var/lib/migrate')).begin(migration='held-1', side=Side.SOURCE, epoch=1, container='counter',\n"
        "    peer='b', coordinator='ann')\n"
        "result = None",
    )
    try:
        listed, status, refused = ask(
            rig, m.ListContainers(), m.GetStatus(),
            m.BeginSource(migration="next-1", epoch=1, container="counter", target="hostB"),
        )  # fmt: skip
        assert {item.name: item.migration for item in listed.containers}["counter"] == "held-1"
        assert [(item.migration, item.state, item.side) for item in status.migrations if item.state == "preparing"] == [
            ("held-1", "preparing", "source")
        ]
        assert (refused.code, refused.family) == ("busy", "busy")
        assert "held-1" in refused.message
    finally:
        call(
            rig.host,
            "from agent.journal import Journal; from protocol.states import Event, Side\n"
            "Journal(Path('/var/lib/migrate')).move('held-1', Side.SOURCE, Event.ABORT)\n"
            "result = None",
        )


def test_status_can_be_asked_by_id_and_state(rig: Rig):
    unknown, unfinished = ask(rig, m.GetStatus(migration="no-such"), m.GetStatus(unfinished_only=True))
    assert unknown == m.StatusReply(migrations=[])
    assert all(item.state not in {"aborted", "finished"} for item in unfinished.migrations)


def test_an_unknown_container_is_a_failure_that_says_what_to_do(rig: Rig):
    inspected, begun = ask(
        rig,
        m.InspectContainer(container="nobody"),
        m.BeginSource(migration="unknown-1", epoch=1, container="nobody", target="hostB"),
    )
    for answer in (inspected, begun):
        assert isinstance(answer, m.Failure)
        assert (answer.code, answer.family, answer.host) == ("no-such-container", "unsupported", "hostA")
        assert "nobody" in answer.message
        assert "migrate ps" in answer.hint


def test_requests_about_an_unknown_migration_fail_by_name(rig: Rig):
    for answer in ask(
        rig,
        m.Abort(migration="no-such"),
        m.Finish(migration="no-such"),
        m.CutOver(migration="no-such", freeze_budget_s=1.0),
        m.RunRound(migration="no-such", round=1),
        m.Settle(migration="no-such", epoch=1, peer_state="running"),
        m.Settle(migration="no-such", epoch=1, peer_state="dancing"),
    ):
        assert isinstance(answer, m.Failure)
        assert answer.family == "usage"
        assert "no-such" in answer.message or "dancing" in answer.message


def test_the_clock_is_the_hosts_own(rig: Rig):
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    (answer,) = ask(rig, m.ReadClock())
    assert before < answer.reading.boottime_ns < time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_several_requests_are_answered_by_number_in_any_order(rig: Rig):
    async def main() -> None:
        async with session(rig.host, rig.operator) as agent:
            await agent.hello()
            wanted = {}
            for body in (m.GetHostReport(), m.ReadClock(), m.ListContainers(), m.ReadClock()):
                number = agent.connection.next_number
                wanted[number] = m.ANSWERS[type(body)]
                agent.write(agent.connection.send(m.Request(number=number, body=body)))
            while wanted:
                reply = await agent.event()
                assert isinstance(reply, m.Reply)
                assert isinstance(reply.body, wanted.pop(reply.number))

    run(main())


def test_an_observer_may_look_and_nothing_else(rig: Rig, counter: Container):
    welcome_role: list[str] = []

    async def main() -> None:
        async with session(rig.host, rig.observer) as agent:
            welcome_role.append((await agent.hello()).role)
            for body in (m.GetHostReport(), m.ListContainers(), m.ReadClock(), m.GetStatus()):
                assert isinstance(await agent.ask(body), m.ANSWERS[type(body)])
            for refused in (
                m.BeginSource(migration="observed-1", epoch=1, container="counter", target="b"),
                m.Abort(migration="observed-1"),
                m.Settle(migration="observed-1", epoch=9, peer_state="unknown", source_is_dead=True),
            ):
                answer = await agent.ask(refused)
                assert isinstance(answer, m.Failure)
                assert (answer.code, answer.family) == ("role", "unreachable")
                assert 'migrate-role="observe"' in answer.message
                assert type(refused).__name__ in answer.message

    run(main())
    assert welcome_role == ["observe"]


def test_a_role_that_is_mistyped_gives_no_rights(rig: Rig):
    async def main() -> None:
        async with connect(rig.host, rig.mistyped) as connection:
            done = await connection.run(subsystem="migrate-agent", encoding=None)
            assert done.exit_status == 1
            assert b"migrate-role='observer' of this key is none of operate, observe" in (done.stderr or b"")

    run(main())


def test_a_key_that_is_not_authorized_is_refused(rig: Rig):
    async def main() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            async with session(rig.host, rig.stranger):
                pass

    run(main())


@pytest.mark.parametrize("body", [m.ReadClock(), m.Abort(migration="aaaa")])
def test_a_first_message_that_is_not_hello_ends_the_session(rig: Rig, body: m.Message):
    async def main() -> None:
        async with session(rig.host, rig.operator) as agent:
            agent.write(_bytes_of(m.Request(number=0, body=body)))  # type: ignore[arg-type]
            await agent.until_closed()

    run(main())
    assert "the first request, and only the first, is Hello" in rig.log


def _bytes_of(message: m.Control) -> bytes:
    from protocol import codec

    return encode_frame(FrameKind.CONTROL, codec.encode(message))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        struct.pack(">BI", FrameKind.CONTROL, (1 << 32) - 1),
        encode_frame(FrameKind.CONTROL, b"\xc1"),
        encode_frame(FrameKind.CONTROL, b"\x81\xa4type\xa7Request"),
        encode_frame(FrameKind.PAGES, b"pages"),
        encode_frame(FrameKind.LOCAL, b""),
    ],
)
def test_garbage_ends_only_its_own_session(rig: Rig, garbage: bytes):
    async def main() -> None:
        async with session(rig.host, rig.operator) as good, session(rig.host, rig.operator) as bad:
            await good.hello()
            await bad.hello()
            bad.write(garbage)
            await bad.until_closed()
            assert isinstance(await good.ask(m.ReadClock()), m.ClockReply)

    run(main())


def test_half_a_frame_and_then_the_end_ends_the_session(rig: Rig):
    async def main() -> None:
        async with session(rig.host, rig.operator) as agent:
            await agent.hello()
            agent.write(b"\x01\x00")
            agent.process.stdin.write_eof()
            await agent.until_closed()

    run(main())


def test_a_coordinator_that_vanishes_is_forgotten(rig: Rig):
    async def main() -> None:
        async with connect(rig.host, rig.operator) as connection:
            process = await connection.create_process(subsystem="migrate-agent", encoding=None)
            process.stdin.write(_bytes_of(m.Request(number=0, body=m.Hello(versions=[1]))))
            connection.abort()

    run(main())
    assert ask(rig, m.ReadClock())


def test_a_shell_is_not_to_be_had(rig: Rig):
    async def main() -> None:
        async with connect(rig.host, rig.operator) as connection:
            done = await connection.run("id", encoding=None)
            assert done.exit_status == 1
            assert done.stdout == b""
            assert done.stderr == b"this is a migrate-agent: the only subsystem is migrate-agent\n"
            with pytest.raises(asyncssh.Error):
                await connection.create_connection(asyncssh.SSHTCPSession, "127.0.0.1", 22)

    run(main())


def test_the_daemon_also_takes_the_command_of_an_agentless_host(rig: Rig):
    async def main() -> None:
        async with session(rig.host, rig.operator, command="migrate-agent --stdio") as agent:
            assert (await agent.hello()).host == "hostA"

    run(main())


def test_files_of_a_bundle_are_verified_on_request(rig: Rig, counter: Container):
    wanted = m.FileIdentity(path="/no/such/file", size=1, digest="0" * 32)
    report = m.ContainerReport(
        name="counter", runtime="runc", status="running", pid=1, bundle=str(counter.bundle), memory_bytes=0,
        config_json=(rig.host.persist / str(counter.bundle).lstrip("/") / "config.json").read_bytes(),
        files=[wanted], network=m.Network(kind="none"),
    )  # fmt: skip
    (answer,) = ask(rig, m.VerifyFiles(container=report))
    assert [(refusal.code, refusal.host) for refusal in answer.refusals] == [("file-missing", "hostA")]


# ---------------------------------------------------------------- over a stock sshd


@pytest.fixture(scope="module")
def sshd(rig: Rig, lab: Lab) -> ContainerHost:
    rig.host.start_sshd([lab.public_key])
    return rig.host


def test_stdio_over_a_stock_sshd_speaks_the_same_protocol(rig: Rig, sshd: ContainerHost, counter: Container):
    async def main() -> None:
        async with session(sshd, rig.operator, port=22, command="migrate-agent --stdio") as agent:
            assert (await agent.hello()).host == "hostA"
            listed = await agent.ask(m.ListContainers())
            assert "counter" in [item.name for item in listed.containers]
            agent.process.stdin.write_eof()
            await agent.until_closed()
            await agent.process.wait_closed()
            assert agent.process.exit_status == 0

    run(main())


def test_stdio_ends_with_its_session(rig: Rig, sshd: ContainerHost):
    async def main() -> None:
        async with session(sshd, rig.operator, port=22, command="migrate-agent --stdio") as agent:
            await agent.hello()
            agent.write(b"\xffgarbage")
            await agent.until_closed()
            await agent.process.wait_closed()
            assert agent.process.exit_status == 0

    run(main())


def test_stdio_of_a_broken_config_says_so_on_stderr(rig: Rig, sshd: ContainerHost):
    async def main() -> None:
        async with connect(sshd, rig.operator, port=22) as connection:
            done = await connection.run("migrate-agent --stdio --config /no/agent.toml", encoding=None)
            assert done.exit_status == 2
            assert done.stdout == b""
            assert b"migrate-agent: cannot read /no/agent.toml: No such file" in (done.stderr or b"")

    run(main())


# ---------------------------------------------------------------- starting and ending


def serve(host: ContainerHost, toml: str) -> tuple[int, str]:
    (host.root / "tmp/agent.toml").write_text(toml)
    done = host.run([BIN / "migrate-agent", "serve", "--config", "/tmp/agent.toml"], check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("host_key = '/no/key'", "host_key = '/no/key' is not there (make one: ssh-keygen"),
        ("authorized_keys = '/no/keys'", "authorized_keys = '/no/keys' is not there"),
        ("host_key = '/etc/passwd'", "cannot listen on 0.0.0.0:7999"),
        ("listn = 1", "/tmp/agent.toml: Object contains unknown field `listn`"),
        ("state_dir = '/proc/x'", "cannot open the journal in /proc/x"),
    ],
)
def test_an_agent_that_cannot_work_refuses_to_start_and_says_why(rig: Rig, line: str, says: str):
    status, said = serve(rig.host, f"listen = '0.0.0.0:7999'\n{line}\n")
    assert status == (1 if "journal" in says else 2)
    (last,) = [text for text in said.splitlines() if text.startswith("migrate-agent: ")]
    assert says in last


def test_a_port_in_use_is_named(rig: Rig):
    status, said = serve(rig.host, "listen = '0.0.0.0:7022'\nstate_dir = '/tmp/state'\n")
    assert status == 2
    assert "migrate-agent: cannot listen on 0.0.0.0:7022" in said


def test_doctor_tells_a_person_and_a_machine(rig: Rig):
    done = rig.host.run([BIN / "migrate-agent", "doctor"])
    assert "ok  pagemap_scan" in done.stdout
    assert "hostA: Linux" in done.stdout
    done = rig.host.run([BIN / "migrate-agent", "doctor", "--json"])
    assert '"host": "hostA"' in done.stdout


def test_sigterm_ends_a_daemon_that_has_sessions(lab: Lab, tmp_path: Path):
    host = lab.add_host("hostT")
    host.install_agent([lab.public_key])
    host.start_agent()

    async def main() -> None:
        async with session(host, lab.identity) as agent:
            await agent.hello()
            status = await asyncio.to_thread(host.stop_agent)
            assert status == 0
            try:
                await agent.until_closed()
            except RemoteProtocolError:
                pytest.fail("the stream was cut inside a frame")

    run(main())
    assert "Traceback" not in host.agent_log.read_text()


def test_the_command_line_answers_a_question_for_help_at_once(rig: Rig):
    rig.host.run([BIN / "migrate-agent", "--help"])
    took = []
    for _ in range(3):
        began = time.monotonic()
        rig.host.run([BIN / "migrate-agent", "--help"])
        took.append(time.monotonic() - began)
    assert min(took) < 0.2
