"""One await in trio is one task in asyncio: cancelled with it, waited for, and bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest
import trio

from migrate.bridge import Bridge
from protocol.errors import PeerError


def run(function):
    with Bridge() as bridge:
        return trio.run(function, bridge)


async def double(value):
    await asyncio.sleep(0)
    return 2 * value


def test_a_result_comes_back():
    async def main(bridge):
        return await bridge.run(double, 21)

    assert run(main) == 42


def test_it_runs_in_the_loops_own_thread():
    async def where():
        return threading.current_thread().name

    async def main(bridge):
        return await bridge.run(where)

    assert run(main) == "asyncio"


def test_an_exception_comes_back_as_it_is():
    async def fail():
        raise PeerError("no route")

    async def main(bridge):
        await bridge.run(fail)

    with pytest.raises(PeerError, match="no route"):
        run(main)


def test_a_cancelled_await_cancels_its_task_and_waits_until_it_has_unwound():
    story = []

    async def patient():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            story.append("unwound")
            raise

    async def main(bridge):
        with trio.move_on_after(0.05):
            await bridge.run(patient)
        story.append("trio goes on")

    run(main)
    assert story == ["unwound", "trio goes on"]


def test_a_task_that_will_not_end_is_aborted_and_the_wait_is_bounded():
    aborted = threading.Event()

    async def stubborn():
        while not aborted.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async def main(bridge):
        before = trio.current_time()
        with trio.move_on_after(0.01):
            await bridge.run(stubborn, abort=aborted.set, unwind_s=0.2)
        return trio.current_time() - before

    assert 0.2 < run(main) < 2.0
    assert aborted.is_set()


def test_a_task_that_ignores_even_the_abort_does_not_hold_trio():
    let_go = threading.Event()

    async def deaf():
        while not let_go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async def main(bridge):
        before = trio.current_time()
        with trio.move_on_after(0.01):
            await bridge.run(deaf, abort=lambda: None, unwind_s=0.1)
        took = trio.current_time() - before
        let_go.set()
        return took

    assert run(main) < 1.0


def test_many_calls_run_at_once():
    async def main(bridge):
        results = {}

        async def one(number):
            results[number] = await bridge.run(double, number)

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        return results

    assert run(main) == {number: 2 * number for number in range(50)}


def test_exception_groups_split_as_documented():
    async def fail(error):
        raise error

    async def main(bridge):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.run, fail, PeerError("one"))
            nursery.start_soon(bridge.run, fail, ValueError("two"))

    caught = []
    try:
        run(main)
    except* PeerError as group:
        caught += [str(error) for error in group.exceptions]
    except* ValueError as group:
        caught += [str(error) for error in group.exceptions]
    assert set(caught) <= {"one", "two"}
    assert caught


def test_a_closed_bridge_has_no_tasks_left():
    left = []

    async def forever():
        try:
            await asyncio.sleep(60)
        finally:
            left.append("ended")

    async def main(bridge):
        started = threading.Event()

        async def begin():
            asyncio.get_running_loop().create_task(forever(), name="left behind")
            await asyncio.sleep(0)
            started.set()

        await bridge.run(begin)
        assert started.is_set()

    run(main)
    assert left == ["ended"]
