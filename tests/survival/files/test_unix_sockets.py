"""Unix sockets inside a process survive with their names and queues."""

import socket

import pytest

from agent.engine.native import files
from protocol.errors import UnsupportedError
from tests.survival.files.conftest import dump
from tests.survival.files.puppet import links

pytestmark = [pytest.mark.root, pytest.mark.survival]
_SOCKETS = "[x, y] = [socket.socket(fileno=n) for n in ({}, {})]"


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM", "SOCK_SEQPACKET"])
def test_a_pair_keeps_what_is_in_both_queues(puppets, move, kind):
    source = puppets()
    a, b = source.run(f"a, b = socket.socketpair(1, socket.{kind})") or source.run("a.fileno(), b.fileno()")
    source.run("a.send(b'one'); a.send(b'two'); b.send(b'back'); b.setblocking(False)")
    target = move(source)
    target.run(_SOCKETS.format(a, b))
    received = [b"onetwo"] if kind == "SOCK_STREAM" else [b"one", b"two"]
    assert [target.run("y.recv(100)") for _ in received] == received
    assert target.run("x.recv(100)") == b"back"
    assert target.run(f"os.get_blocking({b})") is False
    target.run("x.send(b'new')")
    assert target.run("y.recv(100)") == b"new"
    # Nothing was consumed at the source.
    assert source.run("b.recv(3)") == b"one"


def test_a_stream_whose_peer_is_gone_ends_after_its_data(puppets, move):
    source = puppets()
    a = source.run("a, b = socket.socketpair()") or source.run("a.fileno()")
    source.run("b.send(b'last'); b.close()")
    target = move(source)
    target.run(f"x = socket.socket(fileno={a})")
    assert target.run("x.recv(10)") == b"last"
    assert target.run("x.recv(10)") == b""
    assert links(target.pid).keys() == links(source.pid).keys()


def test_a_side_that_was_shut_stays_shut(puppets, move):
    source = puppets()
    a, b = source.run("a, b = socket.socketpair()") or source.run("a.fileno(), b.fileno()")
    source.run("a.send(b'x'); a.shutdown(1)")
    target = move(source)
    target.run(_SOCKETS.format(a, b))
    assert target.run("y.recv(10), y.recv(10)") == (b"x", b"")
    target.run("y.send(b'still')")
    assert target.run("x.recv(10)") == b"still"


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_SEQPACKET"])
@pytest.mark.parametrize("abstract", [True, False])
def test_a_listener_and_its_connection_keep_their_names(puppets, move, tmp_path, kind, abstract):
    name = f"\0migrate-test-{tmp_path.name}" if abstract else str(tmp_path / "socket")
    source = puppets()
    source.run(f"l = socket.socket(1, socket.{kind}); l.bind({name!r}); l.listen(5)")
    source.run(f"c = socket.socket(1, socket.{kind}); c.connect({name!r}); s, _ = l.accept(); c.send(b'hello')")
    if not abstract:
        source.run(f"os.chmod({name!r}, 0o600); os.chown({name!r}, 12, 34)")
    listener, client, server = source.run("l.fileno(), c.fileno(), s.fileno()")
    section = dump(source)
    if abstract:
        source.close = lambda: None
        source.process.kill()
        source.process.wait()
        for pipe in (source.process.stdin, source.process.stdout, source.process.stderr):
            pipe.close()
    from tests.survival.files.conftest import restore

    target = puppets()
    restore(section, target)
    target.run(f"l, c, s = [socket.socket(fileno=n) for n in ({listener}, {client}, {server})]")
    expected = name.encode() if abstract else name
    assert target.run("l.getsockname(), s.getsockname(), c.getpeername()") == (expected,) * 3
    assert target.run("s.recv(100)") == b"hello"
    target.run(f"d = socket.socket(1, socket.{kind}); d.connect({name!r}); e, _ = l.accept(); e.send(b'new')")
    assert target.run("d.recv(10)") == b"new"
    if not abstract:
        found = (tmp_path / "socket").stat()
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o600, 12, 34)


def test_a_bound_datagram_socket_keeps_its_queue_and_who_is_connected_to_it(puppets, move, tmp_path):
    name = str(tmp_path / "log")
    source = puppets()
    source.run(f"s = socket.socket(1, 2); s.bind({name!r}); c = socket.socket(1, 2); c.connect({name!r})")
    source.run("c.send(b'one'); c.send(b''); c.send(b'three')")
    server, client = source.run("s.fileno(), c.fileno()")
    target = move(source)
    target.run(f"s, c = [socket.socket(fileno=n) for n in ({server}, {client})]")
    assert target.run("[s.recv(100) for _ in range(3)]") == [b"one", b"", b"three"]
    target.run("c.send(b'more')")
    assert target.run("s.recv(100)") == b"more"


def test_options_of_unix_sockets_survive(puppets, move):
    source = puppets()
    a = source.run("a, b = socket.socketpair(); a.setsockopt(1, 16, 1); a.setsockopt(1, 7, 100000)") or source.run(
        "a.fileno()"
    )
    sizes = source.run("a.getsockopt(1, 7), a.getsockopt(1, 72)")
    target = move(source)
    target.run(f"x = socket.socket(fileno={a})")
    assert target.run("x.getsockopt(1, 16)") == 1
    assert target.run("x.getsockopt(1, 7), x.getsockopt(1, 72)") == sizes


def test_descriptors_in_a_queue_make_the_freeze_wait(puppets):
    source = puppets()
    source.run("a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0, 1])")
    with pytest.raises(UnsupportedError, match="descriptors are on their way"):
        dump(source)


def test_a_connection_to_a_socket_outside_is_refused(puppets, tmp_path):
    name = str(tmp_path / "outside")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        source = puppets()
        source.run(f"c = socket.socket(1); c.connect({name!r})")
        refusals = files.check(files.CheckContext(pid=source.pid)).refusals
    assert [refusal.code for refusal in refusals] == ["external-file"]
