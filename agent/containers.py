"""Containers of all configured runtimes: who is there, and all that is to be known of one before it moves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import xxhash

from agent.engine.native.check import check_container
from agent.kernel import openat2, timens
from agent.network import inspect as network_inspect
from agent.runtimes.base import Runtime, RuntimeContainer
from protocol.errors import KernelError, MigrateError, UnsupportedError, UsageError
from protocol.messages import ContainerReport, ContainerSummary, FileIdentity, Refusal

# A config.json is some ten KiB; seccomp profiles make it larger.
MAX_CONFIG_BYTES = 4 << 20
_HASH_PIECE_BYTES = 1 << 20
# cgroup v1 gives the largest page-aligned number for 'no limit', v2 the word 'max'.
_NO_LIMIT_FROM_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class Found:
    """A container and its runtime."""

    runtime: Runtime
    container: RuntimeContainer


def find(runtimes: Sequence[Runtime], name: str) -> Found:
    """The container called `name`. Raises: UnsupportedError: there is none, or two runtimes have one."""
    hits = [Found(runtime, item) for runtime in runtimes for item in runtime.containers() if item.name == name]
    if not hits:
        raise UnsupportedError(
            f"there is no container {name}", code="no-such-container", hint="migrate ps lists what runs where"
        )
    if len(hits) > 1:
        kinds = " and ".join(hit.runtime.kind for hit in hits)
        raise UnsupportedError(f"{kinds} both have a container {name}", code="ambiguous-container")
    return hits[0]


def summarize(runtimes: Sequence[Runtime]) -> list[ContainerSummary]:
    """All containers; memory and processes are those of the init's process tree."""
    out = []
    for runtime in runtimes:
        for item in runtime.containers():
            memory, processes = _tree_size(item.pid) if item.status in {"running", "paused"} else (0, 0)
            out.append(
                ContainerSummary(
                    name=item.name, runtime=runtime.kind, status=item.status, pid=item.pid,
                    memory_bytes=memory, processes=processes, bundle=item.bundle,
                )
            )  # fmt: skip
    return out


def with_migration(summary: ContainerSummary, migration: str) -> ContainerSummary:
    """The same, marked as held by an unfinished migration."""
    return msgspec.structs.replace(summary, migration=migration)


def _tree_size(pid: int) -> tuple[int, int]:
    try:
        init = psutil.Process(pid)
        tree = [init, *init.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    memory = processes = 0
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended while it was looked at
            memory += process.memory_info().rss
            processes += 1
    return memory, processes


def read_config(bundle: str) -> bytes:
    """config.json of a bundle. Raises: MigrateError."""
    path = Path(bundle, "config.json")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise MigrateError(f"cannot read {path}: {error.strerror}", code="bundle") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes", code="bundle")
    parse_config(data)
    return data


def parse_config(data: bytes) -> dict[str, object]:
    """The object in a config.json. Raises: UsageError: it is none."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("process"), dict):
        raise UsageError("config.json has no object 'process'")
    return config


def rootfs_of(bundle: str, config: dict[str, object]) -> Path:
    """The root file system of a bundle on this host."""
    root = config.get("root")
    path = root.get("path", "rootfs") if isinstance(root, dict) else "rootfs"
    return Path(bundle, str(path))


def memory_limit(pid: int) -> int:
    """The memory limit of a process's cgroup in bytes; 0: none. Source: cgroups(7)."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            candidates = [Path(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes")]
        elif not controllers:
            candidates = [Path(f"/sys/fs/cgroup{group}/memory.max"), Path(f"/sys/fs/cgroup/unified{group}/memory.max")]
        else:
            continue
        for path in candidates:
            if path.exists():
                text = path.read_text(encoding="ascii").strip()
                limit = _NO_LIMIT_FROM_BYTES if text == "max" else int(text)
                if limit < _NO_LIMIT_FROM_BYTES:
                    return limit
    return 0


def digest_file(fd: int) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of an open file."""
    hasher = xxhash.xxh3_128()
    size = 0
    while piece := os.pread(fd, _HASH_PIECE_BYTES, size):
        hasher.update(piece)
        size += len(piece)
    return size, hasher.hexdigest()


def _open_regular(root_fd: int, path: str) -> int:
    """Open a file below a root for reading, by a descriptor that has read nothing before it was looked at.

    Raises: KernelError: not there, or not a regular file: opening a device may have effects, a fifo never ends.
    """
    found = openat2.open_in_root(root_fd, path, os.O_PATH)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise KernelError(f"open({path})", errno.EINVAL, "it is not a regular file")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)


def identify(root_fd: int, paths: Sequence[str]) -> list[FileIdentity]:
    """Size and digest of files below a container's root, never following a link out of it.

    Raises: KernelError: one cannot be opened.
    """
    out = []
    for path in sorted(set(paths)):
        fd = _open_regular(root_fd, path)
        try:
            size, digest = digest_file(fd)
        finally:
            os.close(fd)
        out.append(FileIdentity(path=path, size=size, digest=digest))
    return out


def verify_files(bundle: str, report: ContainerReport, host: str) -> list[Refusal]:
    """What of the files that the container has open or mapped is missing or different in this host's bundle."""
    config = parse_config(report.config_json)
    root = rootfs_of(bundle, config)
    try:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return [
            Refusal(
                code="bundle-missing", host=host, object=str(root),
                message=f"the container's root file system {root} is not there: {error.strerror}",
                hint=f"copy the bundle {bundle} to {host} first; storage is not carried yet",
            )
        ]  # fmt: skip
    refusals = []
    try:
        for wanted in report.files:
            try:
                found = identify(root_fd, [wanted.path])[0]
            except KernelError as error:
                message = f"{wanted.path} cannot be opened in {root}: {error.message}"
                refusals.append(Refusal(code="file-missing", host=host, object=wanted.path, message=message))
                continue
            if found != wanted:
                refusals.append(
                    Refusal(
                        code="file-differs", host=host, object=wanted.path,
                        message=f"{wanted.path} is not the same file on both hosts "
                        f"({wanted.size} bytes, {wanted.digest[:12]} against {found.size}, {found.digest[:12]})",
                        hint="make the root file systems the same; storage is not carried yet",
                    )
                )  # fmt: skip
    finally:
        os.close(root_fd)
    return refusals


def report(found: Found, *, storage: str, tcp: str, network: str, bridge: str) -> ContainerReport:
    """Inspect a running container; nothing of it is stopped.

    Raises: UnsupportedError: it does not run.
    """
    item = found.container
    if item.status != "running" or not item.pid:
        raise UnsupportedError(
            f"{item.name} is {item.status}, not running", code="not-running", hint="only running containers move live"
        )
    try:
        return _report(found, storage=storage, tcp=tcp, network=network, bridge=bridge)
    except (FileNotFoundError, ProcessLookupError) as error:
        if Path(f"/proc/{item.pid}/exe").exists():
            raise
        raise UnsupportedError(
            f"{item.name} ended while it was looked at", code="not-running", hint="only running containers move live"
        ) from error


def _report(found: Found, *, storage: str, tcp: str, network: str, bridge: str) -> ContainerReport:
    item = found.container
    config_json = read_config(item.bundle)
    checked = check_container(item.pid, storage=storage, tcp=tcp, network=network)
    named = network_inspect.named_namespace_of(item.pid, config_json)
    net = network_inspect.inspect_network(item.pid, bridge, path=named)
    root_fd = os.open(f"/proc/{item.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files = identify(root_fd, checked.files)
    finally:
        os.close(root_fd)
    refusals = [*checked.refusals, *(net.refusals if network == "keep" else [])]
    return ContainerReport(
        name=item.name, runtime=found.runtime.kind, status=item.status, pid=item.pid, bundle=item.bundle,
        config_json=config_json, memory_bytes=checked.memory_bytes, mapped_bytes=checked.mapped_bytes,
        memory_limit=memory_limit(item.pid), processes=checked.processes, threads=checked.threads,
        connections=checked.connections, files=files, network=net.network, refusals=refusals,
        warnings=list(checked.warnings), executable=os.readlink(f"/proc/{item.pid}/exe"),
        monotonic_offset_ns=timens.offsets_of(item.pid).monotonic_ns - timens.own_offsets().monotonic_ns,
    )  # fmt: skip
