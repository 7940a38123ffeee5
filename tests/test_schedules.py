"""Schedules, without processes: they finish, in order, and hold no more micro-batches at once than they promise."""

from collections import Counter

import pytest
from conftest import load_step
from hypothesis import given
from hypothesis import strategies as st

from shared.timeline import bubble, simulate

load_step("step04_pipeline_parallel")
from schedules import SCHEDULES, Action, make_schedule

sizes = given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 9), st.integers(1, 40))


def all_stages(name, stages, micro_batches):
    return [make_schedule(name, stage, stages, micro_batches) for stage in range(stages)]


@pytest.mark.quick
@sizes
def test_every_action_once_in_order_and_no_deadlock(name, stages, micro_batches):
    schedules = all_stages(name, stages, micro_batches)
    events = simulate(schedules)
    assert Counter(event[:3] for event in events) == Counter(
        (stage, kind, m) for stage in range(stages) for kind in ("forward", "backward") for m in range(micro_batches)
    )
    ends = {event[:3]: event.end for event in events}
    for stage, kind, m, start, *_ in events:
        if kind == "backward":
            assert ends[stage, "forward", m] <= start
        source = stage - 1 if kind == "forward" else stage + 1
        if 0 <= source < stages:
            assert ends[source, kind, m] <= start


@pytest.mark.quick
@sizes
def test_micro_batches_in_flight(name, stages, micro_batches):
    for stage, schedule in enumerate(all_stages(name, stages, micro_batches)):
        in_flight, peak = 0, 0
        for action in schedule:
            in_flight += 1 if action.kind == "forward" else -1
            peak = max(peak, in_flight)
        assert peak == (micro_batches if name == "afab" else min(stages - stage, micro_batches))


@sizes
def test_bubble_is_the_formula(name, stages, micro_batches):
    ideal = bubble(simulate(all_stages(name, stages, micro_batches)))
    assert ideal == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@given(st.integers(2, 6), st.integers(2, 12), st.data())
def test_a_stage_that_does_not_follow_is_found(stages, micro_batches, data):
    """Whichever two of its actions a stage exchanges, unless the others cannot tell."""
    schedules = all_stages("1f1b", stages, micro_batches)
    stage = data.draw(st.integers(0, stages - 1))
    i, j = sorted(data.draw(st.lists(st.integers(0, 2 * micro_batches - 1), min_size=2, max_size=2, unique=True)))
    schedule = schedules[stage]
    schedule[i], schedule[j] = schedule[j], schedule[i]
    same_kind = schedule[i].kind == schedule[j].kind
    before_its_forward = any(
        action.kind == "backward" and Action("forward", action.micro_batch) not in schedule[:n]
        for n, action in enumerate(schedule)
    )
    if same_kind or before_its_forward:
        with pytest.raises(ValueError, match=r"do not agree|precedes its forward|deadlock"):
            simulate(schedules)


def test_deadlock_names_who_waits_for_what():
    one_at_a_time = [Action(kind, m) for m in range(2) for kind in ("forward", "backward")]
    with pytest.raises(ValueError, match=r"deadlock.*0: Action\(kind='backward'.*, 1: Action\(kind='forward'"):
        simulate([one_at_a_time, SCHEDULES["afab"](1, 2, 2)])


def test_a_backward_before_its_forward():
    with pytest.raises(ValueError, match="stage 0: backward of micro-batch 0 precedes its forward"):
        simulate([[Action("backward", 0), Action("forward", 0)]])
