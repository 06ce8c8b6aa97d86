"""`migrate container` against two fake agents: exit statuses and the object of --json."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import Any

import pytest

from migrate.errors import failure_of
from protocol import messages as m
from protocol.errors import AbortedError, BusyError, InDoubtError, KernelError, MigrateError, NotConvergedError
from tests.migrate.fake_agent import DropConnectionError, container_report, cut_over_report

KEYS = {
    "schema", "id", "status", "container", "source", "destination", "engine", "strategy", "downtime_ms", "downtime",
    "total_ms", "setup_ms", "rounds", "memory_bytes", "transferred_bytes", "wire_bytes", "processes", "threads",
    "connections", "warnings",
}  # fmt: skip
ROUND_KEYS = {"round", "dirty_bytes", "sent_bytes", "wire_bytes", "ms", "bandwidth", "dirty_rate"}
ERROR_KEYS = {"code", "message", "host", "hint"}


def raiser(error: Exception) -> Any:
    def handler(body, agent):
        raise error

    return handler


def both_were_told_to_abort(fakes):
    return bool(fakes.source.asked(m.Abort)) and bool(fakes.target.asked(m.Abort))


def test_a_migration_completes_with_the_whole_result_object(fakes, migrate):
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 0, ran.err
    assert set(ran.json) == KEYS
    assert [set(entry) for entry in ran.json["rounds"]] == [ROUND_KEYS] * 2
    assert ran.json["status"] == "completed"
    assert (ran.json["source"], ran.json["destination"], ran.json["container"]) == ("hostA", "hostB", "web1")
    assert ran.json["downtime_ms"] == 12.5
    assert list(ran.json["downtime"]) == ["freeze", "scan", "dump", "copy", "restore", "commit"]
    assert not both_were_told_to_abort(fakes)
    assert fakes.source.asked(m.Finish)
    assert fakes.target.asked(m.Finish)


def test_requests_go_out_in_the_order_of_the_phases(fakes, migrate):
    assert migrate("container", "web1", "--to", "hostB").status == 0
    kinds = [type(body) for body in fakes.source.requests if not isinstance(body, m.ReadClock)]
    assert kinds == [
        m.Hello, m.ListContainers, m.GetHostReport, m.InspectContainer, m.BeginSource, m.ConnectSource, m.RunRound,
        m.RunRound, m.CutOver, m.Finish,
    ]  # fmt: skip
    (prepare,) = fakes.target.asked(m.PrepareTarget)
    assert prepare.container == fakes.source.container
    (connect,) = fakes.source.asked(m.ConnectSource)
    assert (connect.address, connect.port) == ("127.0.0.1", 7100)


def test_the_clock_offset_never_takes_the_container_back(fakes, migrate):
    fakes.source.clock_offset_ns = 5_000_000_000
    assert migrate("container", "web1", "--to", "hostB").status == 0
    (prepare,) = fakes.target.asked(m.PrepareTarget)
    assert 5_000_000_000 <= prepare.monotonic_offset_ns < 5_200_000_000


def test_progress_goes_to_standard_error_only(migrate):
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert "copied in" in ran.err
    assert ran.out.count("\n") == 1


def test_without_progress_standard_error_is_empty(migrate):
    assert migrate("--no-progress", "container", "web1", "--to", "hostB", "--json").err == ""


def test_jsonl_gives_events_and_then_the_result(migrate):
    import json

    ran = migrate("--output", "jsonl", "container", "web1", "--to", "hostB")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["event"] for line in lines[:-1]][:3] == ["phase-started", "phase-ended", "started"]
    assert lines[-1]["status"] == "completed"


def test_the_summary_shows_the_downtime_by_part(migrate):
    ran = migrate("container", "web1", "--to", "hostB")
    assert "web1 runs on hostB: downtime 12.5 ms" in ran.out
    assert "restore" in ran.out
    assert "####" in ran.out


def test_stop_copy_runs_no_round_and_arms_no_tracker(fakes, migrate):
    ran = migrate("container", "web1", "--to", "hostB", "--strategy", "stop-copy", "--json")
    assert ran.status == 0, ran.err
    assert fakes.source.asked(m.RunRound) == []
    assert fakes.source.asked(m.ConnectSource)[0].track is False
    (cut,) = fakes.source.asked(m.CutOver)
    assert cut.stop_copy
    assert cut.freeze_budget_s == 600.0
    assert ran.json["strategy"] == "stop-copy"


def test_a_log_file_has_the_events(migrate, tmp_path):
    log = tmp_path / "log.jsonl"
    assert migrate("--log-file", str(log), "container", "web1", "--to", "hostB").status == 0
    assert '"event": "cut-over-ended"' in log.read_text()


# ---------------------------------------------------------------- refusals


def test_a_refusal_touches_nothing_and_names_every_reason(fakes, migrate):
    fakes.source.container = container_report(
        refusals=[m.Refusal(code="io-uring", message="uses io_uring", pid=12, fd=4, object="anon_inode:[io_uring]")]
    )
    fakes.target.report = m.HostReport(
        **{f: getattr(fakes.target.report, f) for f in m.HostReport.__struct_fields__} | {"runtimes": []}
    )
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 3
    assert ran.json["status"] == "failed"
    assert set(ran.json["error"]) == ERROR_KEYS
    assert {refusal["code"] for refusal in ran.json["refusals"]} == {"io-uring", "runtime-missing"}
    assert fakes.source.asked(m.BeginSource) == []
    text = migrate("container", "web1", "--to", "hostB")
    assert "pid 12, fd 4" in text.err
    assert text.out == ""


def test_a_locked_container_is_not_feasible(fakes, migrate):
    fakes.source.handlers[m.BeginSource] = raiser(BusyError("locked by m123 since noon", host="hostA"))
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 3
    assert ran.json["error"]["code"] == "busy"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--strategy", "post-copy"), "post-copy"),
        (("--engine", "criu"), "engine-criu"),
        (("--storage", "sync"), "storage-sync"),
        (("--tunnel",), "tunnel"),
        (("--streams", "2"), "streams"),
    ],
)
def test_what_is_not_carried_yet_is_refused(migrate, options, code):
    ran = migrate("container", "web1", "--to", "hostB", "--json", *options)
    assert ran.status == 3
    assert ran.json["error"]["code"] == code


@pytest.mark.parametrize("command", [("check", "web1"), ("container", "web1", "--dry-run")])
def test_a_check_touches_nothing(fakes, migrate, command):
    ran = migrate(*command, "--to", "hostB", "--json")
    assert ran.status == 0
    assert ran.json["feasible"]
    assert fakes.source.asked(m.BeginSource) == []


# ---------------------------------------------------------------- who and where


def test_a_name_on_no_host_is_not_feasible(migrate):
    ran = migrate("container", "nobody", "--to", "hostB", "--json")
    assert ran.status == 3
    assert ran.json["error"]["code"] == "no-such-container"


def test_a_name_on_two_hosts_is_an_error_that_names_them(fakes, migrate):
    fakes.target.containers.append("web1")
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 2
    assert "hostA and hostB" in ran.json["error"]["message"]
    assert "--from" in ran.json["error"]["hint"]


def test_a_container_that_is_there_already_is_refused(migrate):
    ran = migrate("container", "web1", "--to", "hostA", "--json")
    assert ran.status == 3
    assert ran.json["error"]["code"] == "same-host"


def test_an_unknown_host_is_a_usage_error(migrate):
    ran = migrate("container", "web1", "--to", "hostX", "--json")
    assert ran.status == 2
    assert ran.json["error"]["code"] == "unknown-host"


def test_an_unknown_option_is_a_usage_error(migrate):
    assert migrate("container", "web1", "--to", "hostB", "--fast").status == 2


def test_an_unreachable_target_is_told_by_status_4(fakes, migrate):
    fakes.write_inventory(hostB={"port": 1})
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 4
    assert ran.json["error"] | {"hint": ""} == {
        "code": "unreachable", "message": "cannot reach 127.0.0.1:1: Connection refused", "host": "hostB", "hint": "",
    }  # fmt: skip


def test_a_wrong_host_key_names_what_was_expected_and_how_to_trust(fakes, migrate):
    other = fakes.source.host_key
    fakes.write_inventory(hostB={"host_key": other.export_public_key().decode().strip()})
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 4
    error = ran.json["error"]
    assert error["code"] == "host-key"
    assert other.get_fingerprint() in error["message"]
    assert fakes.target.host_key.get_fingerprint() in error["message"]
    assert "migrate hosts trust hostB" in error["hint"]


def test_a_refused_client_key_is_told_by_status_4(fakes, migrate, tmp_path):
    import asyncssh

    stranger = tmp_path / "stranger"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(stranger))
    fakes.write_inventory(hostB={"identity": str(stranger)})
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 4
    assert ran.json["error"]["code"] == "permission-denied"


# ---------------------------------------------------------------- failures before the commit point


@pytest.mark.parametrize("where", [m.PrepareTarget, m.ConnectSource, m.RunRound])
def test_a_failure_before_the_freeze_is_undone_on_both_sides(fakes, migrate, where):
    agent = fakes.target if where is m.PrepareTarget else fakes.source
    agent.handlers[where] = raiser(KernelError("mount", 5, "Input/output error"))
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 5
    assert ran.json["status"] == "rolled-back"
    assert set(ran.json["error"]) == ERROR_KEYS
    assert both_were_told_to_abort(fakes)
    assert fakes.source.asked(m.CutOver) == []


def test_a_failed_cut_over_is_rolled_back(fakes, migrate):
    error = failure_of(MigrateError("the engine died", code="engine-died", host="hostA"))
    fakes.source.handlers[m.CutOver] = lambda body, agent: m.CutOverDone(
        report=cut_over_report(outcome="rolled-back", error=error)
    )
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 5
    assert ran.json["error"]["code"] == "engine-died"
    assert ran.json["downtime_ms"] == 0.0
    assert both_were_told_to_abort(fakes)


def test_a_freeze_over_its_budget_did_not_converge(fakes, migrate):
    error = failure_of(NotConvergedError("the freeze took longer than 2 s", code="freeze-budget"))
    fakes.source.handlers[m.CutOver] = lambda body, agent: m.CutOverDone(
        report=cut_over_report(outcome="rolled-back", error=error)
    )
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 7
    assert ran.json["error"]["code"] == "freeze-budget"


def test_memory_that_changes_too_fast_did_not_converge(fakes, migrate):
    fakes.source.handlers[m.RunRound] = lambda body, agent: m.RoundDone(
        report=m.RoundReport(
            round=body.round, dirty_bytes=60 << 20, sent_bytes=60 << 20, wire_bytes=60 << 20, ms=1000.0,
            remaining_bytes=60 << 20,
        )
    )  # fmt: skip
    ran = migrate("container", "web1", "--to", "hostB", "--max-rounds", "3", "--json")
    assert ran.status == 7
    assert len(ran.json["rounds"]) == 3
    assert both_were_told_to_abort(fakes)


def test_a_round_that_hangs_ends_at_the_timeout(fakes, migrate):
    fakes.source.handlers[m.RunRound] = lambda body, agent: asyncio.sleep(60)
    ran = migrate("container", "web1", "--to", "hostB", "--timeout", "1s", "--json")
    assert ran.status == 7
    assert ran.json["error"]["code"] == "timeout"
    assert both_were_told_to_abort(fakes)


def test_an_abort_from_elsewhere_ends_it_with_status_8(fakes, migrate):
    fakes.source.handlers[m.RunRound] = raiser(AbortedError("aborted on request"))
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 8
    assert ran.json["status"] == "aborted"


def test_a_source_that_goes_away_in_precopy_is_told_when_it_is_back(fakes, migrate):
    def drop(body, agent):
        raise DropConnectionError

    fakes.source.handlers[m.RunRound] = drop
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 5
    assert ran.json["error"]["code"] == "link-lost"
    assert both_were_told_to_abort(fakes)


# ---------------------------------------------------------------- the cut-over and after


def drop_and_become(state: str, other: str = "") -> Any:
    def handler(body, agent):
        agent.state[body.migration] = state
        raise DropConnectionError

    return handler


def test_a_lost_link_in_the_cut_over_is_settled_by_the_sources_journal(fakes, migrate):
    fakes.source.handlers[m.CutOver] = drop_and_become("running")
    assert migrate("container", "web1", "--to", "hostB", "--json").status == 0


def test_a_lost_link_in_the_cut_over_that_the_source_undid_is_rolled_back(fakes, migrate):
    fakes.source.handlers[m.CutOver] = drop_and_become("aborted")
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 5
    assert ran.json["status"] == "rolled-back"


def test_a_dead_source_is_settled_by_a_target_that_runs_the_container(fakes, migrate, monkeypatch):
    monkeypatch.setattr("migrate.phases.aftermath.REACH_S", 1.0)
    monkeypatch.setattr("migrate.phases.finish.CLEAN_UP_S", 0.5)

    def die(body, agent):
        for key in fakes.target.state:
            fakes.target.state[key] = "running"
        agent._server.close()
        raise DropConnectionError

    fakes.source.handlers[m.CutOver] = die
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 0, ran.err
    assert "the downtime is not known" in ran.json["warnings"][0]
    assert "hostA has not cleaned up" in ran.json["warnings"][1]


def test_a_dead_source_and_a_target_that_waits_are_in_doubt(fakes, migrate, monkeypatch):
    monkeypatch.setattr("migrate.phases.aftermath.REACH_S", 1.0)

    def die(body, agent):
        for key in fakes.target.state:
            fakes.target.state[key] = "restored"
        agent._server.close()
        raise DropConnectionError

    fakes.source.handlers[m.CutOver] = die
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 6
    assert ran.json["status"] == "in-doubt"
    assert f"migrate recover {ran.json['id']}" in ran.json["error"]["hint"]
    assert fakes.target.asked(m.Abort) == []


def test_a_source_in_doubt_says_what_to_run(fakes, migrate):
    error = failure_of(InDoubtError("committed, but the target has not said that it runs", host="hostA"))
    fakes.source.handlers[m.CutOver] = lambda body, agent: m.CutOverDone(
        report=cut_over_report(outcome="in-doubt", error=error)
    )
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 6
    assert f"migrate recover {ran.json['id']}" in ran.json["error"]["hint"]
    assert not both_were_told_to_abort(fakes)


def test_a_clean_up_that_fails_is_a_warning(fakes, migrate):
    fakes.target.handlers[m.Finish] = raiser(MigrateError("busy"))
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    assert ran.status == 0
    assert "hostB has not cleaned up" in ran.json["warnings"][0]


# ---------------------------------------------------------------- Ctrl-C


def interrupt_when(agent, kind):
    def wait():
        agent.wait_asked(kind)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_in_precopy_aborts_in_order(fakes, migrate):
    fakes.source.handlers[m.RunRound] = lambda body, agent: asyncio.sleep(60)
    thread = interrupt_when(fakes.source, m.RunRound)
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    thread.join()
    assert ran.status == 130
    assert ran.json["status"] == "aborted"
    assert both_were_told_to_abort(fakes)


def test_ctrl_c_in_the_cut_over_asks_the_source_which_undoes_it(fakes, migrate):
    async def cut(body, agent):
        async with agent.arrived:
            await agent.arrived.wait_for(lambda: bool(agent.asked(m.Abort)))
        error = failure_of(AbortedError("aborted on request"))
        return m.CutOverDone(report=cut_over_report(outcome="rolled-back", error=error))

    fakes.source.handlers[m.CutOver] = cut
    thread = interrupt_when(fakes.source, m.CutOver)
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    thread.join()
    assert ran.status == 130


def test_ctrl_c_past_the_commit_point_is_refused_with_the_reason(fakes, migrate):
    async def cut(body, agent):
        async with agent.arrived:
            await agent.arrived.wait_for(lambda: bool(agent.asked(m.Abort)))
        return m.CutOverDone(report=cut_over_report())

    fakes.source.handlers[m.CutOver] = cut
    fakes.source.handlers[m.Abort] = raiser(MigrateError("past its commit point", code="committed"))
    thread = interrupt_when(fakes.source, m.CutOver)
    ran = migrate("container", "web1", "--to", "hostB", "--json")
    thread.join()
    assert ran.status == 0
    assert ran.json["warnings"] == ["not aborted: past its commit point"]
