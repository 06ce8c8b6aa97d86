"""Regular files and directories with a path in the container: opened again by path at the target.

Does not survive: deleted files, files replaced since they were opened, O_DIRECT, locks, leases; files open for
writing unless the storage is shared.
"""

from __future__ import annotations

import os
import stat

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope, Workshop, set_flags, status_flags
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import Refusal

# Filesystems whose files are views of the kernel, made anew at each open.
_KERNEL_VIEWS = ("/proc/", "/sys/")


class RegularFile(ObjectRecord, frozen=True, kw_only=True, tag="regular-file"):
    """A file or directory by its path in the container."""

    path: str
    offset: int
    directory: bool = False


def matches(file: OpenFile, scope: Scope) -> bool:
    """A path inside the container that is a regular file or a directory."""
    return file.kind in {stat.S_IFREG, stat.S_IFDIR} and file.link.startswith("/") and not scope.is_outside(file)


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Everything that opening the path again could get wrong."""
    refusals = []
    is_regular = file.kind == stat.S_IFREG
    if file.status.st_nlink == 0 or file.link.endswith(" (deleted)"):
        return [scope.refusal(file, "file-deleted", "the file is open but was deleted", "close it, then migrate")]
    if not _is_text(file.link):
        return [scope.refusal(file, "file-name", "the name is not UTF-8", "rename it")]
    if file.access != os.O_RDONLY and is_regular and scope.storage != "shared" and not is_kernel_view(file):
        refusals.append(
            scope.refusal(
                file,
                "file-open-for-writing",
                "a file open for writing is on this host's own storage",
                "with storage that both hosts share: --storage shared",
            )
        )
    if is_kernel_view(file) and file.access != os.O_RDONLY:
        refusals.append(scope.refusal(file, "kernel-file", "a file of the kernel is open for writing"))
    if file.flags & os.O_DIRECT:
        refusals.append(scope.refusal(file, "file-o-direct", "the file is open with O_DIRECT"))
    if any(line.startswith(("lock:", "lease:")) for line in file.lines):
        refusals.append(scope.refusal(file, "file-lock", "the process holds a lock or a lease on it"))
    if file.flags & os.O_PATH:
        refusals.append(scope.refusal(file, "file-o-path", "the file is open with O_PATH"))
    try:
        found = scope.open_path_status(path_in_container(file, scope))
    except KernelError as error:
        return [*refusals, scope.refusal(file, "file-unreachable", f"its path leads nowhere ({error.message})")]
    if (found.st_dev, found.st_ino) != (file.status.st_dev, file.status.st_ino):
        refusals.append(scope.refusal(file, "file-replaced", "its path leads to another file now"))
    return refusals


def dump(file: OpenFile, scope: Scope) -> RegularFile:
    """Path, offset, flags."""
    if file.status.st_nlink == 0:
        raise scope.refuse(file, "file-deleted", "the file is open but was deleted", "close it, then migrate")
    return RegularFile(
        id=file.id,
        flags=status_flags(file.flags),
        path=path_in_container(file, scope),
        offset=file.offset,
        directory=file.kind == stat.S_IFDIR,
    )


def restore(record: RegularFile, workshop: Workshop) -> int:
    """Open it from the container's root; what it is is checked before it is used.

    Raises: KernelError: not there. UnsupportedError: something else is there.
    """
    kind_flags = os.O_DIRECTORY if record.directory else 0
    fd = workshop.open_path(record.path, record.flags | kind_flags)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISDIR(mode) if record.directory else stat.S_ISREG(mode)):
            raise UnsupportedError(f"{record.path} is something else on this host", code="file-differs")
        set_flags(fd, record.flags)  # the O_NONBLOCK that kept the open from waiting goes
        if record.offset:
            os.lseek(fd, record.offset, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_kernel_view(file: OpenFile) -> bool:
    """Whether it is a file of procfs or sysfs: nothing of it lies on a disk."""
    return file.link.startswith(_KERNEL_VIEWS)


def is_content_read(file: OpenFile) -> bool:
    """Whether the target must have a file of the same contents."""
    return file.kind == stat.S_IFREG and file.access == os.O_RDONLY and not is_kernel_view(file)


def path_in_container(file: OpenFile, scope: Scope) -> str:
    """The link relative to the container's root, as it is under a plain chroot too."""
    root = scope.root_path
    if root != "/" and file.link.startswith(root + "/"):
        return file.link[len(root) :]
    return "/" if file.link == root else file.link


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
