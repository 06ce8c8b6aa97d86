"""Whatever dies, and whenever: the container runs on in exactly one place, its client lost nothing, nothing is left."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.e2e import observe
from tests.e2e.observe import Moving
from tests.lab.containers import Container, ContainerHost
from tests.lab.lab import wait_until
from tests.lab.load import LoadReport, RedisLoad
from tests.lab.scenario import Scenario

# Four seconds of pre-copy at 5 MB/s, two of a freeze at 100 Mbit/s.
_FILLED_MB = 20
_PRE_COPY = ("--bandwidth", "5M")
_STOP_COPY = ("--strategy", "stop-copy", "--freeze-budget", "60s")
_SLOW_LINK = "100mbit"
_NAMES = itertools.count(1)


@dataclass(slots=True)
class Redis:
    """A redis under load, and where it is at home now."""

    scenario: Scenario
    name: str
    ip: str
    container: Container
    spoilt: bool = False  # by a test that failed

    @property
    def home(self) -> ContainerHost:
        """The host that runs it. Raises: AssertionError: none, or two."""
        (name,) = self.scenario.where(self.name)
        return self.scenario.lab.hosts[name]

    @property
    def other(self) -> ContainerHost:
        """The other host."""
        return self.scenario.b if self.home is self.scenario.a else self.scenario.a


class Shelf:
    """One redis for all tests, made anew after a test that failed."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.redis: Redis | None = None

    def take(self, ip: str) -> Redis:
        if self.redis is not None and self.redis.spoilt:
            for host in (self.scenario.a, self.scenario.b):
                with contextlib.suppress(Exception):
                    host.stop_agent()
                host.run(["runc", "--root", "/run/runc", "delete", "--force", self.redis.name], check=False)
                host.start_agent()
            self.redis = None
        if self.redis is None:
            name = f"redis{next(_NAMES)}"
            self.redis = Redis(self.scenario, name, ip, self.scenario.add_redis(name, ip))
        return self.redis


@pytest.fixture(scope="module")
def shelf(scenario: Scenario) -> Shelf:
    return Shelf(scenario)


@pytest.fixture
def redis(shelf: Shelf, ip: str) -> Redis:
    redis = shelf.take(ip)
    redis.container = redis.home.container(redis.name)
    return redis


@contextlib.contextmanager
def survives(redis: Redis) -> Iterator[ContainerHost]:
    """The block is a migration that fails; gives the source. It is as it was before, and the next one succeeds."""
    source, other = redis.home, redis.other
    before = {host: observe.snapshot(host) for host in (source, other)}
    pid = redis.container.pid
    redis.spoilt = True
    with RedisLoad(redis.scenario.client, f"{redis.ip}:6379", prefill_mb=_FILLED_MB) as load:
        port = load.report().local_port
        try:
            yield source
        finally:
            redis.scenario.lab.shape(other, None)
        assert redis.scenario.where(redis.name) == [source.name]
        assert source.container(redis.name).pid == pid
        _goes_on(load, port)
        for host, then in before.items():
            assert observe.snapshot(host) == then, f"left behind on {host.name}"
        done = redis.scenario.migrate_json("container", redis.name, "--to", other.name)
        assert done["status"] == "completed"
        assert redis.scenario.where(redis.name) == [other.name]
        _goes_on(load, port)
        assert load.stop().keys_read_back > 0
    redis.spoilt = False


def _goes_on(load: RedisLoad, port: int) -> LoadReport:
    load.report()
    report = load.report()
    while not report.replies:
        report = load.report()
    assert report.local_port == port
    return report


@pytest.mark.parametrize(
    "victim", ["target agent", "target engine", "target stream", "source engine", "source stream", "source agent"]
)
@pytest.mark.parametrize("options", [_PRE_COPY, _STOP_COPY], ids=["pre-copy", "freeze"])
def test_the_container_runs_on_when_its(redis: Redis, options: tuple[str, ...], victim: str):
    with survives(redis) as source:
        moving = _under_way(redis, source, options)
        host = source if victim.startswith("source") else moving.target
        observe.kill(host, "agent" if victim.endswith("agent") else victim)
        if victim.endswith("agent"):
            host.start_agent()
        status, result = moving.end()
        assert (status, result["status"]) == (5, "rolled-back"), result
        assert moving.wait_over(source).state == "aborted"
        assert moving.wait_over(moving.target).state == "discarded"


def _under_way(redis: Redis, source: ContainerHost, options: tuple[str, ...]) -> Moving:
    """A migration in the middle of what `options` make long."""
    if options == _STOP_COPY:
        redis.scenario.lab.shape(redis.other, _SLOW_LINK)
    moving = Moving(redis.scenario, redis.name, source, *options)
    if options == _STOP_COPY:
        moving.wait_freeze(redis.container)
    else:
        moving.wait_precopy()
    return moving


def test_the_engine_dies_before_the_agent_knows_of_its_dump(redis: Redis):
    """No task runs while its sockets are in repair mode, where a send fails: the engine's end alone is no thaw."""
    with survives(redis) as source:
        redis.scenario.lab.shape(redis.other, _SLOW_LINK)
        moving = Moving(redis.scenario, redis.name, source, *_STOP_COPY)
        moving.wait_state(source, "cut-over")
        os.kill(source.agent_pid, signal.SIGSTOP)
        try:
            engine = observe.worker(source, "engine", "source")
            wait_until(lambda: observe.is_traced(redis.container.pid), what="the freeze")
            wait_until(lambda: observe.waits_for_a_frame(engine), what="the dump")
            os.kill(engine, signal.SIGKILL)
            wait_until(lambda: not observe.is_traced(redis.container.pid), what="the end of the engine's stop")
        finally:
            os.kill(source.agent_pid, signal.SIGCONT)
        status, result = moving.end()
        assert (status, result["status"]) == (5, "rolled-back"), result
        assert moving.wait_over(source).state == "aborted"
        assert moving.wait_over(moving.target).state == "discarded"


def _abort(redis: Redis, moving: Moving) -> None:
    row = moving.row(moving.source)
    assert row is not None
    redis.scenario.migrate("abort", row.migration)


def _interrupt(_: Redis, moving: Moving) -> None:
    moving.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(("ask", "ends_with"), [(_interrupt, 130), (_abort, 8)], ids=["Ctrl-C", "migrate abort"])
@pytest.mark.parametrize("options", [_PRE_COPY, _STOP_COPY], ids=["pre-copy", "freeze"])
def test_it_ends_in_order_on(
    redis: Redis, options: tuple[str, ...], ask: Callable[[Redis, Moving], None], ends_with: int
):
    with survives(redis) as source:
        moving = _under_way(redis, source, options)
        ask(redis, moving)
        status, result = moving.end()
        assert (status, result["status"]) == (ends_with, "aborted"), result
        assert moving.wait_over(source).state == "aborted"
        assert moving.wait_over(moving.target).state == "discarded"


def test_the_agents_abort_by_themselves_when_the_coordinator_is_killed(redis: Redis):
    with survives(redis) as source:
        moving = _under_way(redis, source, _PRE_COPY)
        moving.process.kill()
        assert moving.wait_over(source).state == "aborted"
        assert moving.wait_over(moving.target).state == "discarded"
        moving.process.communicate()


def test_a_freeze_over_its_budget_is_thawed(redis: Redis):
    with survives(redis) as source:
        redis.scenario.lab.shape(redis.other, _SLOW_LINK)
        moving = Moving(redis.scenario, redis.name, source, "--strategy", "stop-copy", "--freeze-budget", "300ms")
        status, result = moving.end()
        assert (status, result["status"]) == (7, "rolled-back")
        assert result["error"]["code"] == "freeze-budget"
        assert moving.wait_over(source).state == "aborted"
        assert moving.wait_over(moving.target).state == "discarded"


def test_a_pulled_link_in_the_freeze_costs_no_more_than_its_budget(redis: Redis):
    with survives(redis) as source:
        other = redis.other
        redis.scenario.lab.shape(other, _SLOW_LINK)
        moving = Moving(redis.scenario, redis.name, source, "--strategy", "stop-copy", "--freeze-budget", "3s")
        moving.wait_freeze(redis.container)
        redis.scenario.lab.link_down(other)
        try:
            assert moving.wait_over(source).state == "aborted"
        finally:
            redis.scenario.lab.link_up(other)
        status, result = moving.end()
        assert (status, result["status"]) == (7, "rolled-back"), result
        assert moving.wait_over(moving.target).state == "discarded"


@contextlib.contextmanager
def _committed_unheard(redis: Redis) -> Iterator[Moving]:
    """In the block the source has committed, and the target's agent, which stands, has not heard it.

    After it the container runs in one place, on the same connection.
    """
    source, target = redis.home, redis.other
    redis.spoilt = True
    with RedisLoad(redis.scenario.client, f"{redis.ip}:6379", prefill_mb=_FILLED_MB) as load:
        port = load.report().local_port
        redis.scenario.lab.shape(target, _SLOW_LINK)
        moving = Moving(redis.scenario, redis.name, source, *_STOP_COPY)
        moving.wait_freeze(redis.container)
        os.kill(source.agent_pid, signal.SIGSTOP)
        try:
            moving.wait_state(target, "restored")
            os.kill(target.agent_pid, signal.SIGSTOP)
        finally:
            os.kill(source.agent_pid, signal.SIGCONT)
        moving.wait_state(source, "committed")
        redis.scenario.lab.shape(target, None)
        yield moving
        assert len(redis.scenario.where(redis.name)) == 1
        _goes_on(load, port)
    redis.spoilt = False


def _has_only_moved(redis: Redis, moving: Moving) -> None:
    assert (moving.wait_over(moving.source).state, moving.wait_over(moving.target).state) == ("finished", "finished")
    assert redis.scenario.where(redis.name) == [moving.target.name]
    left = observe.snapshot(moving.source)
    assert redis.name not in left.containers
    assert redis.name not in left.namespaces


def test_the_coordinator_tells_a_target_that_was_killed_before_it_heard_of_the_commit(redis: Redis):
    with _committed_unheard(redis) as moving:
        moving.target.kill_agent()
        moving.target.start_agent()
        status, result = moving.end()
        assert (status, result["status"]) == (0, "completed"), result
        _has_only_moved(redis, moving)


def test_recover_settles_a_commit_of_which_neither_target_nor_coordinator_heard(redis: Redis):
    with _committed_unheard(redis) as moving:
        moving.process.kill()
        moving.process.communicate()
        moving.target.kill_agent()
        moving.target.start_agent()
        row = moving.row(moving.target)
        assert row is not None
        assert row.state == "restored"
        assert redis.scenario.where(redis.name) == []
        said = redis.scenario.migrate("recover", row.migration)
        assert f"{redis.name} is {moving.target.name}'s" in said.stdout
        _has_only_moved(redis, moving)


def test_the_copy_of_a_source_whose_agent_is_killed_after_its_commit_stays_silent(redis: Redis):
    with _committed_unheard(redis) as moving:
        moving.process.kill()
        moving.process.communicate()
        engine = observe.worker(moving.source, "engine", "source")
        moving.source.kill_agent()
        wait_until(lambda: engine not in observe.processes(moving.source), what="the end of the source's engine")
        # Its sockets answer nobody: the container's port is off the bridge, only the host's own is on it.
        assert [name for name, bridge in observe.snapshot(moving.source).links.items() if bridge] == ["eth0"]
        os.kill(moving.target.agent_pid, signal.SIGCONT)
        moving.wait_over(moving.target)
        moving.source.start_agent()
        row = moving.row(moving.source)
        assert row is not None
        assert row.state == "committed"
        redis.scenario.migrate("recover", row.migration)
        _has_only_moved(redis, moving)


def test_a_source_takes_back_what_it_committed_to_a_target_that_lost_power(redis: Redis):
    with _committed_unheard(redis) as moving:
        redis.scenario.lab.power_cut(moving.target)
        redis.scenario.lab.boot(moving.target)
        moving.target.start_agent()
        status, result = moving.end()
        assert (status, result["status"]) == (5, "rolled-back"), result
        assert moving.wait_over(moving.source).state == "reclaimed"
        assert moving.wait_over(moving.target).state == "discarded"
        assert redis.scenario.where(redis.name) == [moving.source.name]
        assert moving.source.container(redis.name).pid == redis.container.pid
        assert redis.name not in moving.target.runc_list()
