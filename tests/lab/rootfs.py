"""The root filesystem of the containers: python3, redis and a shell of this machine, with their libraries."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "lab"

_PYTHON = "/usr/bin/python3"
_PROGRAMS = [
    *["/usr/bin/sh", "/usr/bin/bash", "/usr/bin/cat", "/usr/bin/echo", "/usr/bin/env", "/usr/bin/id", "/usr/bin/kill"],
    *["/usr/bin/ls", "/usr/bin/mkdir", "/usr/bin/rm", "/usr/bin/sleep", "/usr/bin/tail", "/usr/bin/true"],
    *["/usr/bin/redis-server", "/usr/bin/redis-cli", _PYTHON],
]
_UNUSED_MODULES = [
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "tkinter",
    "turtledemo",
    "pydoc_data",
    "config-*",
]
_DIRECTORIES = ["dev", "etc", "home", "opt/lab", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "var/lib"]
_MERGED = ["bin", "sbin", "lib", "lib32", "lib64"]  # Debian's /bin is usr/bin, and so on
_FORMAT = 2  # of the cached tree: count up when this file changes what is in it


def container_rootfs() -> Path:
    """The tree, built once per version of the programs and cached in the project's .cache/."""
    stamps = [f"{p} {os.path.realpath(p)} {Path(p).stat().st_mtime_ns}" for p in _PROGRAMS]
    digest = hashlib.sha256("\n".join([str(_FORMAT), *stamps]).encode()).hexdigest()[:16]
    wanted = CACHE / f"rootfs-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "rootfs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.is_dir():
            for old in CACHE.glob("rootfs-*"):
                shutil.rmtree(old)
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=CACHE))
            _build(partial)
            partial.chmod(0o755)
            partial.rename(wanted)
    return wanted


def _build(root: Path) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for name in _MERGED:
        if Path("/", name).is_symlink():
            (root / "usr" / name).mkdir(exist_ok=True)
            (root / name).symlink_to(f"usr/{name}")
    stdlib = Path(_run(_PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))").strip())
    ignored = shutil.ignore_patterns(*_UNUSED_MODULES, "dist-packages", "__pycache__")
    shutil.copytree(stdlib, root / stdlib.relative_to("/"), symlinks=True, ignore=ignored)
    modules = sorted(str(p) for p in stdlib.rglob("*.so"))
    for program in _PROGRAMS:
        _copy(root, program)
    for library in sorted(_libraries([*map(os.path.realpath, _PROGRAMS), *modules])):
        _copy(root, library)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    _run(_PYTHON, "-m", "compileall", "-q", "-s", str(root), str(root / stdlib.relative_to("/")))


def _copy(root: Path, path: str) -> None:
    """Copy a file under the same name, and every link on the way to it."""
    source = Path(os.path.realpath(Path(path).parent), Path(path).name)
    target = root / source.relative_to("/")
    if target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)
    if source.is_symlink():
        _copy(root, str(source.parent / source.readlink()))


def _libraries(files: list[str]) -> set[str]:
    """Every shared library of `files`. Source: ldd(1)."""
    output = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(?:=> |^\t)(/\S+) \(0x", output, re.MULTILINE))


def _run(*args: str) -> str:
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout
