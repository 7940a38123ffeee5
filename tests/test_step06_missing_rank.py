"""step06: a run that loses a rank says which, and where all of them are."""

import re
import signal
import time
from traceback import walk_tb

import pytest
import torch.distributed as dist
from conftest import load_step
from launcher import Launch, on_rank
from test_step06_stopping import arguments

from shared.config import UserError, parse

STEP = "step06_4d"
GRID = ["--dp", "2", "--tp", "2"]
PLACE = r"in step \d+, at \w+\.py:\d+"


def errors(run):
    """The lines that say what went wrong."""
    return [line for line in run.output().splitlines() if re.match(r"\[rank|error|Traceback|\w*Error", line)]


@pytest.mark.quick
def test_a_killed_rank_is_named_in_one_line(small_run, tmp_path):
    run = Launch(4, STEP, arguments(small_run, tmp_path, *GRID), tmp_path / "logs")
    run.after(3)
    run.signal(signal.SIGKILL, 3)
    assert run.wait() == [1, 1, 1, -signal.SIGKILL]
    (error,) = errors(run)
    # Which of the others comes first, and where they are then, is chance.
    assert re.fullmatch(
        rf"\[rank \d\] error: lost rank 3 \(silent for 3 s; last heard of {PLACE}\)"
        rf"(; ranks? [\d, -]+ {PLACE}){{1,3}}",
        error,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_named(small_run, tmp_path, rank):
    run = Launch(2, STEP, arguments(small_run, tmp_path, "--heartbeat-timeout", "3"), tmp_path / "logs")
    run.after(3)
    run.signal(signal.SIGSTOP, rank)
    run.processes[1 - rank].join(30)
    run.signal(signal.SIGKILL, rank)
    assert run.wait()[1 - rank] == 1
    (error,) = errors(run)
    assert (
        f"[rank {1 - rank}] error: lost rank {rank} (silent for 3 s" in error and f"; rank {1 - rank} in step" in error
    )


def hang(call):
    """In Python, so that the heartbeat's thread goes on."""
    if call == 3:
        time.sleep(1000)


def lives_but_does_not_come(run, rank):
    """The error of the others, whom a collective's own timeout ends."""
    for process in run.processes[:rank] + run.processes[rank + 1 :]:
        process.join(60)
    run.signal(signal.SIGKILL, rank)
    codes = run.wait()
    assert codes[:rank] + codes[rank + 1 :] == [1] * (len(codes) - 1)
    (error,) = errors(run)
    return error


# In forward_backward it is first missed by some ranks, which others then miss.
@pytest.mark.parametrize("name", ["forward_backward", "clip_grad_norm"])
@pytest.mark.parametrize("layout", ["--dp 2 --tp 2", "--dp 2 --pp 2 --micro-batch-size 2"])
def test_a_rank_that_lives_but_does_not_come_is_named(small_run, tmp_path, layout, name):
    args = arguments(small_run, tmp_path, *layout.split(), "--timeout", "10")
    error = lives_but_does_not_come(Launch(4, STEP, args, tmp_path / "logs", on_rank(2, name, hang)), 2)
    assert "lost rank 2 (alive, but not where the others are; last heard of in step 3, at train.py:" in error
    others = re.findall(r"; ranks? ([\d, -]+) in step 3, at (\w+\.py:\d+)", error)
    assert sorted(re.sub("0-1", "0, 1", ", ".join(ranks for ranks, _ in others)).split(", ")) == ["0", "1", "3"]


def test_a_rank_that_hangs_in_its_data_is_named_with_the_line(small_run, tmp_path):
    def prepare(module):
        def slow(batches, places, micro_batch=module.data.GlobalBatches.micro_batch):
            if dist.get_rank() == 1 and places[0] >= 16:
                time.sleep(1000)
            return micro_batch(batches, places)

        module.data.GlobalBatches.micro_batch = slow

    args = arguments(small_run, tmp_path, "--timeout", "10")
    error = lives_but_does_not_come(Launch(2, STEP, args, tmp_path / "logs", prepare), 1)
    assert re.search(
        r"lost rank 1 \(alive, but .*; last heard of in step 3, at data\.py:\d+\); rank 0 in step 3", error
    )


@pytest.mark.quick
def test_who_is_not_with_the_others():
    load_step(STEP)
    from survive.whereabouts import lost_ranks, not_with_the_others, places

    def beats(*ranks):
        return {rank: {"step": step, "at": at, "waits": waits} for rank, (step, at, waits) in enumerate(ranks)}

    receive, reduce, compute = (7, "channel.py:58", True), (7, "stopping.py:9", True), (7, "model.py:3", False)
    # Stages wait at different lines, and one keeps them waiting; nothing tells who did, when all wait.
    assert not_with_the_others(beats(receive, compute, reduce, receive)) == [1]
    assert not_with_the_others(beats(receive, reduce)) == []
    # Where nobody is seen to wait, as on a GPU: who is not where most are.
    assert not_with_the_others(beats(compute, compute, (6, "data.py:9", False))) == [2]
    assert not_with_the_others(beats(compute, (7, "data.py:9", False))) == []
    stages = beats(receive, compute, reduce, receive, receive)
    assert places(stages) == (
        "ranks 0, 3-4 in step 7, at channel.py:58; rank 1 in step 7, at model.py:3; rank 2 in step 7, at stopping.py:9"
    )
    assert places(beats(*((step, "a.py:1", True) for step in range(6)))).endswith("; and 2 elsewhere")
    assert lost_ranks([1], beats(reduce, compute), "silent for 3 s") == (
        "lost rank 1 (silent for 3 s; last heard of in step 7, at model.py:3); rank 0 in step 7, at stopping.py:9"
    )


def test_where_a_rank_is_and_whether_it_waits():
    module = load_step(STEP)
    from survive import agreement
    from survive.whereabouts import place

    def found(function, *args):
        try:
            function(*args)
        except Exception as error:
            return place(reversed(list(walk_tb(error.__traceback__))))

    # In the innermost line of the project, whatever is called there.
    at, waits = found(module.data.Sequences(None, 1, stop=0).document_begins, 0)
    assert re.fullmatch(r"data\.py:\d+", at) and not waits
    # Without a process group, torch raises.
    at, waits = found(agreement.on_first, None, None)
    assert re.fullmatch(r"agreement\.py:\d+", at) and waits
    assert place([]) == ("no line of its own", False)


def test_a_rank_with_an_error_of_its_own_shows_its_traceback_alone(small_run, tmp_path):
    def fail(call):
        if call == 3:
            raise RuntimeError("a bug")

    run = Launch(4, STEP, arguments(small_run, tmp_path, *GRID), tmp_path / "logs", on_rank(2, "clip_grad_norm", fail))
    assert run.wait() == [1] * 4
    assert errors(run) == ["Traceback (most recent call last):", "RuntimeError: a bug"]


@pytest.mark.parametrize("name", ["evaluate", "forward_backward"])
def test_a_rank_that_takes_long_is_not_lost(small_run, tmp_path, name):
    args = [*small_run, "--steps", "2", "--eval-every", "1", "--heartbeat-timeout", "6"]
    prepare = on_rank(0, name, lambda call: time.sleep(8 * (call == 1)))
    run = Launch(2, STEP, args, tmp_path / "logs", prepare)
    assert run.wait() == [0, 0], run.output()


def test_a_rank_that_has_finished_is_not_lost(small_run, tmp_path):
    def prepare(module):
        from shared.metrics import Metrics

        def close(*args, exit=Metrics.__exit__):
            time.sleep(6 * (dist.get_rank() == 0))
            return exit(*args)

        Metrics.__exit__ = close

    run = Launch(2, STEP, [*small_run, "--steps", "1", "--heartbeat-timeout", "3"], tmp_path / "logs", prepare)
    assert run.wait() == [0, 0], run.output()


def test_options_that_cannot_be(small_run):
    with pytest.raises(UserError, match="--heartbeat-timeout must be 0 or at least 3, but is 2"):
        parse(load_step(STEP).Config, [*small_run, "--heartbeat-timeout", "2"])
