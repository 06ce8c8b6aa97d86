"""userfaultfd in asynchronous write-protect mode: it marks what was written and stops nobody.

Source: ioctl_userfaultfd(2); UFFD_FEATURE_WP_ASYNC (Linux 6.7).
"""

from __future__ import annotations

import fcntl
import struct

from agent.kernel.syscalls import os_failure
from agent.kernel.types import Fd

# linux/userfaultfd.h
UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_REGISTER_MODE_WP = 2
UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15
# fcntl.h
O_CLOEXEC = 0o2000000

ASYNC_WRITE_PROTECT = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_PAGEFAULT_FLAG_WP


def enable(descriptor: Fd, features: int = ASYNC_WRITE_PROTECT) -> None:
    """The handshake that a new userfaultfd needs once.

    Raises: KernelError: EINVAL when this kernel lacks one of `features`.
    """
    try:
        fcntl.ioctl(descriptor, UFFDIO_API, struct.pack("=QQQ", UFFD_API, features, 0))
    except OSError as error:
        raise os_failure(f"ioctl(UFFDIO_API, features {features:#x})", error) from error


def register_write_protect(descriptor: Fd, start: int, size_bytes: int) -> None:
    """Watch a range of the address space that the userfaultfd was made in, from any process, without a stop.

    Raises: KernelError: EINVAL or EPERM: this kind of area cannot be watched. TaskGoneError: the address space is gone.
    """
    _range_ioctl("UFFDIO_REGISTER", UFFDIO_REGISTER, descriptor, start, size_bytes, UFFDIO_REGISTER_MODE_WP, 0)


def unregister(descriptor: Fd, start: int, size_bytes: int) -> None:
    _range_ioctl("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, descriptor, start, size_bytes)


def _range_ioctl(name: str, request: int, descriptor: Fd, start: int, size_bytes: int, *rest: int) -> None:
    try:
        fcntl.ioctl(descriptor, request, struct.pack(f"={2 + len(rest)}Q", start, size_bytes, *rest))
    except OSError as error:
        raise os_failure(f"ioctl({name}, {start:#x}, {size_bytes} bytes)", error) from error
