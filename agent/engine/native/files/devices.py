"""Memory devices: /dev/null, zero, full, random, urandom of the container.

Does not survive: every other device.
"""

from __future__ import annotations

import os
import stat

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from agent.engine.native.files.stdio import ROLES
from protocol.errors import UnsupportedError
from protocol.messages import Refusal

# Documentation/admin-guide/devices.txt: major 1.
_MEMORY_DEVICES = {3: "/dev/null", 5: "/dev/zero", 7: "/dev/full", 8: "/dev/random", 9: "/dev/urandom"}
_MEMORY_MAJOR = 1


class MemoryDevice(ObjectRecord, frozen=True, kw_only=True, tag="device"):
    """By its minor number; opened where containers have it."""

    minor: int


def _minor(file: OpenFile) -> int | None:
    if file.kind == stat.S_IFCHR and os.major(file.status.st_rdev) == _MEMORY_MAJOR:
        minor = os.minor(file.status.st_rdev)
        return minor if minor in _MEMORY_DEVICES else None
    return None


def matches(file: OpenFile, scope: Scope) -> bool:
    """A memory device, except the runtime's own /dev/null: that one goes by its role."""
    given = scope.is_outside(file) and any(number < len(ROLES) for number, _ in file.numbers)
    return _minor(file) is not None and not given


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """An O_PATH descriptor is the only one refused."""
    return [scope.refusal(file, "file-o-path", "the device is open with O_PATH")] if file.flags & os.O_PATH else []


def dump(file: OpenFile, scope: Scope) -> MemoryDevice:
    """Minor number and flags."""
    minor = _minor(file)
    if minor is None:
        raise scope.refuse(file, "device", "not a memory device")
    return MemoryDevice(id=file.id, flags=status_flags(file.flags), minor=minor)


def restore(record: MemoryDevice, workshop: Workshop) -> int:
    """Open the container's own. Raises: UnsupportedError: that path is another device here."""
    path = _MEMORY_DEVICES.get(record.minor)
    if path is None:
        raise UnsupportedError(f"character device 1:{record.minor} is not carried", code="device")
    fd = workshop.open_path(path, record.flags)
    if os.fstat(fd).st_rdev != os.makedev(_MEMORY_MAJOR, record.minor):
        os.close(fd)
        raise UnsupportedError(f"{path} is another device on this host", code="file-differs")
    set_flags(fd, record.flags)
    return fd
