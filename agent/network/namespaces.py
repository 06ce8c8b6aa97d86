"""Network namespaces: entering one for a moment, making a new one, giving it a name as `ip netns` does.

A namespace belongs to a thread. Everything here changes the calling thread only, and changes it back.
Source: setns(2), unshare(2), mount(2), network_namespaces(7), ip-netns(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from protocol.errors import KernelError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# linux/sched.h
CLONE_NEWNET = 0x40000000
# linux/mount.h
MS_BIND = 4096
MS_REC = 16384
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

OWN_NAMESPACE = "/proc/thread-self/ns/net"
# Names that come from a peer may only stand here: the path is created, mounted over and unlinked.
NAMED_DIRECTORIES = ("/run/netns", "/var/run/netns")

_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def _check(call: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(call, number, os.strerror(number))


def namespace_of(pid: int) -> str:
    return f"/proc/{pid}/ns/net"


def is_same_namespace(one: str, other: str) -> bool:
    """Raises: KernelError: one of them does not exist."""
    try:
        first, second = os.stat(one), os.stat(other)
    except OSError as error:
        raise KernelError(f"stat({error.filename})", error.errno or 0, error.strerror or "") from error
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


@contextlib.contextmanager
def inside(namespace: str | int) -> Iterator[None]:
    """Put the calling thread into a network namespace, by path or open descriptor, and back.

    Raises: KernelError: no such namespace, or it is not a network namespace.
    """
    home = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _opened(namespace) as descriptor:
            _check(f"setns({namespace})", _libc.setns(descriptor, CLONE_NEWNET))
        try:
            yield
        finally:
            _check("setns(own namespace)", _libc.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


@contextlib.contextmanager
def _opened(namespace: str | int) -> Iterator[int]:
    if isinstance(namespace, int):
        yield namespace
        return
    try:
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open({namespace})", error.errno or 0, error.strerror or "") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def in_fresh_namespace(work: Callable[[], _T]) -> _T:
    """Run `work` in a thread of its own whose network namespace is new; the namespace ends with its last user.

    Raises: KernelError: none can be made; else what `work` raises.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            _check("unshare(CLONE_NEWNET)", _libc.unshare(CLONE_NEWNET))
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            errors.append(error)

    thread = threading.Thread(target=body, name="fresh-netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_fresh_namespace() -> int:
    """A descriptor of a new, empty network namespace. The caller closes it."""
    return in_fresh_namespace(lambda: os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC))


def check_name(path: str) -> None:
    """Raises: UnsupportedError: `path` is not a plain name below one of NAMED_DIRECTORIES."""
    directory, _, name = path.rpartition("/")
    if directory not in NAMED_DIRECTORIES or name in {"", ".", ".."} or "\x00" in name:
        raise UnsupportedError(
            f"network namespace path {path!r} is not a name below {' or '.join(NAMED_DIRECTORIES)}",
            code="network-namespace-path",
            hint="make the namespace with `ip netns add` and name that path in config.json",
        )


def is_named_namespace(path: str) -> bool:
    """Whether a namespace (not a left-over plain file) is mounted at `path`."""
    return _filesystem_kind(path) == _NSFS_MAGIC


def create_named_namespace(path: str) -> None:
    """Make a network namespace with a name, as `ip netns add` does.

    Raises: UnsupportedError: not a permitted name. KernelError: EEXIST when a namespace is there already.
    """
    check_name(path)
    if is_named_namespace(path):
        raise KernelError(f"create network namespace {path}", errno.EEXIST, "it exists")
    directory = Path(path).parent
    directory.mkdir(parents=True, exist_ok=True)
    _share(os.path.realpath(directory))
    Path(path).touch(mode=0o444)
    descriptor = open_fresh_namespace()
    try:
        source = f"/proc/self/fd/{descriptor}".encode()
        _check(f"mount(network namespace, {path})", _libc.mount(source, path.encode(), None, MS_BIND, None))
    except KernelError:
        Path(path).unlink()
        raise
    finally:
        os.close(descriptor)


def remove_named_namespace(path: str) -> None:
    """Unmount and unlink a named namespace; nothing to do is success.

    Raises: UnsupportedError: not a permitted name. KernelError.
    """
    check_name(path)
    while is_named_namespace(path):
        _check(f"umount({path})", _libc.umount2(path.encode(), MNT_DETACH | UMOUNT_NOFOLLOW))
    Path(path).unlink(missing_ok=True)


def _share(directory: str) -> None:
    """Make mounts below `directory` visible in other mount namespaces, as `ip netns` does."""
    if _libc.mount(b"", directory.encode(), b"none", MS_SHARED | MS_REC, None) == 0:
        return
    target = directory.encode()
    _check(f"mount --bind {directory}", _libc.mount(target, target, b"none", MS_BIND | MS_REC, None))
    _check(f"mount --make-rshared {directory}", _libc.mount(b"", target, b"none", MS_SHARED | MS_REC, None))


_NSFS_MAGIC = 0x6E736673  # linux/magic.h
_STATFS_BYTES = 120  # struct statfs, 64 bits; f_type is its first word


def _filesystem_kind(path: str) -> int:
    """f_type of the filesystem at `path`; 0 when there is nothing. Source: statfs(2)."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.statfs(path.encode(), buffer) < 0:
        number = ctypes.get_errno()
        if number in {errno.ENOENT, errno.ENOTDIR}:
            return 0
        raise KernelError(f"statfs({path})", number, os.strerror(number))
    return int.from_bytes(buffer.raw[:8], "little")
