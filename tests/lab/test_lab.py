"""The test hosts themselves: separate where hosts are separate, joined where they are joined, gone at the end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, LabError
from tests.lab.cgroups import PREFIX, hierarchies
from tests.lab.containers import ContainerHost
from tests.lab.host import PROJECT, RUNC
from tests.lab.lab import BASE, wait_until
from tests.lab.load import RedisLoad

pytestmark = pytest.mark.root

REDIS = ["redis-server", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no"]
PING = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"


class Pair:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.a = lab.add_host("hostA")
        self.b = lab.add_host("hostB", monotonic_offset_s=5000)
        self.client = lab.add_client()


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Pair:
    return Pair(lab)


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def reaches(source: ContainerHost, address: str, port: int) -> bool:
    done = source.run([sys.executable, "-c", PING, address, str(port)], check=False)
    return done.returncode == 0


def listen(host: ContainerHost, port: int) -> subprocess.Popen[str]:
    program = f"import socket; s = socket.create_server(('', {port})); s.listen(); input()"
    process = host.popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    host.wait_listening(port, process=process)
    return process


def monotonic_s(host: ContainerHost) -> float:
    return float(host.run([sys.executable, "-c", "import time; print(time.monotonic())"]).stdout)


def cgroup_directories(name: str) -> list[Path]:
    return [path for h in hierarchies() if (path := h.path / f"{PREFIX}{name}").exists()]


def processes_in(name: str) -> list[str]:
    """Command lines of what still runs in the cgroups of the lab `name`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if f"{PREFIX}{name}/" in status.read_text():
                found.append((status.parent / "cmdline").read_text())  # empty: dead, not reaped yet
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [command for command in found if command]


def test_two_hosts_and_a_client_start_within_two_seconds():
    began = time.monotonic()
    with Lab() as lab:
        Pair(lab)
        assert time.monotonic() - began < 2


def test_hosts_reach_each_other_by_address_and_name(pair: Pair):
    with listen(pair.b, 4001):
        assert reaches(pair.a, pair.b.address, 4001)
        assert reaches(pair.client, "hostB", 4001)


def test_hosts_do_not_see_each_others_files(pair: Pair):
    for place in ["/run", "/tmp", "/var/tmp", "/var/lib/migrate", "/etc/migrate", "/etc", "/opt"]:
        pair.a.run(["sh", "-c", f"echo secret >{place}/of-host-a"])
        assert pair.b.run(["cat", f"{place}/of-host-a"], check=False).returncode != 0
        assert not Path(place, "of-host-a").exists()
    found = pair.b.run(["find", str(BASE), "-name", "of-host-a"], check=False).stdout
    assert found == ""


def test_the_project_is_seen_at_its_path_and_cannot_be_written(pair: Pair):
    assert pair.a.run(["cat", PROJECT / "pyproject.toml"]).stdout == (PROJECT / "pyproject.toml").read_text()
    assert "Read-only" in pair.a.run(["touch", PROJECT / "x"], check=False).stderr


def test_monotonic_clocks_differ_and_boottime_does_not(pair: Pair):
    a_s, b_s = monotonic_s(pair.a), monotonic_s(pair.b)
    assert 5000 <= b_s - a_s < 5001
    uptimes = [float(host.run(["cat", "/proc/uptime"]).stdout.split()[0]) for host in [pair.a, pair.b]]
    assert abs(uptimes[1] - uptimes[0]) < 1


def test_a_popen_is_the_program_itself(pair: Pair):
    process = pair.a.popen(["sleep", "60"])
    assert wait_until(lambda: Path(f"/proc/{process.pid}/cmdline").read_text() == "sleep\x0060\x00")
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM


def test_an_engine_may_take_real_time_priority_on_a_host(pair: Pair):
    program = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))"
    pair.a.run([sys.executable, "-c", program])
    pair.b.run([sys.executable, "-c", program])


def test_a_host_can_be_short_of_memory(pair: Pair):
    pair.a.limit_memory(64 << 20)
    assert pair.a.run([sys.executable, "-c", "b'x' * (200 << 20)"], check=False).returncode == -signal.SIGKILL
    pair.a.limit_memory(None)
    pair.a.run([sys.executable, "-c", "b'x' * (200 << 20)"])


def test_a_failed_program_is_reported_with_its_host_and_words(pair: Pair):
    with pytest.raises(LabError, match=r"(?s)hostA: sh -c .* ended with 3.*no such luck"):
        pair.a.run(["sh", "-c", "echo no such luck >&2; exit 3"])


def test_only_clients_see_the_inventory(pair: Pair):
    pair.lab.install_agents(start=False)
    assert "host_key" in pair.client.run(["sh", "-c", 'cat "$MIGRATE_INVENTORY"']).stdout
    assert pair.a.run(["cat", pair.lab.inventory_path], check=False).returncode != 0
    assert oct(pair.lab.identity.stat().st_mode)[-3:] == "600"


def test_a_pulled_cable_carries_nothing_until_it_is_plugged_in_again(pair: Pair):
    with listen(pair.b, 4002):
        pair.lab.link_down(pair.b)
        assert not reaches(pair.a, pair.b.address, 4002)
        pair.lab.link_up(pair.b)
        assert reaches(pair.a, pair.b.address, 4002)


def test_a_shaped_link_has_its_rate_in_both_directions(pair: Pair):
    sink = "import socket; s = socket.create_server(('', 4003)); c = s.accept()[0]\nwhile c.recv(1 << 20): pass"
    source = textwrap.dedent("""
        import socket, sys, time
        s = socket.create_connection((sys.argv[1], 4003)); began = time.monotonic()
        s.sendall(bytes(12_000_000)); s.shutdown(1); s.recv(1); print(12e6 / (time.monotonic() - began))
    """)
    pair.lab.shape(pair.b, "200mbit")
    for sender, receiver in [(pair.a, pair.b), (pair.b, pair.a)]:
        with receiver.popen([sys.executable, "-c", sink]) as process:
            receiver.wait_listening(4003, process=process)
            rate = float(sender.run([sys.executable, "-c", source, receiver.address]).stdout)
        assert 15e6 < rate < 30e6
    pair.lab.shape(pair.b, None)
    assert "tbf" not in pair.b.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_a_stock_sshd_lets_the_lab_key_in_and_shows_the_pinned_key(pair: Pair):
    pair.lab.install_agents(start=False)
    pair.a.start_sshd([pair.lab.public_key])
    known = pair.client.root / "tmp/known_hosts"
    known.write_text(f"{pair.a.address} {pair.a.host_key}\n")
    options = ["-F", "none", "-o", "UserKnownHostsFile=/tmp/known_hosts", "-o", "StrictHostKeyChecking=yes"]
    command = ["ssh", *options, "-i", str(pair.lab.identity), f"root@{pair.a.address}", "hostname"]
    assert pair.client.run(command).stdout == "hostA\n"


@pytest.fixture(scope="module")
def redis(pair: Pair) -> ContainerHost:
    limit = 256 << 20
    pair.a.add_runc_container("web1", args=REDIS, ip="10.77.0.50/24", memory_limit_bytes=limit).wait_listening(6379)
    return pair.a


def test_a_client_gets_every_reply_and_finds_every_write(pair: Pair, redis: ContainerHost):
    with RedisLoad(pair.client, "10.77.0.50:6379", prefill_mb=8, dirty_mb_per_s=5, dirty_set_mb=2) as load:
        ports, replies = set(), 0
        while replies < 100:
            report = load.report()
            ports.add(report.local_port)
            replies += report.replies
        last = load.stop()
    assert ports == {last.local_port}
    assert last.prefilled_bytes == 8 << 20
    assert last.keys_read_back > 2048
    assert last.dirtied is not None
    assert last.dirtied["bytes"] > 0


def test_a_stall_is_seen_in_full(pair: Pair, redis: ContainerHost):
    with RedisLoad(pair.client, "10.77.0.50:6379") as load:
        redis.run([*RUNC, "pause", "web1"])
        assert redis.runc_list() == {"web1": "paused"}
        time.sleep(0.1)  # the stall itself
        redis.run([*RUNC, "resume", "web1"])
        reports = [load.report(), load.stop()]
    assert 100 <= max(report.max_gap_ms for report in reports) < 1000
    assert max(gap.requests for report in reports for gap in report.gaps) >= 100


def test_a_lost_write_is_found(pair: Pair, redis: ContainerHost):
    with RedisLoad(pair.client, "10.77.0.50:6379", prefill_mb=1) as load:
        assert redis.run([*RUNC, "exec", "web1", "redis-cli", "DEL", "fill:7"]).stdout == "1\n"
        with pytest.raises(LabError, match="wrong reply"):
            load.stop()


def test_the_processes_are_known_by_both_numbers(redis: ContainerHost):
    container = redis.container("web1")
    assert container.pids == [1]
    assert "redis-server" in Path(f"/proc/{container.pid}/cmdline").read_text()
    assert redis.pid_here(container.pid_in_host) == container.pid


def test_the_memory_limit_is_in_force(pair: Pair):
    hungry = ["python3", "-c", "b'x' * (200 << 20)"]
    pair.b.make_bundle("hungry", args=hungry, memory_limit_bytes=64 << 20)
    pair.b.run(["ip", "netns", "add", "hungry"])
    done = pair.b.run([*RUNC, "run", "--bundle", "/var/lib/containers-lab/hungry", "hungry"], check=False)
    assert done.returncode == 128 + signal.SIGKILL


def test_the_counter_counts_with_the_clock_of_its_host(pair: Pair):
    counter = pair.b.add_runc_container("counter", args=["python3", "/opt/lab/counter.py"], ip="10.77.0.51/24")
    lines = wait_until(lambda: t.splitlines() if (t := counter.log.read_text()).count("\n") > 3 else None)
    assert [int(line.split()[0]) for line in lines[:3]] == [0, 1, 2]
    assert abs(float(lines[0].split()[1]) - monotonic_s(pair.b)) < 60
    opened = {fd.name: fd.readlink() for fd in Path(f"/proc/{counter.pid}/fd").iterdir()}
    assert opened.keys() == {"0", "1", "2"}
    pair.b.run([*RUNC, "delete", "--force", "counter"])
    assert pair.b.runc_state("counter") is None


def test_a_power_cut_ends_all_and_keeps_the_disk(own_lab: Lab):
    host = own_lab.add_host("hostA")
    own_lab.install_agents(start=False)
    key = host.host_key
    container = host.add_runc_container("web1", args=REDIS, ip="10.77.0.50/24")
    host.run([*RUNC, "pause", "web1"])  # a frozen task must not outlive its host
    host.run(["sh", "-c", "echo kept >/var/lib/migrate/state; echo lost >/run/state; echo lost >/etc/state"])
    sleeper = host.popen(["sleep", "60"])
    own_lab.power_cut(host)
    assert sleeper.wait(0) == -signal.SIGKILL
    assert not Path(f"/proc/{container.pid}").exists()
    own_lab.boot(host)
    assert host.run(["cat", "/var/lib/migrate/state"]).stdout == "kept\n"
    assert host.run(["ls", "/run/state", "/etc/state"], check=False).stdout == ""
    assert host.host_key == key
    assert host.runc_list() == {}
    assert host.run(["ls", "/var/lib/containers-lab/web1"]).stdout == "config.json\nrootfs\n"


def test_nothing_is_left_behind():
    before = (Path("/proc/mounts").read_text(), sorted(Path("/sys/class/net").iterdir()))
    with Lab() as lab:
        host = Pair(lab).a
        host.add_runc_container("web1", args=REDIS, ip="10.77.0.50/24")
        host.run([*RUNC, "pause", "web1"])
        assert processes_in(lab.name)
        assert cgroup_directories(lab.name)
    assert processes_in(lab.name) == []
    assert cgroup_directories(lab.name) == []
    assert not lab.directory.exists()
    assert (Path("/proc/mounts").read_text(), sorted(Path("/sys/class/net").iterdir())) == before


def test_a_killed_lab_ends_its_processes_and_the_next_sweeps_the_rest(tmp_path: Path):
    program = textwrap.dedent("""
        import os, signal, sys
        from tests.lab import Lab
        from tests.lab.host import RUNC
        lab = Lab().__enter__()
        host = lab.add_host("hostA")
        host.add_runc_container("web1", args=["sleep", "100"], ip="10.77.0.50/24")
        host.run([*RUNC, "pause", "web1"])
        print(lab.name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name = done.stdout.strip()
    assert re.fullmatch(r"[0-9]+-[0-9a-f]+", name)
    assert (BASE / name).exists()
    with Lab():
        assert processes_in(name) == []
        assert cgroup_directories(name) == []
        assert not (BASE / name).exists()


def test_labs_with_the_same_hosts_run_side_by_side():
    with Lab() as one, Lab() as two:
        hosts = [lab.add_host("hostA") for lab in (one, two)]
        with listen(hosts[0], 4004):
            assert reaches(hosts[0], hosts[1].address, 4004)
            assert not reaches(hosts[1], hosts[0].address, 4004)
