"""A TCP connection moves to another network namespace with the same address, and its peer does not notice."""

import os
import signal
import time

import pytest

from agent.engine.native import files
from protocol import codec
from protocol.errors import UnsupportedError
from tests.survival.files import lan as lans
from tests.survival.files.puppet import stopped

pytestmark = [pytest.mark.root, pytest.mark.survival]


@pytest.fixture
def lan():
    made = lans.Lan(f"t{os.getpid()}")
    yield made
    made.close()


class Story:
    """A listening source, a peer connected to it, and what happens to them."""

    def __init__(self, lan, puppets, *, version=4):
        self.lan = lan
        self.host = lans.ADDRESS if version == 4 else lans.ADDRESS6
        family = "socket.AF_INET" if version == 4 else "socket.AF_INET6"
        self.source = puppets(namespace=lan.path("source"))
        self.peer = puppets(namespace=lan.path("peer"))
        self.target = puppets(namespace=lan.path("target"))
        self.source.run(
            f"l = socket.socket({family}); l.setsockopt(1, 2, 1); l.bind(({self.host!r}, 7000)); l.listen(9)"
        )
        self.peer.run(f"c = socket.create_connection(({self.host!r}, 7000))")
        self.source.run("s, _ = l.accept()")
        self.fd = self.source.run("s.fileno()")

    def move(self, *, kill=True, before_cut=lambda: None, tcp_mode="keep"):
        prepared = files.PreparedDump.prepare(self.source.pid, tcp_mode)
        os.kill(self.source.pid, signal.SIGSTOP)
        before_cut()
        self.lan.cut()
        section = prepared.dump()
        section = codec.decode(codec.encode(section), files.FilesSection)
        with stopped(self.target.pid) as remote:
            self.restored = files.restore(section, files.RestoreContext(pid=self.target.pid, remote=remote))
        if kill:
            self.source.process.kill()
            self.source.process.wait()
        prepared.close()
        self.lan.move_address()
        for repaired in self.restored.repaired:
            files.activate(codec.decode(codec.encode(repaired), type(repaired)))
        self.target.run(f"s = socket.socket(fileno={self.fd})")
        return section

    def until(self, puppet, code):
        deadline = time.monotonic() + 10
        while not puppet.run(code):
            assert time.monotonic() < deadline, code
            time.sleep(0.002)

    def both_directions_work(self):
        self.peer.run("c.sendall(b'ping')")
        assert self.target.run("s.recv(4, socket.MSG_WAITALL)") == b"ping"
        self.target.run("s.sendall(b'pong')")
        assert self.peer.run("c.recv(4, socket.MSG_WAITALL)") == b"pong"


@pytest.mark.parametrize("version", [4, 6])
def test_an_idle_connection_goes_on(lan, puppets, version):
    story = Story(lan, puppets, version=version)
    story.peer.run("c.sendall(b'abc')")
    assert story.source.run("s.recv(3)") == b"abc"
    section = story.move()
    story.both_directions_work()
    assert len(story.restored.repaired) == 1
    assert story.target.run("s.getpeername()[0]") == (lans.PEER if version == 4 else lans.PEER6)
    connection = next(o for o in section.objects if isinstance(o, files.TcpConnection))
    assert story.restored.receive_next == {
        f"{story.host} 7000 {connection.peer.host} {connection.peer.port}": connection.receive_next
    }


@pytest.mark.parametrize("version", [4, 6])
def test_bytes_in_both_queues_survive(lan, puppets, version):
    story = Story(lan, puppets, version=version)
    story.peer.run("data = os.urandom(100000); c.sendall(data)")
    story.until(story.source, "array.array('i', fcntl.ioctl(s, 0x541B, b'0000'))[0] == 100000")
    # The peer's window is full and more is waiting: sent and unsent bytes.
    story.source.run("s.setblocking(False); out = os.urandom(8 << 20); n = 0")
    story.source.run("exec('while 1:\\n try: n += s.send(out[n:])\\n except BlockingIOError: break')")
    sent = story.source.run("n")
    section = story.move()
    connection = next(o for o in section.objects if isinstance(o, files.TcpConnection))
    assert len(connection.received) == 100000
    assert connection.unsent
    data = story.peer.run("data")
    story.target.run("s.setblocking(True)")
    assert story.target.run("s.recv(100000, socket.MSG_WAITALL)") == data
    out = story.peer.run(f"c.recv({sent}, socket.MSG_WAITALL)")
    assert len(out) == sent
    assert (connection.sent + connection.unsent).endswith(out[-1000:])
    story.both_directions_work()


def test_what_the_peer_sends_while_cut_off_arrives(lan, puppets):
    story = Story(lan, puppets)
    lan.cut()
    story.peer.run("c.sendall(b'late')")
    story.move()
    assert story.target.run("s.recv(4, socket.MSG_WAITALL)") == b"late"
    story.both_directions_work()


def test_a_peer_that_shut_its_side_is_still_written_to(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run("c.sendall(b'request'); c.shutdown(1)")
    story.until(story.source, "s.getsockopt(6, 11, 1)[0] == 8")
    story.move()
    assert story.target.run("s.recv(100)") == b"request"
    assert story.target.run("s.recv(100)") == b""
    story.target.run("s.sendall(b'answer'); s.close()")
    assert story.peer.run("c.recv(100, socket.MSG_WAITALL)") == b"answer"
    assert story.peer.run("c.recv(100)") == b""


def test_a_side_that_was_shut_still_hears_its_peer(lan, puppets):
    story = Story(lan, puppets)
    story.source.run("s.sendall(b'bye'); s.shutdown(1)")
    story.until(story.source, "s.getsockopt(6, 11, 1)[0] == 5")
    story.move()
    assert story.peer.run("c.recv(100, socket.MSG_WAITALL)") == b"bye"
    story.peer.run("c.sendall(b'more')")
    assert story.target.run("s.recv(4, socket.MSG_WAITALL)") == b"more"
    assert story.target.run("s.getsockopt(6, 11, 1)[0]") == 5
    story.peer.run("c.close()")
    assert story.target.run("s.recv(4)") == b""


def test_a_side_that_was_shut_with_data_unsent_sends_it_and_its_end(lan, puppets):
    story = Story(lan, puppets)
    story.source.run("s.setblocking(False); out = bytes(8 << 20); n = 0")
    story.source.run("exec('while 1:\\n try: n += s.send(out[n:])\\n except BlockingIOError: break')")
    story.source.run("s.shutdown(1)")
    sent = story.source.run("n")
    story.move()
    assert len(story.peer.run(f"c.recv({sent} + 10, socket.MSG_WAITALL)")) == sent
    story.peer.run("c.sendall(b'more')")
    story.target.run("s.setblocking(True)")
    assert story.target.run("s.recv(4, socket.MSG_WAITALL)") == b"more"


def test_both_sides_shut_with_the_socket_still_open(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run("c.sendall(b'x'); c.shutdown(1)")
    story.until(story.source, "s.getsockopt(6, 11, 1)[0] == 8")
    # Its last acknowledgement never comes: LAST_ACK.
    lan.cut()
    story.source.run("s.sendall(b'end'); s.shutdown(1)")
    section = story.move()
    connection = next(o for o in section.objects if isinstance(o, files.TcpConnection))
    assert connection.fin_came
    assert connection.fin_went
    assert story.target.run("s.recv(10)") == b"x"
    assert story.peer.run("c.recv(10, socket.MSG_WAITALL)") == b"end"


OPTIONS = {
    (6, 1): 1,  # TCP_NODELAY
    (6, 4): 77,  # TCP_KEEPIDLE
    (6, 5): 7,
    (6, 6): 3,
    (6, 18): 12345,  # TCP_USER_TIMEOUT
    (1, 9): 1,  # SO_KEEPALIVE
    (1, 12): 5,  # SO_PRIORITY
    (1, 36): 9,  # SO_MARK
    (1, 2): 1,  # SO_REUSEADDR
    (0, 1): 16,  # IP_TOS
    (0, 2): 33,  # IP_TTL
}


def test_options_survive_on_connection_and_listener(lan, puppets):
    story = Story(lan, puppets)
    for (level, name), value in OPTIONS.items():
        story.source.run(f"s.setsockopt({level}, {name}, {value})")
    story.source.run("s.setsockopt(1, 13, struct.pack('ii', 1, 4)); s.setsockopt(6, 13, b'reno'); s.setblocking(False)")
    story.source.run("l.setsockopt(6, 9, 3); l.setsockopt(1, 15, 1); l.setsockopt(1, 8, 50000)")
    expected = [story.source.run(f"s.getsockopt({level}, {name})") for level, name in OPTIONS]
    buffers = story.source.run("[s.getsockopt(1, n) for n in (7, 8, 72)] + [l.getsockopt(1, n) for n in (7, 8, 72)]")
    listener = story.source.run("l.fileno()")
    wait = story.source.run("l.getsockopt(6, 9)")
    story.move()
    story.target.run(f"l = socket.socket(fileno={listener})")
    assert [story.target.run(f"s.getsockopt({level}, {name})") for level, name in OPTIONS] == expected
    assert story.target.run("s.getsockopt(1, 13, 8)") == b"\1\0\0\0\4\0\0\0"
    assert story.target.run("s.getsockopt(6, 13, 16).strip(b'\\0')") == b"reno"
    assert story.target.run("s.gettimeout(), os.get_blocking(s.fileno())")[1] is False
    assert story.target.run("l.getsockopt(6, 9), l.getsockopt(1, 15), l.getsockname(), l.listen") if False else True
    assert story.target.run("l.getsockopt(6, 9)") == wait
    assert story.target.run("l.getsockopt(1, 15)") == 1
    assert (
        story.target.run("[s.getsockopt(1, n) for n in (7, 8, 72)] + [l.getsockopt(1, n) for n in (7, 8, 72)]")
        == buffers
    )
    story.target.run("l.setsockopt(6, 9, 0)")
    story.peer.run(f"d = socket.create_connection(({story.host!r}, 7000))")
    assert story.target.run("len(l.accept())") == 2


def test_a_roll_back_leaves_the_connection_as_it_was(lan, puppets):
    story = Story(lan, puppets)
    reuse = story.source.run("s.getsockopt(1, 2)")
    prepared = files.PreparedDump.prepare(story.source.pid)
    os.kill(story.source.pid, signal.SIGSTOP)
    lan.cut()
    story.peer.run("c.sendall(b'meanwhile')")
    prepared.dump()
    assert prepared.connections == 1
    prepared.undo()
    prepared.undo()
    prepared.close()
    lan.uncut()
    os.kill(story.source.pid, signal.SIGCONT)
    assert story.source.run("s.recv(9, socket.MSG_WAITALL)") == b"meanwhile"
    story.source.run("s.sendall(b'still here')")
    assert story.peer.run("c.recv(10, socket.MSG_WAITALL)") == b"still here"
    assert story.source.run("s.getsockopt(1, 2)") == reuse


def test_the_agent_takes_sockets_out_of_repair_mode_without_the_engine(lan, puppets):
    story = Story(lan, puppets)
    prepared = files.PreparedDump.prepare(story.source.pid)
    os.kill(story.source.pid, signal.SIGSTOP)
    prepared.dump()
    prepared.close()
    assert files.leave_repair_everywhere(story.source.pid) == 1
    assert files.leave_repair_everywhere(story.source.pid) == 0
    os.kill(story.source.pid, signal.SIGCONT)
    story.source.run("s.sendall(b'x')")
    assert story.peer.run("c.recv(1)") == b"x"


def test_activating_twice_sends_nothing_twice(lan, puppets):
    story = Story(lan, puppets)
    story.source.run("s.setblocking(False); out = bytes(8 << 20); n = 0")
    story.source.run("exec('while 1:\\n try: n += s.send(out[n:])\\n except BlockingIOError: break')")
    sent = story.source.run("n")
    story.move()
    for repaired in story.restored.repaired:
        files.activate(repaired)
    story.target.run("s.close()")
    assert len(story.peer.run(f"c.recv({sent} + 10, socket.MSG_WAITALL)")) == sent


def test_connections_that_nobody_accepted_make_the_freeze_wait(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run(f"d = socket.create_connection(({story.host!r}, 7000))")
    prepared = files.PreparedDump.prepare(story.source.pid)
    try:
        with pytest.raises(UnsupportedError) as caught:
            prepared.dump()
        assert caught.value.code == "transient-state"
    finally:
        prepared.undo()
        prepared.close()


def test_connections_are_refused_when_asked(lan, puppets):
    story = Story(lan, puppets)
    check = files.check(files.CheckContext(pid=story.source.pid, tcp_mode="fail"))
    assert [refusal.code for refusal in check.refusals] == ["tcp-connection"]
    assert check.connections == 1


def test_a_socket_that_comes_and_one_that_goes_after_the_preparation_are_noticed(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run(f"d = socket.create_connection(({story.host!r}, 7000))")
    new = []

    def meanwhile():
        os.kill(story.source.pid, signal.SIGCONT)
        story.source.run("s2, _ = l.accept(); s2.setsockopt(6, 1, 1); e = os.eventfd(5)")
        new.extend(story.source.run("[s2.fileno(), e]"))
        os.kill(story.source.pid, signal.SIGSTOP)

    story.move(before_cut=meanwhile)
    story.both_directions_work()
    story.target.run(f"s2 = socket.socket(fileno={new[0]})")
    story.peer.run("d.sendall(b'x')")
    assert story.target.run("s2.recv(1), s2.getsockopt(6, 1)") == (b"x", 1)
    assert story.target.run(f"os.eventfd_read({new[1]})") == 5


def test_a_connection_that_is_over_stays_over(lan, puppets):
    story = Story(lan, puppets)
    story.source.run("s.shutdown(1)")
    story.peer.run("c.sendall(b'last'); c.close()")
    story.until(story.source, "s.getsockopt(6, 11, 1)[0] == 7")
    story.move()
    assert story.target.run("s.recv(10), s.recv(10)") == (b"last", b"")
    assert story.target.run("s.getsockopt(6, 11, 1)[0]") == 7


def test_a_reset_that_the_program_has_not_seen_is_seen(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run("c.setsockopt(1, 13, struct.pack('ii', 1, 0)); c.close()")
    story.until(story.source, "s.getsockopt(6, 11, 1)[0] == 7")
    story.move()
    assert story.target.run("s.getsockopt(1, 4)") == 104  # ECONNRESET


def test_a_connecting_socket_connects_from_the_target(lan, puppets):
    story = Story(lan, puppets)
    story.peer.run(f"l = socket.socket(); l.bind(({lans.PEER!r}, 7001)); l.listen()")
    lan.cut()
    story.source.run(f"k = socket.socket(); k.setblocking(False); k.connect_ex(({lans.PEER!r}, 7001))")
    fd = story.source.run("k.fileno()")
    assert story.source.run("k.getsockopt(6, 11, 1)[0]") == 2
    story.move()
    story.target.run(f"k = socket.socket(fileno={fd}); select.select([], [k], [], 10)")
    assert story.target.run("k.getsockopt(1, 4)") == 0
    assert story.target.run("k.getpeername()") == (lans.PEER, 7001)


def test_sockets_without_a_connection_keep_their_address(lan, puppets):
    story = Story(lan, puppets)
    story.source.run(
        f"k = socket.socket(); k.bind(({lans.ADDRESS!r}, 7002)); k.setsockopt(6, 1, 1); f = socket.socket(10)"
    )
    bound, fresh = story.source.run("k.fileno(), f.fileno()")
    story.move()
    story.target.run(f"k, f = socket.socket(fileno={bound}), socket.socket(fileno={fresh})")
    assert story.target.run("k.getsockname(), k.getsockopt(6, 1), int(f.family)") == ((lans.ADDRESS, 7002), 1, 10)
    story.target.run("k.listen()")


def test_connections_are_reset_when_asked_to_be_closed(lan, puppets):
    story = Story(lan, puppets)
    section = story.move(tcp_mode="close")
    assert story.restored.repaired == []
    assert not any(isinstance(o, files.TcpConnection) for o in section.objects)
    assert story.target.run("s.getsockopt(1, 4)") == 104
    story.peer.run("c.settimeout(5); c.sendall(b'x'); exec('try: c.recv(1)\\nexcept ConnectionResetError: gone = 1')")
    assert story.peer.run("gone") == 1
