"""Counts, a line each 50 ms, while it holds what its argument names; that is there when the first line is."""

import ctypes
import itertools
import os
import subprocess
import sys
import time

_IO_URING_SETUP = 425  # asm-generic/unistd.h

what, *more = sys.argv[1:] or ["nothing"]
held: object = None
match what:
    case "io_uring":
        held = ctypes.CDLL(None).syscall(_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
        if held == -1:
            sys.exit("io_uring_setup")
    case "child":
        held = subprocess.Popen(["/usr/bin/sleep", "1000"])
    case "file":
        held = os.open("/tmp/data", os.O_WRONLY | os.O_CREAT)
    case "memory":
        held = os.urandom(int(more[0]))

for number in itertools.count():
    print(number, flush=True)
    time.sleep(0.05)
