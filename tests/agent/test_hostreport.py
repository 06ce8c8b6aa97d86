"""The host report asks this machine's kernel by using it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import hostreport
from agent.host import Host, open_host
from agent.settings import NetworkSettings, RuntimeSettings, Settings
from protocol import codec
from protocol.errors import KernelError, UnsupportedError
from protocol.messages import HostReport
from tests.agent.inside import call
from tests.lab import Lab

pytestmark = pytest.mark.root


def settings(tmp_path: Path, **changes: object) -> Settings:
    runc = RuntimeSettings(kind="runc", root=str(tmp_path / "runc"))
    return Settings(**{"state_dir": str(tmp_path), "name": "here", "runtimes": [runc], **changes})  # type: ignore[arg-type]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    opened = open_host(settings(tmp_path))
    yield opened
    opened.journal.close()


def test_this_machine_has_every_feature(host: Host):
    report = hostreport.collect(host)
    assert report.feature_notes == {}
    assert report.features == dict.fromkeys(hostreport._PROBES, True)


def test_it_says_what_two_hosts_must_agree_on(host: Host):
    report = hostreport.collect(host)
    assert re.fullmatch("[0-9a-f]{64}", report.vdso_digest)
    assert report.xstate_bytes >= 576  # the x87 and SSE area with its header
    assert report.xstate_bytes % 8 == 0
    assert report.page_bytes == os.sysconf("SC_PAGE_SIZE")
    assert report.architecture in {"x86_64", "aarch64"}
    assert report.cpu_flags == sorted(report.cpu_flags)
    assert "sse2" in report.cpu_flags or report.architecture != "x86_64"
    assert [(runtime.kind, runtime.version.split()[0]) for runtime in report.runtimes] == [("runc", "runc")]
    assert report.memory_available > 0
    assert report.state_dir_free > 0


def test_it_fits_its_own_schema(host: Host):
    report = hostreport.collect(host)
    assert codec.decode(codec.encode(report), HostReport) == report


def test_the_digest_is_the_same_each_time():
    assert hostreport.vdso_digest() == hostreport.vdso_digest()


@pytest.mark.parametrize(
    "error",
    [OSError(1, "Operation not permitted"), KernelError("userfaultfd()", 38, "no such call"), StopIteration()],
)
def test_a_probe_that_fails_gives_a_note_and_says_what_to_do(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail() -> None:
        raise error

    monkeypatch.setitem(hostreport._PROBES, "wp_async", (fail, "needs Linux 6.7 with CONFIG_USERFAULTFD"))
    report = hostreport.collect(host)
    assert not report.features["wp_async"]
    assert "needs Linux 6.7 with CONFIG_USERFAULTFD" in report.feature_notes["wp_async"]
    assert str(error) in report.feature_notes["wp_async"]
    assert all(works for name, works in report.features.items() if name != "wp_async")


def test_a_runtime_that_is_not_installed_is_a_missing_feature(tmp_path: Path):
    missing = RuntimeSettings(kind="crun", binary="no-such-crun")
    host = open_host(settings(tmp_path, runtimes=[missing]))
    report = hostreport.collect(host)
    assert report.features["runtime_crun"] is False
    assert "no-such-crun is not installed" in report.feature_notes["runtime_crun"]
    with pytest.raises(UnsupportedError) as caught:
        host.runtime("crun")
    assert caught.value.code == "runtime-missing"
    assert "no-such-crun is not installed" in str(caught.value)
    with pytest.raises(UnsupportedError, match="runtime runc is not to be had here: not configured"):
        host.runtime("runc")
    host.journal.close()


def test_a_bridge_that_is_not_there_is_noted(tmp_path: Path):
    host = open_host(settings(tmp_path, network=NetworkSettings(bridge="nobridge0")))
    report = hostreport.collect(host)
    assert report.bridge == ""
    assert report.feature_notes["bridge"] == "nobridge0 of agent.toml is not a bridge of this host"
    host.journal.close()


def test_probing_time_namespaces_moves_no_clock_of_ours(host: Host):
    before = Path("/proc/self/ns/time_for_children").readlink()
    collected: list[HostReport] = []
    thread = threading.Thread(target=lambda: collected.append(hostreport.collect(host)))
    thread.start()
    thread.join()
    assert collected[0].features["time_namespace"]
    assert Path("/proc/self/ns/time_for_children").readlink() == before
    assert Path("/proc/thread-self/ns/time_for_children").readlink() == before


def test_addresses_are_those_of_the_host_and_of_its_named_namespaces(lab: Lab):
    at = lab.add_host("hostA")
    at.attach_network("web1", "10.77.0.50/24")
    at.run(["ip", "-n", "web1", "address", "add", "2001:db8::5/64", "dev", "eth0", "nodad"])
    # One that is no process, one that is, without a name for its namespace.
    program = "from agent.hostreport import _addresses\nresult = _addresses([4194303, 1])"
    assert call(at, program) == [at.address, "10.77.0.50", "2001:db8::5"]
