"""Every cause is found, and all of them at once."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.preflight import preflight
from migrate.request import MigrationRequest, Strategy
from protocol.messages import ContainerReport, HostReport, Network, Refusal
from tests.migrate.fake_agent import MIB, container_report, host_report

REQUEST = MigrationRequest(container="web1", target="hostB")


def check(
    *, source: dict[str, Any] | None = None, target: dict[str, Any] | None = None,
    container: dict[str, Any] | None = None, request: MigrationRequest = REQUEST, files: tuple[Refusal, ...] = (),
):  # fmt: skip
    one: HostReport = host_report("hostA", **(source or {}))
    two: HostReport = host_report("hostB", **(target or {}))
    moved: ContainerReport = container_report(**(container or {}))
    return preflight(one, two, moved, request, files)


def codes(result):
    return {refusal.code for refusal in result.refusals}


def without(*names):
    return {"features": host_report("x").features | dict.fromkeys(names, False)}


def test_two_like_hosts_have_nothing_against_it():
    result = check()
    assert result.refusals == ()
    assert result.warnings == ()


CAUSES: dict[str, dict[str, Any]] = {
    "architecture": {"target": {"architecture": "aarch64"}},
    "cpu-flags": {"source": {"cpu_flags": ["avx", "avx512f", "sse2"]}},
    "xstate-size": {"target": {"xstate_bytes": 832}},
    "vdso-differs": {"target": {"vdso_digest": "d2"}},
    "page-size": {"target": {"page_bytes": 65536}},
    "runtime-missing": {"target": {"runtimes": []}},
    "memory-limit": {"container": {"memory_bytes": 100 * MIB, "memory_limit": 104 * MIB}},
    "memory-available": {"target": {"memory_available": 70 * MIB}},
    "name-taken": {"target": {"containers": ["web1"]}},
    "bridge-missing": {"target": {"bridge": ""}},
    "host-network": {"container": {"network": Network(kind="host")}},
    "not-running": {"container": {"status": "paused"}},
    "state-dir-full": {"target": {"state_dir_free": 0}},
    "feature-pagemap-scan": {"source": without("pagemap_scan")},
    "feature-wp-async": {"source": without("wp_async")},
    "feature-pidfd-getfd": {"source": without("pidfd_getfd")},
    "feature-freezer": {"target": without("freezer")},
    "feature-root": {"source": without("root")},
    "feature-ns-last-pid": {"target": without("ns_last_pid")},
    "feature-packet-socket": {"source": without("packet_socket")},
    "feature-tcp-repair": {"target": without("tcp_repair")},
    "feature-time-namespace": {"target": without("time_namespace")},
    "io-uring": {"container": {"refusals": [Refusal(code="io-uring", message="uses io_uring", pid=1, fd=3)]}},
    "file-differs": {"files": (Refusal(code="file-differs", message="/bin/redis differs"),)},
    "storage-sync": {"request": MigrationRequest(container="web1", target="hostB", storage="sync")},
    "post-copy": {"request": MigrationRequest(container="web1", target="hostB", strategy=Strategy.POST_COPY)},
}


@pytest.mark.parametrize("code", CAUSES)
def test_each_cause_is_found_alone_and_said_with_a_text(code):
    result = check(**CAUSES[code])
    assert codes(result) == {code}
    assert all(refusal.message for refusal in result.refusals)


def test_all_causes_are_found_at_once():
    together: dict[str, Any] = {"source": {}, "target": {}, "container": {}}
    apart = {"architecture", "host-network"}  # these make others meaningless
    features: dict[str, dict[str, bool]] = {"source": {}, "target": {}}
    for code, change in CAUSES.items():
        if code in apart or "request" in change:
            continue
        for part, fields in change.items():
            if part == "files":
                together["files"] = fields
                continue
            for name, value in fields.items():
                if name == "features":
                    features[part] |= {key: False for key, present in value.items() if not present}
                else:
                    together[part][name] = value
    for part, lacking in features.items():
        together[part]["features"] = host_report("x").features | lacking
    together["request"] = MigrationRequest(
        container="web1", target="hostB", storage="sync", strategy=Strategy.POST_COPY
    )
    together["container"]["memory_bytes"] = 100 * MIB
    assert codes(check(**together)) == set(CAUSES) - apart


def test_stop_copy_needs_no_tracker():
    request = MigrationRequest(container="web1", target="hostB", strategy=Strategy.STOP_COPY)
    assert codes(check(source=without("pagemap_scan", "wp_async"), request=request)) == set()


def test_flags_that_no_program_can_miss_are_let_go():
    assert codes(check(source={"cpu_flags": ["avx", "sse2", "ibpb", "constant_tsc"]})) == set()


def test_a_newer_cpu_at_the_target_is_fine():
    assert codes(check(target={"cpu_flags": ["avx", "avx2", "sse2"]})) == set()


def test_connections_that_are_not_kept_need_no_repair_mode():
    request = MigrationRequest(container="web1", target="hostB", tcp="close")
    assert codes(check(target=without("tcp_repair"), request=request)) == set()


def test_a_new_name_avoids_a_clash():
    request = MigrationRequest(container="web1", target="hostB", new_name="web2")
    assert codes(check(target={"containers": ["web1"]}, request=request)) == set()


def test_a_container_without_a_limit_is_measured_against_the_host_only():
    assert codes(check(container={"memory_bytes": 100 * MIB, "memory_limit": 0})) == set()


def test_refusals_of_the_engine_name_the_source():
    (refusal,) = check(**CAUSES["io-uring"]).refusals
    assert (refusal.host, refusal.pid, refusal.fd) == ("hostA", 1, 3)


def test_the_same_reason_is_given_once():
    twice = {"network": Network(kind="host"), "refusals": [Refusal(code="host-network", message="as the engine says")]}
    assert len(check(container=twice).refusals) == 1


def test_a_note_of_the_host_explains_a_missing_feature():
    report = without("wp_async") | {"feature_notes": {"wp_async": "Linux 6.7 has it"}}
    (refusal,) = check(source=report).refusals
    assert "Linux 6.7 has it" in refusal.message


@pytest.mark.parametrize(("seconds", "warned"), [(0.9, False), (-0.9, False), (1.5, True), (-30.0, True)])
def test_wall_clocks_apart_are_a_warning(seconds, warned):
    result = check(target={"wall_clock": 1000.0 + seconds})
    assert result.refusals == ()
    assert bool(result.warnings) is warned


def test_agents_of_two_versions_are_a_warning():
    assert "agents differ" in check(target={"agent_version": "0.2.0"}).warnings[0]


def test_a_host_that_does_not_speak_of_a_feature_is_a_warning():
    features = host_report("x").features
    del features["wp_async"]
    assert "wp_async" in check(source={"features": features}).warnings[0]
