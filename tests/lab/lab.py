"""The lab: hosts on one LAN inside one pid namespace, so that the end of one process ends everything."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.lab import cgroups
from tests.lab.cgroups import CgroupTree
from tests.lab.containers import ContainerHost
from tests.lab.host import AGENT_PORT, BRIDGE, PROJECT, LabError, make_key
from tests.lab.namespaces import only_child, spawn

BASE = Path("/var/tmp/migrate-lab")
LAN = "lan0"
_BOOT_TIMEOUT_S = 20.0
_FIRST_HOST = 11
_FIRST_CLIENT = 101
_OUTER = f"""
mount -t proc proc /proc
ip link set lo up
ip link add {LAN} type bridge mcast_snooping 0
ip link set {LAN} up
trap '' CHLD
echo ready
exec cat >/dev/null
"""


class Lab:
    """Use as a context manager; several may run at once. What a killed one left is swept at the next start."""

    def __init__(self, name: str | None = None, *, keep: bool = False) -> None:
        self.name = name or f"{os.getpid()}-{secrets.token_hex(3)}"
        self.directory = BASE / self.name
        self.hosts: dict[str, ContainerHost] = {}
        self._keep = keep
        self._cgroups = CgroupTree(f"{cgroups.PREFIX}{self.name}/outer")
        self._outer: subprocess.Popen[Any] | None = None
        self._outer_pid = 0
        self._boots: dict[str, subprocess.Popen[Any]] = {}

    # Life

    def __enter__(self) -> Self:
        BASE.mkdir(mode=0o755, exist_ok=True)
        with _lock(BASE / ".lock"):
            _sweep()
            self.directory.mkdir()
            self._alive = (self.directory / ".alive").open("w")
            fcntl.flock(self._alive, fcntl.LOCK_EX)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self.operator.mkdir()
        self.public_key = make_key(self.identity, "lab")
        self._cgroups.make()
        unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-euc", _OUTER]
        self._outer = self._boot_process("lab", unshare, inside=None, tree=self._cgroups)
        self._outer_pid = only_child(self._outer.pid)

    def close(self) -> None:
        """End every process, then remove cgroups and files."""
        if self._outer_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._outer_pid, signal.SIGKILL)
        for host in self.hosts.values():
            host.cgroups.kill()
        for process in [*self._boots.values(), *([self._outer] if self._outer else [])]:
            _close_pipes(process)
        for host in self.hosts.values():
            host.reap()
            host.pid = 0
        for process in [*self._boots.values(), *([self._outer] if self._outer else [])]:
            process.wait()
        self._boots.clear()
        self._outer, self._outer_pid = None, 0
        _remove_cgroups(self.name)
        try:
            if not self._keep:
                _remove_tree(self.directory)
        finally:
            self._alive.close()

    def _boot_process(
        self, name: str, args: list[str], *, inside: int | None, tree: CgroupTree
    ) -> subprocess.Popen[Any]:
        """Start a pid 1 that lives as long as its stdin, our end of a pipe; returns once it said 'ready'."""
        log = self.directory / f"{name}.boot.log"
        with log.open("ab") as errors:
            process = spawn(
                args,
                inside=inside,
                enter=["--mount", "--net", "--root", "--wd"],
                cgroups=tree.joinable(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            _close_pipes(process)
            process.wait()
            raise LabError(f"{name} did not boot:\n{log.read_text()}")
        return process

    # Hosts

    def add_host(self, name: str, *, monotonic_offset_s: int = 0) -> ContainerHost:
        """A host that can run containers: its own bridge cbr0 with its address, joined to the LAN."""
        return self._add(name, _FIRST_HOST, bridge=BRIDGE, offset_s=monotonic_offset_s)

    def add_client(self, name: str = "client") -> ContainerHost:
        """A machine on the LAN for load generators and the coordinator; it sees the inventory and the identity."""
        host = self._add(name, _FIRST_CLIENT, bridge=None, offset_s=0)
        host.env["MIGRATE_INVENTORY"] = str(self.inventory_path)
        return host

    def _add(self, name: str, first: int, *, bridge: str | None, offset_s: int) -> ContainerHost:
        if name in self.hosts:
            raise LabError(f"there is a host {name} already")
        number = first + sum(1 for h in self.hosts.values() if (h.bridge is None) == (bridge is None))
        host = ContainerHost(
            name=name,
            address=f"10.77.0.{number}",
            directory=self.directory / name,
            cgroups=CgroupTree(f"{cgroups.PREFIX}{self.name}/{name}"),
            offset_s=offset_s,
        )
        host.bridge = bridge
        host.number = number
        self.hosts[name] = host
        self.boot(host)
        return host

    def boot(self, host: ContainerHost) -> None:
        """Switch `host` on; its disk is as it was left."""
        if host.pid:
            raise LabError(f"{host.name} runs already")
        host.cgroups.make()
        if host.bridge is None:
            host.cgroups.prefer()  # a client would be a machine of its own: what it measures is not its own waiting
        else:
            host.cgroups.grant_real_time()
        unshare = ["unshare", "--net", "--mount", "--uts", "--ipc", "--cgroup", "--pid", "--time"]
        unshare += [f"--monotonic={host.monotonic_offset_s}", "--fork", "--kill-child", "--"]
        mounts = " ".join(f"{h.where}={h.options}" for h in host.cgroups.hierarchies)
        visible = [
            str(p) for p in {PROJECT, Path(sys.prefix), Path(sys.base_prefix)} if p not in {Path("/usr"), Path("/")}
        ]
        if host.bridge is None:
            visible.append(str(self.operator))
        script = ["sh", str(Path(__file__).with_name("boot.sh")), host.name, str(host.stage), str(host.persist), mounts]
        process = self._boot_process(
            host.name, [*unshare, *script, *sorted(visible)], inside=self._outer_pid, tree=host.cgroups
        )
        self._boots[host.name] = process
        host.pid = only_child(process.pid)
        host.boots += 1
        self._connect(host)
        self._write_hosts_files()

    def _connect(self, host: ContainerHost) -> None:
        """Put the host's eth0 on the LAN; with a bridge the address lies on that, and containers join it."""
        self._ip(
            f"link add {host.port} type veth peer name eth0 netns {host.pid}",
            f"link set {host.port} master {LAN} up",
        )
        commands = ["link set lo up", "link set eth0 up"]
        device = "eth0"
        if host.bridge:
            # A MAC of its own: else the bridge takes over that of its lowest port, and changes it as they come and go.
            mac = f"02:00:0a:4d:00:{host.number:02x}"
            commands += [f"link add {host.bridge} address {mac} type bridge mcast_snooping 0"]
            commands += [f"link set eth0 master {host.bridge}", f"link set {host.bridge} up"]
            device = host.bridge
        host.ip(*commands, f"addr add {host.address}/24 dev {device}")

    def _ip(self, *commands: str) -> None:
        """Run commands of ip(8) in the LAN's network namespace, with process ids as we see them."""
        enter = ["nsenter", f"--target={self._outer_pid}", "--net", "--", "ip", "-batch", "-"]
        done = subprocess.run(enter, input="\n".join(commands), text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise LabError(f"{done.stderr}{commands}")

    def _write_hosts_files(self) -> None:
        running = [h for h in self.hosts.values() if h.pid]
        text = "".join(f"{h.address} {h.name}\n" for h in self.hosts.values())
        for host in running:
            (host.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{text}")

    # Mishaps

    def power_cut(self, host: ContainerHost) -> None:
        """Everything in `host` is gone at once; nothing says goodbye on the network. Its disk stays."""
        self._ip(f"link del {host.port}")
        os.kill(host.pid, signal.SIGKILL)
        host.cgroups.kill()
        process = self._boots.pop(host.name)
        _close_pipes(process)
        host.reap()
        process.wait()
        host.pid = 0
        host.cgroups.remove()

    def link_down(self, host: ContainerHost) -> None:
        """Pull the cable of `host`: frames are lost, no interface notices."""
        self._ip(f"link set {host.port} nomaster")

    def link_up(self, host: ContainerHost) -> None:
        self._ip(f"link set {host.port} master {LAN}")

    def shape(self, host: ContainerHost, rate: str | None) -> None:
        """Limit the link of `host`, both ways, to `rate` as tc(8) writes it ("1gbit"); None: no limit."""
        enter = ["nsenter", f"--target={self._outer_pid}", "--net", "--"]
        for prefix, device in [(enter, host.port), (["nsenter", f"--target={host.pid}", "--net", "--"], "eth0")]:
            if rate is None:
                # Status 2: there was no limit.
                subprocess.run([*prefix, "tc", "qdisc", "del", "dev", device, "root"], check=False, capture_output=True)
                continue
            change = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate]
            subprocess.run([*prefix, *change, "burst", "1m", "latency", "50ms"], check=True, capture_output=True)

    # The operator

    @property
    def operator(self) -> Path:
        """What the operator has: inventory and identity. Seen by clients at the same path, not by hosts."""
        return self.directory / "operator"

    @property
    def identity(self) -> Path:
        return self.operator / "id_ed25519"

    @property
    def inventory_path(self) -> Path:
        return self.operator / "hosts.toml"

    def install_agents(self, *, start: bool = True, agentless: bool = False) -> Path:
        """Agent on every host, the lab's key authorized, the inventory written with pinned host keys."""
        text = '[defaults]\nuser = "root"\n'
        for host in self.hosts.values():
            if host.bridge is None:
                continue
            host.install_agent([self.public_key])
            text += f'\n[hosts.{host.name}]\naddress = "{host.address}"\nidentity = "{self.identity}"\n'
            text += f'host_key = "{host.host_key}"\n'
            if agentless:
                host.start_sshd([self.public_key])
            else:
                text += f"port = {AGENT_PORT}\n"
                if start:
                    host.start_agent()
        self.inventory_path.write_text(text)
        return self.inventory_path


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    for pipe in [process.stdin, process.stdout]:
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def _lock(path: Path) -> Any:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_tree(directory: Path) -> None:
    """Another lab may sweep the same directory at this moment: what is gone is gone."""

    def tolerate(_: Any, path: str, error: tuple[Any, BaseException, Any]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(directory, onerror=tolerate)


def _owner_is_gone(directory: Path) -> bool:
    try:
        alive: IO[str] = (directory / ".alive").open("r+")
    except FileNotFoundError:
        return True
    with alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _sweep() -> None:
    """Remove what labs left whose process was killed: frozen tasks, cgroups, files."""
    for directory in BASE.iterdir():
        if directory.is_dir() and _owner_is_gone(directory):
            tree = CgroupTree(f"{cgroups.PREFIX}{directory.name}")
            tree.kill()
            _remove_cgroups(directory.name)
            _remove_tree(directory)


def _remove_cgroups(lab: str) -> None:
    tree = CgroupTree(f"{cgroups.PREFIX}{lab}")
    tree.kill()
    tree.remove()


def wait_until(fact: Any, *, timeout_s: float = 10.0, what: str = "the awaited fact") -> Any:
    """Ask `fact` every few milliseconds until it is true; returns what it gave. Raises: LabError."""
    deadline = time.monotonic() + timeout_s
    while not (value := fact()):
        if time.monotonic() > deadline:
            raise LabError(f"{what} did not come about in {timeout_s} s")
        time.sleep(0.005)
    return value
