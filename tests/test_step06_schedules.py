"""Interleaved 1F1B and zero bubble on paper: order, deadlock, what a stage holds, and its idle time."""

import itertools
from collections import Counter

import pytest
from conftest import load_step
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.timeline import UNIT_COSTS, bubble, simulate

load_step("step06_4d")
from pipeline.schedules import SCHEDULES, Action, interleaved, make_schedule, zero_bubble


@st.composite
def cases(draw):
    """Schedule, chunks, stages and micro-batches, of which chunks take a multiple of the stages."""
    name, stages = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 8))
    chunks = draw(st.integers(1, 4)) if name == "1f1b" and stages > 1 else 1
    micro_batches = draw(st.integers(1, 5)) * stages if chunks > 1 else draw(st.integers(1, 30))
    return name, chunks, stages, micro_batches


def all_stages(name, chunks, stages, micro_batches):
    return [make_schedule(name, stage, stages, micro_batches, chunks) for stage in range(stages)]


@given(cases())
def test_every_action_once_in_order_and_no_deadlock(case):
    name, chunks, stages, micro_batches = case
    events = simulate(all_stages(*case))
    kinds = ("forward", "input", "weight") if name == "zero-bubble" else ("forward", "backward")
    every = itertools.product(range(stages), kinds, range(micro_batches), range(chunks))
    ends = {(event.stage, event.kind, event.micro_batch, event.chunk): event.end for event in events}
    assert Counter(ends.keys()) == Counter(every) and len(events) == len(ends)
    for stage, kind, m, start, _, chunk in events:
        if kind != "forward":
            assert ends[stage, "input" if kind == "weight" else "forward", m, chunk] <= start
        step = {"forward": 1, "weight": 0}.get(kind, -1)
        source = chunk * stages + stage - step
        if step and 0 <= source < stages * chunks:
            assert ends[source % stages, kind, m, source // stages] <= start


@given(cases())
def test_what_a_stage_holds(case):
    """In chunks of a micro-batch: from forward until nothing of it is needed any more."""
    name, chunks, stages, micro_batches = case
    for stage, schedule in enumerate(all_stages(*case)):
        changes = [{"forward": 1, "input": 0}.get(action.kind, -1) for action in schedule]
        expected = {
            "afab": micro_batches,
            "1f1b": stages - stage if chunks == 1 else chunks * stages + stages - 2 * stage - 1,
            "zero-bubble": stages,
        }[name]
        assert max(itertools.accumulate(changes)) == min(expected, micro_batches * chunks)


@given(cases())
def test_bubble_is_the_formula(case):
    """The executor waits for what it has sent before it computes the next: that stalls nobody."""
    name, chunks, stages, micro_batches = case
    work = 3 * chunks * micro_batches
    idle = 3 * (stages - 1)
    if name == "zero-bubble":
        # A third, once there are micro-batches enough to fill the rest.
        idle = stages - 1 + max(0, stages - micro_batches)
    assert bubble(simulate(all_stages(*case))) == pytest.approx(idle / (work + idle))


@given(st.integers(2, 6), st.integers(1, 12), st.floats(0.2, 2), st.floats(0.2, 2), st.floats(0.2, 2))
def test_bubble_of_zero_bubble_with_other_costs(stages, more, forward, grad_input, weight):
    """(P − 1)(F + I − W), as long as W is what fits: between what a stage waits in the schedule's two halves."""
    assume(weight <= min(forward, grad_input))
    costs = {"forward": forward, "input": grad_input, "weight": weight}
    micro_batches = 2 * stages + more
    events = simulate(all_stages("zero-bubble", 1, stages, micro_batches), lambda stage, kind, chunk: costs[kind])
    idle = max(event.end for event in events) - micro_batches * (forward + grad_input + weight)
    assert idle == pytest.approx((stages - 1) * (forward + grad_input - weight))


@given(st.integers(2, 5), st.integers(2, 3), st.integers(1, 3), st.booleans(), st.data())
def test_a_stage_that_does_not_follow_is_found(stages, chunks, groups, late_weights, data):
    """Whichever two actions of a kind a stage exchanges; weights may come in any order, but not too early."""
    schedules = all_stages("zero-bubble", 1, stages, groups * stages)
    if not late_weights:
        schedules = all_stages("1f1b", chunks, stages, groups * stages)
    schedule = schedules[data.draw(st.integers(0, stages - 1))]
    i, j = sorted(data.draw(st.lists(st.integers(0, len(schedule) - 1), min_size=2, max_size=2, unique=True)))
    schedule[i], schedule[j] = schedule[j], schedule[i]
    before = {"backward": "forward", "input": "forward", "weight": "input"}
    too_early = any(
        action.kind in before and action._replace(kind=before[action.kind]) not in schedule[:n]
        for n, action in enumerate(schedule)
    )
    if too_early or (schedule[i].kind == schedule[j].kind != "weight"):
        with pytest.raises(ValueError, match=r"do not agree|precedes its|deadlock"):
            simulate(schedules)


def test_a_smaller_last_group_would_hang():
    with pytest.raises(ValueError, match="deadlock"):
        simulate([interleaved(stage, 4, 5, 3) for stage in range(4)])


@pytest.mark.quick
def test_schedules_by_hand():
    short = lambda actions: " ".join(f"{a.kind[0]}{a.micro_batch}{'ab'[a.chunk]}" for a in actions)  # noqa: E731
    assert short(interleaved(0, 2, 4, 2)) == "f0a f1a f0b f1b f2a b0b f3a b1b f2b b0a f3b b1a b2b b3b b2a b3a"
    assert short(interleaved(1, 2, 4, 2)) == "f0a f1a f0b b0b f1b b1b f2a b0a f3a b1a f2b b2b f3b b3b b2a b3a"
    assert short(zero_bubble(1, 3, 3)) == "f0a f1a i0a f2a i1a w0a i2a w1a w2a"
    assert [UNIT_COSTS[kind] for kind in ("forward", "backward", "input", "weight")] == [1, 2, 1, 1]


def test_action_names_its_chunk():
    assert Action("forward", 3) == ("forward", 3, 0)
