"""Holds one thing that cannot be moved: its name is the argument."""

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
what = sys.argv[1]
if what == "posix-timers":
    timer = ctypes.c_void_p()
    if libc.timer_create(1, None, ctypes.byref(timer)):
        sys.exit("timer_create")
elif what == "shared-memory":
    fd = os.memfd_create("held")
    os.ftruncate(fd, 4096)
    held = mmap.mmap(fd, 4096)
elif what == "shared-file-mapping":
    fd = os.open("/shared/file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    held = mmap.mmap(fd, 4096)
elif what == "deleted-file":
    fd = os.open("/shared/gone", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    held = mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE)
    os.close(fd)
    Path("/shared/gone").unlink()
elif what == "aio":
    context = ctypes.c_ulong()
    if libc.syscall(206, 8, ctypes.byref(context)):
        sys.exit("io_setup")
elif what == "system-v-ipc":
    if libc.shmget(0, 4096, 0o1600) < 0:
        sys.exit("shmget")
elif what == "tmpfs-contents":
    Path("/dev/shm-file").write_text("x")
elif what == "chroot":
    os.chroot("/usr")
print("ready", flush=True)
time.sleep(1000)
