"""Becomes somebody else in several ways, then waits; what it is, /proc tells."""

import ctypes
import os
import signal
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_SET_NAME = 1, 8, 47, 15

os.umask(0o037)
os.chdir("/tmp")
os.nice(3)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
os.setgroups([5, 1001, 2002])
os.setresgid(1000, 1001, 1002)
os.setresuid(1000, 1001, 1002)
libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
# Only CAP_KILL (5) and CAP_NET_BIND_SERVICE (10) stay permitted, CAP_KILL is effective and ambient.
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)(1 << 5, 1 << 5 | 1 << 10, 1 << 5, 0, 0, 0)
if libc.capset(header, data):
    sys.exit(f"capset: {ctypes.get_errno()}")
if libc.prctl(PR_CAP_AMBIENT, 2, 5, 0, 0):
    sys.exit(f"ambient: {ctypes.get_errno()}")


def other():
    libc.prctl(PR_SET_NAME, b"a)b (c\\\n d", 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGRTMIN + 9])
    # This thread alone gives up what is left; raw, because the C library would do it for all.
    libc.syscall(126, header, (ctypes.c_uint32 * 6)(0, 0, 0, 0, 0, 0))
    while True:
        time.sleep(0.1)


threading.Thread(target=other, daemon=True).start()
count = 0
while True:
    time.sleep(0.05)
    count += 1
    print(f"count {count} uid {os.getresuid()} gid {os.getresgid()} groups {os.getgroups()}", flush=True)
