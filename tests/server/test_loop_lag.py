"""The loop's probe: every expiry is counted, with the lateness that a request would have had."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
import uvloop

from penstock._ext.loop_lag import LAGS, LoopLag


def run(work, factory=uvloop.new_event_loop):
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_every_expiry_is_counted(factory):
    async def work():
        lag = LoopLag(0.002)
        lag.start(asyncio.get_running_loop())
        begin = time.monotonic()
        await asyncio.sleep(0.3)
        lag.tick()
        seconds = time.monotonic() - begin
        lag.stop()
        ticks = lag.ticks
        await asyncio.sleep(0.01)
        assert lag.ticks == ticks
        return lag, seconds

    lag, seconds = run(work, factory)
    assert lag.ticks == sum(lag.counters()) == pytest.approx(seconds / 0.002, abs=2)
    assert lag.total_ns <= lag.ticks * lag.longest_ns


def test_a_hold_is_as_many_late_expiries_as_it_swallowed():
    """A hold of 80 ms: what would have come meanwhile waits 0 to 80 ms, evenly spread."""

    async def work():
        lag = LoopLag(0.002)
        lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.05)
        before, longest = lag.counters(), lag.longest_ns
        time.sleep(0.08)
        await asyncio.sleep(0.01)
        lag.stop()
        return [b - a for a, b in zip(before, lag.counters())], longest, lag.longest_ns

    counts, before, longest = run(work)
    assert 70e6 <= longest < 80e6 + before + 200e6
    over = sum(n for n, bound in zip(counts, [*LAGS, float("inf")]) if bound > 20e-3)
    assert over >= 28  # 30 of 40, as the first of them may fall before the hold


@pytest.mark.parametrize("how", ["works", "waits"])
def test_what_holds_the_loop_is_held_and_what_others_take_is_not(how):
    """The loop's own work is held time; a processor that others have is not (where two share one)."""
    import os
    import subprocess

    async def work():
        lag = LoopLag(0.002)
        lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.05)
        before, held = lag.counters(), lag.held_counters()
        until = time.thread_time() + 0.08
        for _ in range(1 if how == "works" else 8):
            # "waits": 10 ms of work at a time, beside a process that wants the same processor all the time
            step = until if how == "works" else time.thread_time() + 0.01
            while time.thread_time() < step:
                pass
            await asyncio.sleep(0.004)
        lag.stop()
        after, held_after = lag.counters(), lag.held_counters()
        over = sum(b - a for a, b, bound in zip(before, after, [*LAGS, 9.0]) if bound > 2e-3)
        return over, sum(b - a for a, b, bound in zip(held, held_after, [*LAGS, 9.0]) if bound > 2e-3)

    cores = os.sched_getaffinity(0)
    busy = None
    try:
        if how == "waits":
            os.sched_setaffinity(0, {max(cores)})
            busy = subprocess.Popen(["sh", "-c", "while :; do :; done"])
        late, held = run(work)
    finally:
        os.sched_setaffinity(0, cores)
        if busy is not None:
            busy.kill()
            busy.wait()
    assert late >= 25
    if how == "works":
        assert held >= 20
    else:
        assert held <= 0.8 * late


def test_a_tick_leaves_nothing_for_the_collector():
    async def work():
        lag = LoopLag(0.001)
        lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.05)
        gc.collect()
        ticks, before = lag.ticks, gc.get_count()[0]
        await asyncio.sleep(0.3)
        after = gc.get_count()[0]
        lag.stop()
        return lag.ticks - ticks, after - before

    ticks, objects = run(work)
    assert ticks > 200
    assert objects < 20


def test_what_should_follow_a_tick_does():
    async def work():
        calls = []
        lag = LoopLag(0.001)
        lag.start(asyncio.get_running_loop(), lambda: calls.append(lag.ticks))
        with pytest.raises(RuntimeError, match="already"):
            lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.05)
        lag.stop()
        return calls

    calls = run(work)
    assert len(calls) > 5
    assert calls == sorted(calls)


@pytest.mark.parametrize("period", [0.0, -1.0, float("nan"), 11.0])
def test_a_period_that_is_no_period_is_refused(period):
    with pytest.raises(ValueError, match="period"):
        LoopLag(period)
