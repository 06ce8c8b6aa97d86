"""Two real stream processes, real memory, a real SSH connection."""

from __future__ import annotations

import os
import random
import socket
import time
from pathlib import Path

import pytest

from agent.engine import base
from protocol import codec
from protocol.framing import FrameKind
from protocol.link_messages import LinkAbort, LinkRestored
from tests.agent.transfer.rig import ADDRESS, MIGRATION, TIMEOUT_S, Pair, Victim, connection_count, kill

pytestmark = [pytest.mark.root, pytest.mark.kernel]
MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def pair():
    with Pair.start() as running:
        yield running


def failure_of(record) -> tuple[str, str]:
    assert isinstance(record, base.StreamFailed), record
    return record.failure.code, record.failure.message


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("mode", ["none", "lz4", "zstd", "auto"])
@pytest.mark.parametrize("fill", ["random", "text"])
def test_memory_arrives_as_it_was(pair, mode, fill):
    with Victim.start(24 * MIB, fill) as giver, Victim.start(24 * MIB) as taker:
        pair.join(compress=mode)
        pair.open(giver, taker)
        done = pair.copy(24 * MIB)
        assert taker.read() == giver.read()
        assert done.read_bytes == 24 * MIB
        assert done.ms > 0
        if fill == "text" and mode in {"lz4", "zstd"}:
            assert done.wire_bytes < 3 * MIB
        if fill == "random":
            assert done.wire_bytes >= 24 * MIB


def test_many_scattered_runs_arrive_in_place(pair):
    size = 16 * MIB
    with Victim.start(size, "random") as giver, Victim.start(size) as taker:
        pair.join()
        pair.open(giver, taker)
        picked = sorted(random.Random(1).sample(range(size // PAGE), 3000))
        starts = [ADDRESS + page * PAGE for page in picked]
        pair.source.engine.send(
            base.ReadRuns(task=1, starts=starts, sizes=[PAGE] * len(starts), anonymous=True, final=True)
        )
        done = pair.flush()
        given, taken = giver.read(), taker.read()
        chosen = set(picked)
        for page in range(size // PAGE):
            part = slice(page * PAGE, (page + 1) * PAGE)
            assert taken[part] == (given[part] if page in chosen else bytes(PAGE)), page
        assert done.read_bytes == 3000 * PAGE


def test_zero_pages_take_no_memory_on_the_target(pair):
    with Victim.start(8 * MIB) as giver, Victim.start(8 * MIB) as taker:
        giver.write(5 * PAGE, b"x" * PAGE)
        giver.write(100 * PAGE, bytes(50 * PAGE))
        pair.join()
        pair.open(giver, taker)
        done = pair.copy(8 * MIB)
        assert taker.read(5 * PAGE, PAGE) == b"x" * PAGE
        assert done.zero_bytes == 8 * MIB - PAGE
        assert done.wire_bytes < 16 * PAGE
        assert taker.resident() == 1


def test_pages_that_became_zero_are_zero_on_the_target(pair):
    with Victim.start(4 * MIB, "random") as giver, Victim.start(4 * MIB) as taker:
        pair.join()
        pair.open(giver, taker)
        pair.copy(4 * MIB)
        giver.write(3 * PAGE, bytes(200 * PAGE))
        pair.copy(4 * MIB, number=2)
        assert taker.read() == giver.read()
        assert taker.read(3 * PAGE, 200 * PAGE) == bytes(200 * PAGE)


def test_zero_pages_of_a_file_mapping_are_written(pair):
    with Victim.start(MIB) as giver, Victim.start(MIB) as taker:
        pair.join()
        pair.open(giver, taker)
        done = pair.copy(MIB, anonymous=False)
        assert done.zero_bytes == 0
        assert taker.resident() == MIB // PAGE


def test_pages_that_were_unmapped_meanwhile_are_left_out(pair):
    with Victim.start(4 * MIB, "random") as giver, Victim.start(4 * MIB) as taker:
        giver.run(f"libc.munmap(ctypes.c_void_p({ADDRESS + MIB}), {MIB})")
        pair.join()
        pair.open(giver, taker)
        done = pair.copy(4 * MIB)
        assert done.read_bytes == 3 * MIB
        assert taker.read(0, MIB) == giver.read(0, MIB)
        assert taker.read(MIB, MIB) == bytes(MIB)
        assert taker.read(2 * MIB, 2 * MIB) == giver.read(2 * MIB, 2 * MIB)


def test_private_areas_that_are_read_only_on_the_target_are_written(pair):
    with Victim.start(2 * MIB, "random") as giver, Victim.start(2 * MIB) as taker:
        taker.run(f"libc.mprotect(ctypes.c_void_p({ADDRESS + MIB}), {MIB}, 1)")
        pair.join()
        pair.open(giver, taker)
        pair.copy(2 * MIB)
        assert taker.read() == giver.read()


def test_a_process_that_ended_is_reported_as_gone(pair):
    with Victim.start(4 * MIB, "random") as giver, Victim.start(4 * MIB) as taker:
        pair.join()
        pair.open(giver, taker)
        giver.process.kill()
        giver.process.wait()
        code, _ = failure_of(pair.copy(4 * MIB))
        assert code == "task-gone"
        assert failure_of(pair.source.hear())[0] == "task-gone"


def test_a_recycled_pid_is_not_read(pair):
    with Victim.start(MIB, "random") as giver:
        pair.join()
        pair.source.engine.send(base.OpenTask(task=1, pid=giver.pid, start_time=giver.start_time + 1))
        assert failure_of(pair.source.hear())[0] == "task-gone"


def test_a_target_without_the_area_is_an_error_that_names_it(pair):
    with Victim.start(2 * MIB, "random") as giver, Victim.start(MIB) as taker:
        pair.join()
        pair.open(giver, taker)
        pair.source.engine.send(base.ReadRuns(task=1, starts=[ADDRESS], sizes=[2 * MIB], anonymous=True))
        _, message = failure_of(pair.target.hear())
        assert f"{ADDRESS + MIB:#x}" in message


def test_the_bandwidth_limit_holds_until_the_freeze(pair):
    size = 16 * MIB
    with Victim.start(size, "random") as giver, Victim.start(size) as taker:
        pair.join(bandwidth=8 * MIB)
        pair.open(giver, taker)
        slow = pair.copy(size)
        fast = pair.copy(size, final=True, number=2)
        assert slow.ms > 1000
        assert fast.ms < slow.ms / 2


def test_a_read_of_the_freeze_does_not_wait_behind_the_limit(pair):
    size = 32 * MIB
    with Victim.start(size, "random") as giver, Victim.start(size) as taker:
        pair.join(bandwidth=2 * MIB)
        pair.open(giver, taker)
        start_s = time.monotonic()
        pair.source.engine.send(base.ReadRuns(task=1, starts=[ADDRESS], sizes=[size], anonymous=True))
        pair.copy(PAGE, final=True)
        assert time.monotonic() - start_s < 8
        assert taker.read() == giver.read()


# ---------------------------------------------------------------- order


def test_nothing_behind_a_section_is_looked_at_before_it_is_applied(pair):
    with Victim.start(MIB, "random") as giver, Victim.start(MIB) as taker:
        pair.join()
        pair.open(giver, taker)
        pair.source.engine.send_frame(FrameKind.SECTION, b"layout 1")
        pair.source.engine.send(base.ReadRuns(task=1, starts=[ADDRESS], sizes=[MIB], anonymous=True))
        pair.source.engine.send_frame(FrameKind.SECTION, b"layout 2")
        pair.source.engine.send(base.Flush(number=7))
        assert pair.target.engine.receive(TIMEOUT_S).payload == b"layout 1"
        # A message goes past it, and it was sent after them all.
        pair.source.service.send_frame(FrameKind.AGENT, codec.encode(LinkAbort(migration=MIGRATION)))
        assert pair.target.service.receive(TIMEOUT_S).kind is FrameKind.AGENT
        assert taker.read() == bytes(MIB)
        pair.target.engine.send(base.SectionApplied())
        assert pair.target.engine.receive(TIMEOUT_S).payload == b"layout 2"
        assert taker.read() == giver.read()
        with pytest.raises(TimeoutError):
            pair.source.engine.receive(0.05)
        pair.target.engine.send(base.SectionApplied())
        assert pair.source.hear_engine().number == 7


def test_large_sections_arrive_whole(pair):
    pair.join()
    section = os.urandom(20 * MIB)
    pair.source.engine.send_frame(FrameKind.SECTION, section)
    assert pair.target.engine.receive(TIMEOUT_S).payload == section


def test_messages_go_both_ways(pair):
    pair.join()
    restored = codec.encode(LinkRestored(migration=MIGRATION, parts={"copy": 1.5}))
    pair.target.service.send_frame(FrameKind.AGENT, restored)
    assert pair.source.service.receive(TIMEOUT_S).payload == restored
    pair.source.service.send_frame(FrameKind.AGENT, restored)
    assert pair.target.service.receive(TIMEOUT_S).payload == restored


def test_counters_tell_what_was_moved(pair):
    with Victim.start(2 * MIB, "random") as giver, Victim.start(2 * MIB) as taker:
        giver.write(0, bytes(MIB))
        pair.join()
        pair.open(giver, taker)
        pair.copy(2 * MIB)
        ours = pair.source.ask(base.StreamGetCounters())
        theirs = pair.target.ask(base.StreamGetCounters())
        assert (ours.page_bytes, ours.zero_bytes) == (2 * MIB, MIB)
        assert (theirs.page_bytes, theirs.zero_bytes) == (MIB, MIB)


# ---------------------------------------------------------------- who is let in


def test_a_wrong_client_key_is_refused_and_the_right_one_still_let_in(pair):
    stranger = Pair.start()
    with stranger as other:
        pair.listen()
        other.port, other.host_key = pair.port, pair.host_key
        assert failure_of(other.connect())[0] == "auth-refused"
        assert isinstance(pair.connect(), base.StreamUp)


def test_a_wrong_host_key_is_refused(pair):
    with Pair.start() as other:
        other.listen()
        pair.listen()
        assert failure_of(pair.connect(host_key=other.host_key))[0] == "host-key"


@pytest.mark.parametrize("change", [{"migration": "test-0002"}, {"epoch": 2}])
def test_another_migration_is_refused(pair, change):
    pair.listen()
    failure_of(pair.connect(**change))
    assert failure_of(pair.target.hear())[0] == "wrong-migration"
    assert failure_of(pair.target.hear_engine())[0] == "wrong-migration"


def test_another_address_is_refused(pair):
    pair.listen(peer_address="127.0.0.2")
    failure_of(pair.connect())


def test_nobody_can_connect_once_the_source_has(pair):
    pair.join()
    with socket.socket() as late, pytest.raises(ConnectionRefusedError):
        late.connect(("127.0.0.1", pair.port))


def test_a_used_port_is_passed_over(pair):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = taken.getsockname()[1]
        pair.listen(ports=[used, *range(7950, 7999)])
        assert pair.port != used


def test_no_free_port_is_an_error_that_names_them(pair):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = taken.getsockname()[1]
        key = pair.source.ask(base.StreamMakeKey())
        answer = pair.target.ask(
            base.StreamListen(
                address="127.0.0.1", ports=[used], client_public_key=key.public_key, peer_address="",
                migration=MIGRATION, epoch=1,
            )
        )  # fmt: skip
        code, message = failure_of(answer)
        assert code == "no-data-port"
        assert str(used) in message


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_lost_link_is_reported_to_service_and_engine(pair, victim):
    pair.join()
    dying, other = (pair.source, pair.target) if victim == "source" else (pair.target, pair.source)
    kill(dying.process)
    code, message = failure_of(other.hear())
    assert code == "link-lost"
    assert "127.0.0.1" in message
    assert failure_of(other.hear_engine())[0] == "link-lost"
    # Once: counters are still answered, and nothing else comes before that.
    assert isinstance(other.ask(base.StreamGetCounters()), base.StreamCounters)


def test_a_message_sent_just_before_the_end_arrives(pair):
    pair.join()
    message = codec.encode(LinkAbort(migration=MIGRATION, reason="enough"))
    pair.source.service.send_frame(FrameKind.AGENT, message)
    pair.source.service.close()
    assert pair.target.service.receive(TIMEOUT_S).payload == message
    assert failure_of(pair.target.hear())[0] == "link-lost"
    assert pair.source.process.wait(10) == 0
    assert connection_count(pair.port) == 0


def test_a_lost_engine_is_reported(pair):
    pair.join()
    pair.source.engine.close()
    assert failure_of(pair.source.hear())[0] == "process-gone"


def test_pages_and_keys_stay_out_of_core_files(pair):
    pair.source.ask(base.StreamMakeKey())
    limits = Path(f"/proc/{pair.source.process.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if "core file" in line)
    assert core.split()[4:6] == ["0", "0"]
