"""ps, doctor, hosts, status, abort, recover."""

from __future__ import annotations

import json

import pytest

from migrate import inventory
from protocol import messages as m
from protocol.errors import InDoubtError, MigrateError
from tests.migrate.fake_agent import host_report

ID = "m0123456789"


def test_ps_lists_the_containers_of_all_hosts(fakes, migrate):
    fakes.target.containers.append("db1")
    ran = migrate("ps")
    assert ran.status == 0
    assert [line.split()[:2] for line in ran.out.splitlines()[1:]] == [["db1", "hostB"], ["web1", "hostA"]]


def test_ps_of_one_host(migrate):
    ran = migrate("ps", "--host", "hostB", "--json")
    assert ran.json["containers"] == []


def test_ps_lists_the_rest_when_a_host_is_down(fakes, migrate):
    fakes.write_inventory(hostB={"port": 1})
    ran = migrate("ps", "--json")
    assert ran.status == 4
    assert [item["name"] for item in ran.json["containers"]] == ["web1"]
    assert list(ran.json["errors"]) == ["hostB"]


def test_doctor_says_what_a_host_lacks_and_why(fakes, migrate):
    features = host_report("x").features | {"wp_async": False}
    fakes.target.report = host_report("hostB", features=features, feature_notes={"wp_async": "needs Linux 6.7"})
    ran = migrate("doctor")
    assert ran.status == 3
    assert "NO  wp_async: needs Linux 6.7" in ran.out
    assert migrate("doctor", "hostA").status == 0


def test_hosts_are_listed(migrate):
    ran = migrate("hosts", "list", "--json")
    assert [host["name"] for host in ran.json["hosts"]] == ["hostA", "hostB"]


def test_a_host_is_added_with_the_key_that_it_shows(fakes, migrate):
    fakes.inventory.write_text("")
    ran = migrate("hosts", "add", "hostA", "--address", "127.0.0.1", "--port", str(fakes.source.port),
                  "--identity", str(fakes.identity), "--yes")  # fmt: skip
    assert ran.status == 0, ran.err
    assert fakes.source.host_key.get_fingerprint() in ran.err
    assert migrate("ps").out.splitlines()[1].split()[0] == "web1"


def test_trust_replaces_a_wrong_key(fakes, migrate):
    fakes.write_inventory(hostB={"host_key": fakes.source.host_key.export_public_key().decode().strip()})
    assert migrate("ps").status == 4
    assert migrate("hosts", "trust", "hostB", "--yes").status == 0
    assert migrate("ps").status == 0


def test_trust_gives_a_key_to_a_host_that_has_none(fakes, migrate):
    fakes.inventory.write_text(f'[hosts.hostA]\naddress = "127.0.0.1"\nport = {fakes.source.port}\n')
    assert migrate("hosts", "list").status == 2
    assert migrate("hosts", "trust", "hostA", "--yes").status == 0
    assert inventory.load(fakes.inventory).hosts["hostA"].host_key


def test_trust_asks_first(fakes, migrate, monkeypatch):
    before = fakes.inventory.read_text()
    monkeypatch.setattr("click.confirm", lambda *_, **__: (_ for _ in ()).throw(__import__("click").Abort()))
    assert migrate("hosts", "trust", "hostA").status == 130
    assert fakes.inventory.read_text() == before


def test_a_host_is_removed(fakes, migrate):
    assert migrate("hosts", "remove", "hostB").status == 0
    assert list(inventory.load(fakes.inventory).hosts) == ["hostA"]


def journal(fakes, source: str, target: str) -> None:
    if source:
        fakes.source.state[ID], fakes.source.side[ID] = source, "source"
    if target:
        fakes.target.state[ID], fakes.target.side[ID] = target, "target"


def test_status_shows_both_sides(fakes, migrate):
    journal(fakes, "precopy", "preparing")
    ran = migrate("status", ID, "--json")
    assert {(item["host"], item["status"]["state"]) for item in ran.json["migrations"]} == {
        ("hostA", "precopy"), ("hostB", "preparing"),
    }  # fmt: skip
    assert "precopy" in migrate("status").out


def test_status_of_an_unknown_migration_is_a_usage_error(migrate):
    assert migrate("status", "m000").status == 2


def test_abort_tells_both_sides(fakes, migrate):
    journal(fakes, "precopy", "precopy")
    ran = migrate("abort", ID)
    assert ran.status == 0
    assert (fakes.source.state[ID], fakes.target.state[ID]) == ("aborted", "discarded")


def test_abort_past_the_commit_point_says_why_not(fakes, migrate):
    journal(fakes, "committed", "running")

    def refuse(body, agent):
        raise MigrateError("past its commit point (committed): the target owns web1", code="committed")

    fakes.source.handlers[m.Abort] = refuse
    ran = migrate("abort", ID)
    assert ran.status == 1
    assert "past its commit point" in ran.err
    assert fakes.target.asked(m.Abort) == []


def test_abort_of_one_that_is_over_is_a_usage_error(fakes, migrate):
    journal(fakes, "finished", "finished")
    assert migrate("abort", ID).status == 2


def honest_settle(body, agent):
    """As the agents do: a source past COMMITTED needs a target that ran or discarded, a target needs COMMITTED."""
    state = agent.state[ID]
    if agent.side[ID] == "source":
        table = {("committed", "running"): "finished", ("committed", "finished"): "finished",
                 ("committed", "discarded"): "reclaimed", ("running", "finished"): "finished"}  # fmt: skip
    else:
        table = {("restored", "committed"): "finished", ("restored", "aborted"): "discarded",
                 ("restored", "reclaimed"): "discarded"}  # fmt: skip
        if body.source_is_dead and state == "restored":
            agent.state[ID] = "finished"
            return m.Done(detail="finished")
    new = table.get((state, body.peer_state))
    if new is None:
        raise InDoubtError(f"{state}, the other {body.peer_state}: nothing to settle yet", host=agent.name)
    agent.state[ID] = new
    return m.Done(detail=new)


@pytest.mark.parametrize(
    ("source", "target", "ends", "owner"),
    [
        ("committed", "restored", ("finished", "finished"), "hostB"),
        ("committed", "finished", ("finished", "finished"), "hostB"),
        ("committed", "discarded", ("reclaimed", "discarded"), "hostA"),
        ("aborted", "restored", ("aborted", "discarded"), "hostA"),
    ],
)
def test_recover_settles_what_the_journals_decide(fakes, migrate, source, target, ends, owner):
    journal(fakes, source, target)
    fakes.source.handlers[m.Settle] = fakes.target.handlers[m.Settle] = honest_settle
    ran = migrate("recover", ID, "--json")
    assert ran.status == 0, ran.out + ran.err
    assert (fakes.source.state[ID], fakes.target.state[ID]) == ends
    assert ran.json["settled"][0]["owner"] == owner


def test_recover_without_an_id_settles_all(fakes, migrate):
    journal(fakes, "committed", "restored")
    fakes.source.handlers[m.Settle] = fakes.target.handlers[m.Settle] = honest_settle
    assert migrate("recover").status == 0
    assert fakes.source.state[ID] == "finished"


def test_recover_leaves_a_migration_alone_that_is_under_way(fakes, migrate):
    journal(fakes, "precopy", "precopy")
    ran = migrate("recover", ID)
    assert ran.status == 6
    assert f"migrate abort {ID}" in ran.err
    assert fakes.source.asked(m.Settle) == []


def test_recover_with_a_silent_target_is_in_doubt(fakes, migrate):
    journal(fakes, "committed", "")
    fakes.source.handlers[m.Settle] = honest_settle
    fakes.write_inventory(hostB={"port": 1})
    assert migrate("recover", ID).status == 6


def test_a_dead_source_is_forced_with_a_higher_epoch(fakes, migrate):
    journal(fakes, "", "restored")
    fakes.target.handlers[m.Settle] = honest_settle
    fakes.write_inventory(hostA={"port": 1})
    assert migrate("recover", ID).status == 6
    assert migrate("recover", ID, "--source-is-dead").status == 0
    assert fakes.target.asked(m.Settle)[-1].epoch == 2


def test_a_source_that_answers_is_not_dead(fakes, migrate):
    journal(fakes, "committed", "restored")
    ran = migrate("recover", ID, "--source-is-dead")
    assert ran.status == 2
    assert fakes.target.asked(m.Settle) == []


def test_errors_are_one_object_with_json(fakes, migrate):
    fakes.inventory.write_text("[hosts.a]\naddress = '1'\n")
    ran = migrate("--json", "ps")
    assert ran.status == 2
    assert json.loads(ran.out)["error"]["code"] == "no-host-key"
