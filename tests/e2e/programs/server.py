"""A server in a container: 50 threads, each in a wait of its own kind, and a TCP port that asks them how they are.

Every thread counts its rounds and checks that each wait lasted as long as it should, by CLOCK_MONOTONIC: no shorter,
and never with an error. `status` on a connection answers with one JSON line; the connection stays open.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time

_THREADS = 50
_WAIT_S = 0.2
_faults: list[str] = []
_rounds = [0] * _THREADS
_alarms = [0]


def _sleep(_: int) -> None:
    time.sleep(_WAIT_S)


def _condition(_: int) -> None:
    condition = threading.Condition()
    with condition:
        condition.wait(_WAIT_S)


def _poll(_: int) -> None:
    read_end, write_end = os.pipe()
    try:
        if select.select([read_end], [], [], _WAIT_S)[0]:
            _faults.append("an empty pipe was readable")
    finally:
        os.close(read_end)
        os.close(write_end)


_epolls = {number: select.epoll() for number in range(3, _THREADS, 5)}


def _epoll(number: int) -> None:
    if _epolls[number].poll(_WAIT_S):
        _faults.append("an empty epoll had an event")


_pairs = {number: socket.socketpair() for number in range(4, _THREADS, 5)}


def _socket(number: int) -> None:
    left, right = _pairs[number]
    right.settimeout(_WAIT_S)
    try:
        right.recv(1)
    except TimeoutError:
        left.send(b"x")
        right.recv(1)
    else:
        _faults.append("a silent socket had data")


_KINDS = (_sleep, _condition, _poll, _epoll, _socket)


def _work(number: int) -> None:
    kind = _KINDS[number % len(_KINDS)]
    while True:
        start = time.monotonic()
        try:
            kind(number)
        except OSError as error:
            _faults.append(f"thread {number} {kind.__name__}: {error}")
        took = time.monotonic() - start
        # Half a second more than asked for is a machine under load; an hour is a clock that jumped.
        if not _WAIT_S * 0.98 <= took <= _WAIT_S + 5:
            _faults.append(f"thread {number} {kind.__name__} waited {took:.3f} s")
        _rounds[number] += 1


def _alarm(_: int, __: object) -> None:
    _alarms[0] += 1


def main() -> None:
    """Serve on the port of the first argument."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
    for number in range(_THREADS):
        threading.Thread(target=_work, args=(number,), daemon=True).start()
    listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
    print("serving", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as stream:
        for line in stream:
            assert line == "status\n", line
            status = {
                "rounds": list(_rounds),
                "faults": _faults[:20],
                "alarms": _alarms[0],
                "monotonic_s": time.monotonic(),
                "pid": os.getpid(),
                "threads": len(os.listdir("/proc/self/task")),
                "tids": sorted(map(int, os.listdir("/proc/self/task"))),
            }
            stream.write(json.dumps(status) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
