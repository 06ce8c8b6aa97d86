"""A container of runc for one test: the machine's own programs, a directory of its own, nothing else."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"]
_SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": [],
        "env": ["PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"],
        "cwd": "/",
        "capabilities": dict.fromkeys(["bounding", "effective", "permitted", "ambient"], _CAPABILITIES),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    },
    "root": {"path": "rootfs", "readonly": False},
    "hostname": "survival",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        *[
            {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
            for path in ["/usr", "/etc"]
        ],
    ],
    "linux": {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in ["pid", "network", "ipc", "uts", "mount"]],
    },
}
# A filter as runtimes install one: some calls that the engine itself injects are forbidden to the container.
_SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {"names": ["userfaultfd", "mremap", "setns", "unshare", "recvmsg"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    ],
}
_TIMEOUT_S = 20.0


class Container:
    """One container; `directory` becomes its bundle."""

    def __init__(
        self, name: str, directory: Path, args: Sequence[str], shared: Path, *,
        seccomp: bool = True, edit: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.directory = directory
        self.log = directory / "log"
        self.root = directory.parent / "runc"
        spec = copy.deepcopy(_SPEC)
        spec["process"]["args"] = list(args)
        spec["mounts"].append({"destination": "/shared", "type": "bind", "source": str(shared), "options": ["bind"]})
        if seccomp:
            spec["linux"]["seccomp"] = _SECCOMP
        if edit is not None:
            edit(spec)
        rootfs = directory / "rootfs"
        rootfs.mkdir(parents=True)
        for path in ["bin", "sbin", "lib", "lib64"]:
            (rootfs / path).symlink_to(f"usr/{path}")
        (rootfs / "tmp").mkdir()
        (directory / "config.json").write_text(json.dumps(spec))

    def runc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            ["runc", "--root", self.root, *arguments], text=True, capture_output=True, timeout=_TIMEOUT_S, **options
        )
        if result.returncode:
            raise AssertionError(f"runc {arguments}: {result.stderr} {self.log.read_text()}")
        return result

    def create(self, prefix: Sequence[str] = ()) -> None:
        with self.log.open("wb") as log:
            subprocess.run(
                [*prefix, "runc", "--root", self.root, "create", "--bundle", self.directory, self.name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=_TIMEOUT_S,
            )  # fmt: skip

    @property
    def start_argv(self) -> list[str]:
        return ["runc", "--root", str(self.root), "start", self.name]

    def start(self) -> None:
        self.runc("start", self.name)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.runc("state", self.name).stdout)
        return state

    @property
    def pid(self) -> int:
        return int(self.state["pid"])

    def delete(self) -> None:
        subprocess.run(
            ["runc", "--root", self.root, "delete", "--force", self.name], capture_output=True, timeout=_TIMEOUT_S
        )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_line(self, text: str, timeout_s: float = 10.0) -> str:
        """The first line of output that has `text`."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in self.lines():
                if text in line:
                    return line
            if time.monotonic() > deadline:
                state = Path(f"/proc/{self.pid}/stack")
                where = state.read_text() if state.exists() else "the process is gone"
                raise AssertionError(f"{self.name} has not said {text!r}:\n{self.log.read_text()[-3000:]}\n{where}")
            time.sleep(0.005)


def compile_c(source: Path, target: Path) -> Path:
    """Build a program of tests/survival/programs. Raises: CalledProcessError."""
    subprocess.run(["gcc", "-O1", "-g", "-pthread", "-mavx2", "-o", target, source, "-lm"], check=True)
    os.chmod(target, 0o755)  # noqa: PTH101 - as the linker leaves it, whatever the umask
    return target
