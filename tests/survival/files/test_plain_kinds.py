"""Numbers, flags and contents of everything but internet sockets survive."""

import os
import time

import pytest

from agent.engine.native import files
from tests.survival.files.conftest import dump, restore
from tests.survival.files.puppet import links

pytestmark = [pytest.mark.root, pytest.mark.survival]


def test_stdin_stdout_and_stderr_become_what_the_targets_runtime_gave(puppets, move):
    source = puppets()
    target = move(source)
    assert target.run("1 + 1") == 2
    assert links(target.pid).keys() == {0, 1, 2}
    assert links(target.pid) != links(source.pid)


def test_a_duplicate_of_stdout_at_another_number_is_the_targets_stdout(puppets, move):
    source = puppets()
    source.run("os.dup2(1, 17)")
    source.run("os.dup2(2, 1000)")
    target = move(source)
    assert links(target.pid)[17] == links(target.pid)[1]
    assert links(target.pid)[1000] == links(target.pid)[2]


def test_a_file_open_for_reading_keeps_offset_and_flags(puppets, move, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    source = puppets()
    fd = source.run(f"os.open({str(path)!r}, os.O_RDONLY | os.O_NOATIME)")
    source.run(f"os.lseek({fd}, 4, 0)")
    target = move(source)
    assert target.run(f"os.read({fd}, 3)") == b"456"
    assert target.run(f"fcntl.fcntl({fd}, fcntl.F_GETFL)") == source.run(f"fcntl.fcntl({fd}, fcntl.F_GETFL)")
    assert target.run(f"os.get_inheritable({fd})") is False


def test_duplicates_share_their_offset_and_separate_opens_do_not(puppets, move, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    source = puppets()
    source.run(f"a = os.open({str(path)!r}, 0); os.dup2(a, 40); b = os.open({str(path)!r}, 0); os.dup2(b, 41)")
    a, b = source.run("a"), source.run("b")
    target = move(source)
    target.run(f"os.read({a}, 5)")
    assert target.run("os.lseek(40, 0, 1)") == 5
    assert target.run("os.lseek(41, 0, 1)") == 0
    assert target.run(f"os.get_inheritable({b})") is False
    assert target.run("os.get_inheritable(41)") is True


def test_a_directory_stays_open(puppets, move, tmp_path):
    (tmp_path / "inside").write_text("x")
    source = puppets()
    fd = source.run(f"os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY)")
    assert move(source).run(f"os.listdir({fd})") == ["inside"]


def test_a_file_open_for_writing_is_carried_on_shared_storage(puppets, move, tmp_path):
    path = tmp_path / "log"
    source = puppets()
    fd = source.run(f"os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)")
    source.run(f"os.write({fd}, b'one ')")
    target = move(source, storage="shared")
    target.run(f"os.write({fd}, b'two')")
    assert path.read_bytes() == b"one two"


def test_memory_devices_are_opened_again(puppets, move):
    source = puppets()
    null, zero, random = (source.run(f"os.open('/dev/{name}', os.O_RDWR)") for name in ("null", "zero", "urandom"))
    target = move(source)
    assert target.run(f"os.read({null}, 8)") == b""
    assert target.run(f"os.read({zero}, 3)") == b"\0\0\0"
    assert len(target.run(f"os.read({random}, 8)")) == 8


def test_bytes_left_in_a_pipe_survive(puppets, move):
    source = puppets()
    reader, writer = source.run("os.pipe()")
    source.run(
        f"fcntl.fcntl({writer}, 1031, 1 << 18); os.write({writer}, b'abc' * 40000); os.set_blocking({reader}, False)"
    )
    target = move(source)
    assert target.run(f"fcntl.fcntl({reader}, 1032)") == 1 << 18
    assert target.run(f"os.get_blocking({reader})") is False
    assert target.run(f"os.get_blocking({writer})") is True
    assert target.run(f"b''.join([os.read({reader}, 65536), os.read({reader}, 65536)])") == b"abc" * 40000
    target.run(f"os.write({writer}, b'more')")
    assert target.run(f"os.read({reader}, 10)") == b"more"
    # Nothing was consumed at the source.
    assert source.run(f"os.read({reader}, 6)") == b"abcabc"


def test_packets_in_a_pipe_stay_apart(puppets, move):
    source = puppets()
    reader, writer = source.run("os.pipe2(os.O_DIRECT)")
    source.run(f"os.write({writer}, b'one'); os.write({writer}, b'three')")
    target = move(source)
    assert target.run(f"os.read({reader}, 100)") == b"one"
    assert target.run(f"os.read({reader}, 100)") == b"three"
    target.run(f"os.write({writer}, b'a'); os.write({writer}, b'b')")
    assert target.run(f"os.read({reader}, 100)") == b"a"


def test_a_pipe_whose_writer_is_gone_stays_at_its_end(puppets, move):
    source = puppets()
    reader, writer = source.run("os.pipe()")
    source.run(f"os.write({writer}, b'last'); os.close({writer})")
    target = move(source)
    assert target.run(f"os.read({reader}, 10)") == b"last"
    assert target.run(f"os.read({reader}, 10)") == b""


def test_an_eventfd_keeps_count_and_semaphore(puppets, move):
    source = puppets()
    plain = source.run("os.eventfd(7, os.EFD_NONBLOCK)")
    semaphore = source.run("os.eventfd(3, os.EFD_SEMAPHORE)")
    target = move(source)
    assert target.run(f"os.eventfd_read({plain})") == 7
    assert target.run(f"os.get_blocking({plain})") is False
    assert target.run(f"os.eventfd_read({semaphore})") == 1
    assert target.run(f"os.eventfd_read({semaphore})") == 1


_TIMERFD = """
import ctypes
libc = ctypes.CDLL(None)
def timer(clock, flags, interval, value):
    fd = libc.timerfd_create(clock, 0o4000)
    libc.timerfd_settime(fd, flags, struct.pack('4q', 0, interval, *divmod(value, 10**9)), None)
    return fd
def left(fd):
    b = ctypes.create_string_buffer(32); libc.timerfd_gettime(fd, b); return struct.unpack('4q', b.raw)
"""


def test_timers_keep_what_is_left_their_interval_and_unread_ticks(puppets, move):
    source = puppets()
    source.run(_TIMERFD)
    running = source.run("timer(1, 0, 500000000, 30 * 10**9)")
    fired = source.run("timer(1, 0, 0, 1)")
    off = source.run("libc.timerfd_create(1, 0)")
    wall = source.run("timer(0, 1, 0, time.time_ns() + 20 * 10**9)")
    while not source.run(f"select.select([{fired}], [], [], 0)[0]"):
        time.sleep(0.001)
    target = move(source)
    target.run(_TIMERFD)
    assert 28 <= target.run(f"left({running})")[2] <= 30
    assert target.run(f"left({running})")[1] == 500000000
    assert target.run(f"struct.unpack('q', os.read({fired}, 8))") == (1,)
    assert target.run(f"left({off})") == (0, 0, 0, 0)
    assert 18 <= target.run(f"left({wall})")[2] <= 20


def test_a_signalfd_keeps_its_mask(puppets, move):
    source = puppets()
    source.run("import ctypes; libc = ctypes.CDLL(None)")
    fd = source.run("libc.signalfd(-1, struct.pack('Q', 1 << 11 | 1 << 9).ljust(128, b'\\0'), 0o4000)")
    target = move(source)
    target.run("signal.pthread_sigmask(signal.SIG_BLOCK, [12]) and None")
    target.run("os.kill(os.getpid(), 12)")
    assert target.run(f"struct.unpack_from('I', os.read({fd}, 128))[0]") == 12


def test_epoll_watches_the_same_numbers_with_the_same_data(puppets, move):
    source = puppets()
    source.run("import ctypes; libc = ctypes.CDLL(None)")
    reader, writer = source.run("os.pipe()")
    event = source.run("os.eventfd(1)")
    poll = source.run("libc.epoll_create1(0o2000000)")
    nested = source.run("libc.epoll_create1(0)")
    source.run(f"libc.epoll_ctl({poll}, 1, {event}, struct.pack('<IQ', 1, 0x1122334455667788))")
    source.run(f"libc.epoll_ctl({poll}, 1, {reader}, struct.pack('<IQ', 1 | 1 << 31, 5))")
    source.run(f"libc.epoll_ctl({nested}, 1, {poll}, struct.pack('<IQ', 1, 9))")
    target = move(source)
    target.run("import ctypes; libc = ctypes.CDLL(None); b = ctypes.create_string_buffer(120)")
    assert target.run(f"libc.epoll_wait({poll}, b, 10, 0)") == 1
    assert target.run("struct.unpack_from('<IQ', b)") == (1, 0x1122334455667788)
    target.run(f"os.read({event}, 8); os.write({writer}, b'x')")
    assert target.run(f"libc.epoll_wait({poll}, b, 10, 0)") == 1
    assert target.run("struct.unpack_from('<IQ', b)") == (1, 5)
    target.run(f"os.write({writer}, b'x')")
    assert target.run(f"libc.epoll_wait({nested}, b, 10, 0)") == 1
    assert target.run(f"os.get_inheritable({poll})") is False


def test_five_hundred_numbers_with_wide_gaps_land_where_they_were(puppets, move):
    source = puppets()
    source.run("[os.dup2(os.eventfd(n), 30 + 2 * n) for n in range(400)] and None")
    source.run("[os.dup2(os.eventfd(n), 1500 + n) for n in range(100)] and None")
    source.run("[os.close(n) for n in range(3, 30) if os.path.exists(f'/proc/self/fd/{n}')] and None")
    before = links(source.pid)
    target = move(source)
    assert links(target.pid).keys() == before.keys()
    assert target.run("os.eventfd_read(30 + 2 * 77)") == 77
    assert target.run("os.eventfd_read(1577)") == 77


def test_what_the_target_had_open_is_closed(puppets):
    source, target = puppets(), puppets()
    target.run("os.dup2(0, 99)")
    restore(dump(source), target)
    assert links(target.pid).keys() == {0, 1, 2}


REFUSED = {
    "file-open-for-writing": "os.open('{tmp}/w', os.O_RDWR | os.O_CREAT)",
    "file-deleted": "os.open('{tmp}/d', os.O_CREAT); os.unlink('{tmp}/d')",
    "file-o-path": "os.open('{tmp}', os.O_PATH)",
    "file-lock": "f = os.open('{tmp}/l', os.O_CREAT); fcntl.flock(f, fcntl.LOCK_EX)",
    "fifo": "os.mkfifo('{tmp}/p'); os.open('{tmp}/p', os.O_RDWR)",
    "memfd": "os.memfd_create('m')",
    "inotify": "import ctypes; ctypes.CDLL(None).inotify_init1(0)",
    "io-uring": "import ctypes; b = ctypes.create_string_buffer(120); ctypes.CDLL(None).syscall(425, 4, b)",
    "pidfd": "os.pidfd_open(os.getpid())",
    "userfaultfd": "import ctypes; ctypes.CDLL(None).syscall(323, 1)",
    "namespace-fd": "os.open('/proc/self/ns/net', 0)",
    "terminal": "os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)",
    "epoll-stale": "e = select.epoll(); a, b = os.pipe(); e.register(a); os.dup2(a, 50); os.close(a)",
    "socket": "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(puppets, tmp_path, code):
    source = puppets()
    source.run(f"exec({REFUSED[code].format(tmp=tmp_path)!r})")
    refusals = files.check(files.CheckContext(pid=source.pid)).refusals
    assert [refusal.code for refusal in refusals] == [code]
    assert refusals[0].fd > 2
    assert str(refusals[0].fd) in refusals[0].message


def test_a_pipe_to_a_process_outside_is_refused(puppets):
    source = puppets()
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    try:
        path = f"/proc/{os.getpid()}/fd/{theirs}"
        source.run(f"os.open({path!r}, os.O_WRONLY)")
        refusals = files.check(files.CheckContext(pid=source.pid)).refusals
        assert [refusal.code for refusal in refusals] == ["external-file"]
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_check_lists_the_files_whose_contents_must_be_the_same(puppets, tmp_path):
    (tmp_path / "data").write_text("x")
    source = puppets()
    source.run(f"os.open({str(tmp_path / 'data')!r}, 0)")
    found = files.check(files.CheckContext(pid=source.pid))
    assert found.paths == [str(tmp_path / "data")]
    assert found.refusals == []
