"""Fifty threads, each waiting in its own way; each says once a second that it still does, and all that goes wrong."""

import os
import select
import sys
import threading
import time
from typing import Any

failed = []
beats = [0] * 50


def sleeper(index):
    while True:
        start = time.monotonic()
        time.sleep(0.05)
        took = time.monotonic() - start
        if not 0.049 <= took < 1.5:
            failed.append(f"thread {index} slept {took}")
        beats[index] += 1


def waiter(index, condition):
    while True:
        with condition:
            if not condition.wait(30):
                failed.append(f"thread {index} was not woken")
        beats[index] += 1


def poller(index, readable):
    epoll = select.epoll()
    epoll.register(readable, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            if os.read(fd, 1) != b"x":
                failed.append(f"thread {index} read something else")
        beats[index] += 1


def reader(index, end):
    expected = 0
    while True:
        data = os.read(end, 4)
        if int.from_bytes(data, "big") != expected:
            failed.append(f"thread {index} wanted {expected}, got {data!r}")
        expected += 1
        beats[index] += 1


def guarded(index, function, *arguments):
    try:
        function(index, *arguments)
    except BaseException as error:
        failed.append(f"thread {index} ended by {error!r}")


condition = threading.Condition()
writers = []
pipes = []
for index in range(50):
    kind = index % 4
    if kind == 0:
        arguments: tuple[Any, ...] = (sleeper,)
    elif kind == 1:
        arguments = (waiter, condition)
    elif kind == 2:
        readable, writable = os.pipe()
        writers.append(writable)
        arguments = (poller, readable)
    else:
        theirs, ours = os.pipe()
        pipes.append(ours)
        arguments = (reader, theirs)
    threading.Thread(target=guarded, args=(index, *arguments), daemon=True).start()

tids = sorted(int(name) for name in os.listdir("/proc/self/task"))
round_number = 0
while True:
    time.sleep(0.05)
    with condition:
        condition.notify_all()
    for writable in writers:
        os.write(writable, b"x")
    for ours in pipes:
        os.write(ours, round_number.to_bytes(4, "big"))
    round_number += 1
    if round_number % 10 == 0:
        now = sorted(int(name) for name in os.listdir("/proc/self/task"))
        if now != tids:
            failed.append(f"thread ids were {tids}, are {now}")
        print(f"round {round_number} slowest {min(beats)} failed {failed}", flush=True)
        sys.stdout.flush()
