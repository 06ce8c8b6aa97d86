"""The real runc, in a test host, behind the narrow interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.runtimes import oci
from protocol.errors import UnsupportedError
from tests.agent.inside import call, without_network
from tests.lab import Lab
from tests.lab.containers import ContainerHost

pytestmark = pytest.mark.root

OPEN = "from agent.runtimes.oci import open_runtime\nruntime = open_runtime('runc', '/run/runc')\n"


@pytest.fixture(scope="module")
def host(lab: Lab) -> ContainerHost:
    return lab.add_host("hostA", monotonic_offset_s=1000)


def runtime(host: ContainerHost, program: str) -> Any:
    return call(host, OPEN + program)


def create(host: ContainerHost, name: str, bundle: str, offset: str = "None") -> Any:
    return runtime(
        host, f"result = runtime.create({name!r}, {bundle!r}, log_path='/tmp/{name}.log', monotonic_offset_ns={offset})"
    )


def bundle(host: ContainerHost, name: str, args: list[str] | None = None) -> str:
    return str(host.make_bundle(name, args=args or ["sleep", "60"], edit=without_network))


def test_it_says_its_version(host: ContainerHost):
    assert runtime(host, "result = runtime.version()").startswith("runc version 1.")


def test_no_containers_are_an_empty_list(host: ContainerHost):
    assert call(host, OPEN.replace("/run/runc", "/run/other") + "result = runtime.containers()") == []


def test_a_created_container_is_listed_found_and_deleted(host: ContainerHost):
    path = bundle(host, "made")
    made = create(host, "made", path)
    assert made == {"name": "made", "pid": made["pid"], "status": "created", "bundle": path}
    assert host.pid_here(made["pid"])
    assert runtime(host, "result = runtime.find('made')") == made
    assert made in runtime(host, "result = runtime.containers()")
    runtime(host, "runtime.delete('made'); result = None")
    assert runtime(host, "result = runtime.find('made')") is None


def test_what_it_starts_writes_to_the_log_and_a_running_one_is_killed_by_delete(host: ContainerHost):
    path = bundle(host, "loud", ["sh", "-c", "read x || echo no input; echo warning >&2; exec sleep 60"])
    create(host, "loud", path)
    start = runtime(host, "result = runtime.start_argv('loud')")
    host.run(start)
    log = host.root / "tmp/loud.log"
    while log.read_text() != "no input\nwarning\n":
        assert host.runc_state("loud")["status"] == "running"  # type: ignore[index]
    runtime(host, "runtime.delete('loud'); result = None")
    assert host.runc_state("loud") is None


def test_a_second_run_appends_to_the_log(host: ContainerHost):
    (host.root / "tmp/again.log").write_text("first life\n")
    create(host, "again", bundle(host, "again", ["echo", "second life"]))
    with host.popen(runtime(host, "result = runtime.start_argv('again')")):
        pass
    log = host.root / "tmp/again.log"
    while "second" not in log.read_text():
        assert host.runc_state("again") is not None
    assert log.read_text() == "first life\nsecond life\n"
    runtime(host, "runtime.delete('again'); result = None")


def test_a_container_that_is_not_there_is_found_by_none_and_deleted_without_a_word(host: ContainerHost):
    assert runtime(host, "runtime.delete('nobody'); result = runtime.find('nobody')") is None


@pytest.mark.parametrize("offset_ns", [0, 5_250_000_000, -7_000_000_001])
def test_its_monotonic_clock_is_moved_against_the_hosts(host: ContainerHost, offset_ns: int):
    name = f"clock{offset_ns}".replace("-", "m")
    made = create(host, name, bundle(host, name), str(offset_ns))
    offsets = Path(f"/proc/{host.pid_here(made['pid'])}/timens_offsets").read_text().split()
    total_ns = int(offsets[1]) * 1_000_000_000 + int(offsets[2])
    assert total_ns == 1000 * 1_000_000_000 + offset_ns
    # The runtime recognizes its own process by the start time, which follows another clock.
    assert runtime(host, f"result = runtime.find({name!r})")["status"] == "created"
    runtime(host, f"runtime.delete({name!r}); result = None")


def test_an_offset_moves_no_clock_when_none_is_asked_for(host: ContainerHost):
    made = create(host, "still", bundle(host, "still"))
    own = Path(f"/proc/{host.pid}/ns/time").readlink()
    assert Path(f"/proc/{host.pid_here(made['pid'])}/ns/time").readlink() == own
    runtime(host, "runtime.delete('still'); result = None")


def test_a_broken_bundle_is_refused_in_the_runtimes_own_words(host: ContainerHost):
    path = bundle(host, "broken")
    (host.persist / path.lstrip("/") / "config.json").write_text("{")
    failed = create(host, "broken", path)
    assert failed["code"] == "runtime"
    assert "runc cannot create broken: " in failed["text"]
    assert "unexpected end of JSON input" in failed["text"] or "unexpected EOF" in failed["text"]


def test_only_what_this_create_said_is_quoted(host: ContainerHost):
    (host.root / "tmp/quoted.log").write_text("the container's own last words\n")
    failed = create(host, "quoted", "/nowhere")
    assert "last words" not in failed["text"]
    assert "/nowhere" in failed["text"]


def test_a_program_that_is_not_in_the_root_is_named(host: ContainerHost):
    failed = create(host, "absent", bundle(host, "absent", ["/no/such/program"]), "1000000000")
    if failed.get("code") == "runtime":  # runc 1.1 looks before, crun after the start
        assert "/no/such/program" in failed["text"]
    else:
        assert failed["status"] == "created"
        runtime(host, "runtime.delete('absent'); result = None")


def test_a_name_is_given_once(host: ContainerHost):
    path = bundle(host, "twice")
    create(host, "twice", path)
    assert "already exists" in create(host, "twice", path)["text"]
    runtime(host, "runtime.delete('twice'); result = None")


def test_a_command_that_fails_is_quoted_with_its_arguments(host: ContainerHost):
    failed = runtime(host, "result = runtime._run('kill', 'nobody')")
    assert failed["code"] == "runtime"
    assert "runc --root /run/runc kill nobody failed: " in failed["text"]
    assert "does not exist" in failed["text"]


def test_a_binary_that_is_not_installed_is_unsupported():
    with pytest.raises(UnsupportedError, match="no-such-runc is not installed") as caught:
        oci.open_runtime("runc", binary="no-such-runc")
    assert caught.value.code == "runtime-missing"
    assert caught.value.exit_status == 3
    assert "agent.toml" in caught.value.hint


def test_a_runtime_has_its_own_root_unless_told_otherwise():
    assert oci.open_runtime("runc").root == "/run/runc"
    assert oci.open_runtime("runc", "/x").root == "/x"
