"""The coordinator is the second witness: what it does when the cut-over ended in doubt, and a side still waits."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.errors import failure_of
from migrate.phases.prepare import _numeric
from protocol import messages as m
from protocol.errors import InDoubtError, MigrateError
from tests.migrate.fake_agent import DropConnectionError, container_report, cut_over_report
from tests.migrate.test_other_commands import ID, journal

MOVE = ("container", "web1", "--to", "hostB", "--json")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.phases.aftermath.REACH_S", 3.0)
    monkeypatch.setattr("migrate.phases.finish.CLEAN_UP_S", 1.0)


def settles(agent: Any, table: dict[tuple[str, str], str]) -> None:
    """`agent` ends as `table` says: (its state, what it is told of the other) -> its new state."""

    def handler(body, agent):
        new = table.get((agent.state[body.migration], body.peer_state))
        if new is None:
            raise InDoubtError("nothing to settle yet", host=agent.name)
        agent.state[body.migration] = new
        return m.Done(detail=new)

    agent.handlers[m.Settle] = handler


def cut_over_ends_in_doubt(fakes, target: str) -> None:
    """COMMITTED is written, the target was not heard."""
    error = failure_of(InDoubtError("committed, but the target has not said that web1 runs there", host="hostA"))

    def handler(body, agent):
        agent.state[body.migration] = "committed"
        fakes.target.state[body.migration] = target
        return m.CutOverDone(report=cut_over_report(outcome="in-doubt", error=error))

    fakes.source.handlers[m.CutOver] = handler
    settles(fakes.source, {("committed", "running"): "finished", ("committed", "finished"): "finished",
                           ("committed", "discarded"): "reclaimed"})  # fmt: skip
    settles(fakes.target, {("restored", "committed"): "finished"})


def told(agent: Any) -> list[str]:
    return [body.peer_state for body in agent.asked(m.Settle)]


@pytest.mark.parametrize("target", ["restored", "running", "finished"])
def test_a_target_that_has_not_heard_of_the_commit_is_told_and_then_the_source(fakes, migrate, target):
    cut_over_ends_in_doubt(fakes, target)
    ran = migrate(*MOVE)
    assert ran.status == 0, ran.err
    assert ran.json["status"] == "completed"
    assert "error" not in ran.json
    assert told(fakes.target) == (["committed"] if target == "restored" else [])
    assert told(fakes.source) == ["running" if target == "running" else "finished"]
    assert set(fakes.source.state.values()) == {"finished"}


def test_a_target_that_has_discarded_gives_the_container_back(fakes, migrate):
    cut_over_ends_in_doubt(fakes, "discarded")
    ran = migrate(*MOVE)
    assert ran.status == 5
    assert ran.json["status"] == "rolled-back"
    assert told(fakes.source) == ["discarded"]


def test_a_target_out_of_reach_leaves_the_doubt_to_a_person(fakes, migrate):
    cut_over_ends_in_doubt(fakes, "restored")
    commit = fakes.source.handlers[m.CutOver]

    def and_pull_the_plug(body, agent):
        answer = commit(body, agent)
        fakes.target._server.close()
        for connection in list(fakes.target._connections):
            connection.abort()
        return answer

    fakes.source.handlers[m.CutOver] = and_pull_the_plug
    ran = migrate(*MOVE)
    assert ran.status == 6
    assert ran.json["status"] == "in-doubt"
    assert f"migrate recover {ran.json['id']}" in ran.json["error"]["hint"]
    assert told(fakes.source) == []
    assert set(fakes.source.state.values()) == {"committed"}


def test_a_lost_link_to_a_committed_source_is_settled_as_well(fakes, migrate):
    cut_over_ends_in_doubt(fakes, "running")
    commit = fakes.source.handlers[m.CutOver]

    def drop(body, agent):
        commit(body, agent)
        raise DropConnectionError

    fakes.source.handlers[m.CutOver] = drop
    ran = migrate(*MOVE)
    assert ran.status == 0, ran.err
    assert told(fakes.source) == ["running"]
    assert set(fakes.source.state.values()) == {"finished"}


@pytest.mark.parametrize("source", ["aborted", "committed"])
def test_a_target_that_waits_after_a_roll_back_is_told_of_it(fakes, migrate, source):
    """The data link broke after RESTORED: only the source's word may end the target's wait."""

    def roll_back(body, agent):
        agent.state[body.migration] = source
        fakes.target.state[body.migration] = "restored"
        error = failure_of(MigrateError("the link broke", code="link-lost"))
        return m.CutOverDone(report=cut_over_report(outcome="rolled-back", error=error))

    def only_the_source_decides(body, agent):
        raise MigrateError("it is restored here: the source decides now", code="committed", host="hostB")

    fakes.source.handlers[m.CutOver] = roll_back
    fakes.source.handlers[m.Abort] = lambda body, agent: m.Done()
    fakes.target.handlers[m.Abort] = only_the_source_decides
    settles(fakes.target, {("restored", "aborted"): "discarded"})
    ran = migrate(*MOVE)
    assert ran.status == 5
    if source == "aborted":
        assert set(fakes.target.state.values()) == {"discarded"}
        assert ran.json["warnings"] == []
    else:
        assert f"migrate recover {ran.json['id']}" in ran.json["warnings"][0]
        assert told(fakes.target) == []


# ---------------------------------------------------------------- a source that was down in its freeze


def lost_copy(fakes, target: str) -> None:
    journal(fakes, "cut-over", target)
    status = fakes.source.status

    def without_copy(body, agent):
        known = [status(ID)] if body.migration in {"", ID} else []
        return m.StatusReply(
            migrations=[
                m.MigrationStatus(
                    **{name: getattr(one, name) for name in one.__struct_fields__ if name != "copy_alive"},
                    copy_alive=one.state != "cut-over",
                )
                for one in known
            ]
        )

    fakes.source.handlers[m.GetStatus] = without_copy


def test_the_last_copy_is_named_and_let_run_by_a_person(fakes, migrate):
    lost_copy(fakes, "restored")
    settles(fakes.source, {("cut-over", "finished"): "superseded"})
    ran = migrate("recover", ID)
    assert ran.status == 6
    assert "has lost its copy" in ran.err
    assert f"migrate recover {ID} --source-is-dead" in ran.err
    assert told(fakes.target) == told(fakes.source) == []
    ran = migrate("recover", ID, "--source-is-dead", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["settled"][0]["owner"] == "hostB"
    assert [(ask.source_is_dead, ask.epoch) for ask in fakes.target.asked(m.Settle)] == [(True, 2)]
    assert [(ask.peer_state, ask.epoch) for ask in fakes.source.asked(m.Settle)] == [("finished", 2)]


def test_with_both_copies_gone_the_migration_is_over(fakes, migrate):
    lost_copy(fakes, "discarded")
    settles(fakes.source, {("cut-over", "discarded"): "aborted"})
    assert migrate("recover", ID).status == 0
    assert fakes.source.state[ID] == "aborted"


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_an_address_that_another_host_may_see_otherwise_limits_nothing(fakes, migrate, address):
    fakes.write_inventory(hostA={"address": address})
    assert migrate(*MOVE).status == 0
    (prepare,) = fakes.target.asked(m.PrepareTarget)
    assert prepare.source_address == ""


def test_a_numeric_address_of_the_source_is_the_only_one_that_may_connect():
    assert [_numeric(text) for text in ("10.77.0.11", "2001:db8::1", "0.0.0.0", "fe80::1", "hostA")] == [
        "10.77.0.11", "2001:db8::1", "", "", "",
    ]  # fmt: skip


def test_an_address_that_is_at_the_target_already_is_refused(fakes, migrate):
    fakes.source.container = container_report(
        network=m.Network(
            kind="namespace",
            interfaces=[
                m.Interface(
                    name="eth0", mac="02:00:00:00:00:01", mtu=1500, bridge="cbr0", host_name="v1",
                    addresses=[
                        m.InterfaceAddress(address="10.77.0.50", prefix=24),
                        m.InterfaceAddress(address="fe80::1", prefix=64, scope="link"),
                    ],
                )
            ],
        )
    )  # fmt: skip
    fakes.target.report = m.HostReport(
        **{name: getattr(fakes.target.report, name) for name in m.HostReport.__struct_fields__ if name != "addresses"},
        addresses=["10.77.0.12", "10.77.0.50"],
    )
    ran = migrate(*MOVE)
    assert ran.status == 3
    assert ran.json["error"]["code"] == "address-taken"
    assert "10.77.0.50 of web1" in ran.json["error"]["message"]
    assert fakes.source.asked(m.BeginSource) == []
