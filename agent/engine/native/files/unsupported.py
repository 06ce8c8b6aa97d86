"""Everything that no other file here carries: refused, by name, before anything is stopped.

Does not survive: nothing of this kind does.
"""

from __future__ import annotations

import stat

from agent.engine.native.files.base import ObjectRecord, OpenFile, Scope
from protocol.messages import Refusal

# How the link begins -> (code, what it is, what to do).
_BY_LINK = {
    "anon_inode:[io_uring]": ("io-uring", "an io_uring", "turn io_uring off in the program"),
    "anon_inode:[perf_event]": ("perf-event", "a performance counter", "stop profiling"),
    "anon_inode:bpf": ("bpf", "an eBPF object", ""),
    "anon_inode:[userfaultfd]": ("userfaultfd", "a userfaultfd", ""),
    "anon_inode:kvm": ("kvm", "a virtual machine", ""),
    "anon_inode:[fanotify]": ("fanotify", "a fanotify group", ""),
    "anon_inode:inotify": ("inotify", "an inotify instance", "turn file watching off in the program"),
    "anon_inode:[pidfd]": ("pidfd", "a pidfd", ""),
    "pidfd:": ("pidfd", "a pidfd", ""),
    "anon_inode:seccomp": ("seccomp-notify", "a seccomp listener", ""),
    "anon_inode:[fscontext]": ("fscontext", "a filesystem context", ""),
    "anon_inode:landlock": ("landlock", "a landlock ruleset", ""),
    "anon_inode:sync_file": ("dmabuf", "a sync file", ""),
    "/dmabuf:": ("dmabuf", "a DMA buffer", ""),
    "/memfd:": ("memfd", "a memfd", ""),
    "/anon_hugepage": ("hugetlb", "anonymous huge pages", ""),
    "/SYSV": ("sysv-shm", "System V shared memory", ""),
    "net:[": ("namespace-fd", "a namespace", ""),
    "mnt:[": ("namespace-fd", "a namespace", ""),
    "pid:[": ("namespace-fd", "a namespace", ""),
    "user:[": ("namespace-fd", "a namespace", ""),
    "uts:[": ("namespace-fd", "a namespace", ""),
    "ipc:[": ("namespace-fd", "a namespace", ""),
    "cgroup:[": ("namespace-fd", "a namespace", ""),
    "time:[": ("namespace-fd", "a namespace", ""),
    "/dev/pts/": ("terminal", "a terminal", "start the container without a terminal"),
    "/dev/ptmx": ("terminal", "a terminal", "start the container without a terminal"),
    "/dev/tty": ("terminal", "a terminal", "start the container without a terminal"),
    "/dev/console": ("terminal", "a terminal", "start the container without a terminal"),
    "anon_inode:": ("anonymous-object", "a kernel object", ""),
    "socket:[": ("socket", "a socket of a family that is not carried", ""),
}
_BY_KIND = {
    stat.S_IFIFO: ("fifo", "a named pipe", "use a pipe or a unix socket"),
    stat.S_IFCHR: ("device", "a device", ""),
    stat.S_IFBLK: ("device", "a block device", ""),
    stat.S_IFREG: ("file", "a file without a path in the container", ""),
    stat.S_IFLNK: ("file-o-path", "a symbolic link open with O_PATH", ""),
}


def matches(file: OpenFile, scope: Scope) -> bool:  # noqa: ARG001 - the interface of all kinds
    """Anything: it stands last in the registry."""
    return True


def check(file: OpenFile, scope: Scope) -> list[Refusal]:
    """Always one refusal."""
    code, what, hint = _describe(file)
    return [scope.refusal(file, code, f"{what} cannot be carried to another host", hint)]


def dump(file: OpenFile, scope: Scope) -> ObjectRecord:
    """Raises: UnsupportedError: always."""
    code, what, hint = _describe(file)
    raise scope.refuse(file, code, f"{what} cannot be carried to another host", hint)


def _describe(file: OpenFile) -> tuple[str, str, str]:
    for prefix, described in _BY_LINK.items():
        if file.link.startswith(prefix):
            return described
    return _BY_KIND.get(file.kind, ("unknown-object", "an object of an unknown kind", ""))
