"""step06: a run that is told to stop saves, and one that loses a rank says which; started again, both go on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from traceback import walk_tb

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load_step
from launcher import Launch
from ranks import run_ranks
from running import ledger_of, train
from safetensors.torch import load_file
from soak.soak import kill_one, lines, soak, steps_of, tell_one, tell_twice

from shared.config import UserError, parse

STEP = "step06_4d"
GRID = ["--dp", "2", "--tp", "2"]
REQUEUE = 85


def arguments(small_run, directory, *options):
    """A run that is longer than any test, and watched."""
    watched = ["--checkpoint-dir", str(directory / "c"), "--heartbeat-timeout", "60"]
    return [*small_run, "--steps", "2000", "--eval-every", "0", *watched, *options]


def after(run, steps):
    """Wait for that many steps."""
    deadline = time.monotonic() + 60
    while run.running() and steps_of(run) < steps and time.monotonic() < deadline:
        time.sleep(0.005)
    assert run.running(), run.output()


def on_rank(rank, name, action):
    """To prepare a run: calls `action(number of the call)` on that rank before each call of the trainer's method."""

    def prepare(module):
        function, calls = getattr(module.Trainer, name), []

        def replaced(*args):
            calls.append(name)
            if dist.get_rank() == rank:
                action(len(calls))
            return function(*args)

        setattr(module.Trainer, name, replaced)

    return prepare


# Told to stop


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGUSR1, [2]), (signal.SIGTERM, [0, 1, 2, 3])])
def test_all_stop_and_save_when_one_is_told(small_run, tmp_path, number, ranks):
    run = Launch(4, STEP, arguments(small_run, tmp_path, *GRID, "--zero", "1"), tmp_path / "logs")
    after(run, 3)
    run.signal(number, *ranks)
    assert run.wait() == [REQUEUE] * 4, run.output()
    steps = steps_of(run)
    assert os.readlink(tmp_path / "c" / "latest") == f"step-{steps:06}"
    assert run.output().count(f"told to stop ({number.name}), and saved") == 1


def test_ranks_agree_to_stop_after_steps_that_are_reported(small_run, tmp_path):
    """Between these, no rank waits for another."""

    def tell(call):
        if call == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    args = arguments(small_run, tmp_path, "--log-every", "5")
    run = Launch(2, STEP, args, tmp_path / "logs", on_rank(1, "forward_backward", tell))
    assert run.wait() == [REQUEUE] * 2 and os.readlink(tmp_path / "c" / "latest") == "step-000005", run.output()


def test_what_is_saved_is_known_to_be_a_number(small_run, tmp_path):
    """Whatever --log-every says."""

    def spoil(module):
        clip, calls = module.Trainer.clip_grad_norm, []

        def spoiled(trainer):
            calls.append(clip(trainer))
            return calls[-1] * (float("nan") if len(calls) == 2 else 1)

        module.Trainer.clip_grad_norm = spoiled

    args = arguments(small_run, tmp_path, "--log-every", "50", "--save-every", "3")
    run = Launch(2, STEP, args, tmp_path / "logs", spoil)
    assert run.wait() == [1, 1] and "step 3: gradient norm not a finite number" in run.output()
    assert not list((tmp_path / "c").glob("step-*"))


@pytest.mark.parametrize("where", ["forward_backward", "evaluate", "saving"])
def test_told_at_any_time_and_nothing_is_saved_twice(small_run, tmp_path, where):
    """In the middle of step 2, of its evaluation, or while its checkpoint is being written."""

    def tell(call):
        if call == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def prepare(module):
        if where != "saving":
            on_rank(1, where, tell)(module)
            return
        from survive import checkpoint

        write = checkpoint.write

        def slow(*args):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)
            return write(*args)

        checkpoint.write = slow

    args = arguments(small_run, tmp_path, "--eval-every", "1", "--save-every", "2")
    run = Launch(2, STEP, args, tmp_path / "logs", prepare)
    assert run.wait() == [REQUEUE] * 2
    output = run.output()
    saved = re.findall(r"saved \S+/(step-\d+)", output)
    # The first is still being written when a step is agreed to be the last one.
    assert saved == (["step-000002"] if where != "saving" else [f"step-{n:06}" for n in range(2, steps_of(run) + 1)])
    assert output.count("validation loss") == steps_of(run) == int(saved[-1][5:])


@pytest.mark.quick
def test_told_before_the_first_step(small_run, tmp_path):
    """There is nothing to lose yet, and the same command begins again."""

    def prepare(module):
        from survive.stopping import Stopping

        def enter(stopping, enter=Stopping.__enter__):
            enter(stopping)
            os.kill(os.getpid(), signal.SIGUSR1)
            return stopping

        Stopping.__enter__ = enter

    args = [*small_run, "--steps", "2", "--zero", "1", "--checkpoint-dir", str(tmp_path / "c")]
    assert Launch(2, STEP, args, tmp_path / "told", prepare).wait() == [REQUEUE] * 2
    assert os.readlink(tmp_path / "c" / "latest") == "step-000000"
    exported = [tmp_path / "again", tmp_path / "expected"]
    for path, arguments_of in zip(exported, (args, args[:-2]), strict=True):
        run = Launch(2, STEP, [*arguments_of, "--export-dir", str(path)], tmp_path / f"{path.name} logs")
        assert run.wait() == [0, 0] and ("resumed from" in run.output()) == (path.name == "again"), run.output()
    ours, theirs = (load_file(path / "model.safetensors") for path in exported)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()


def test_what_could_not_be_saved_is_not_to_be_started_again(small_run, tmp_path):
    """It would come back to where it is, and wait in a queue for that."""

    def prepare(module):
        from survive import checkpoint
        from survive.agreement import Failed

        def full(*args):
            raise Failed("No space left on device")

        checkpoint.write = full
        on_rank(0, "forward_backward", lambda call: call == 3 and os.kill(os.getpid(), signal.SIGUSR1))(module)

    run = Launch(2, STEP, arguments(small_run, tmp_path), tmp_path / "logs", prepare)
    assert run.wait() == [1, 1]
    assert "told to stop, but the last step could not be saved" in run.output()


def test_the_last_step_needs_no_stop(small_run, tmp_path):
    def tell(call):
        if call == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    args = arguments(small_run, tmp_path, "--steps", "3", "--export-dir", str(tmp_path / "exported"))
    run = Launch(2, STEP, args, tmp_path / "logs", on_rank(0, "forward_backward", tell))
    assert run.wait() == [0, 0] and (tmp_path / "exported").exists()


def test_signals_keep_their_meaning_if_nothing_is_saved(small_run, tmp_path):
    run = Launch(2, STEP, [*small_run, "--steps", "2000"], tmp_path / "logs")
    after(run, 2)
    run.signal(signal.SIGUSR1, 1)
    assert run.wait()[1] == -signal.SIGUSR1


def _handlers(args):
    inside = []

    def evaluation(original):
        return lambda *args: inside.append(signal.getsignal(signal.SIGTERM)) or original(*args)

    before = signal.getsignal(signal.SIGTERM)
    train([*args, "--steps", "2", "--eval-every", "1"], STEP, evaluate=evaluation)
    return before == signal.getsignal(signal.SIGTERM), before == inside[0]


def test_handlers_are_there_while_training_alone(small_run, tmp_path):
    assert run_ranks(1, _handlers, [*small_run, "--checkpoint-dir", str(tmp_path)]) == [(True, False)]
    assert run_ranks(1, _handlers, small_run) == [(True, True)]


@pytest.mark.parametrize(
    "layout",
    [
        "--dp 2 --tp 2",
        "--dp 2 --tp 2 --spike-factor 1000",
        "--dp 4 --micro-batch-size 2 --on-bad-step skip",
        "--pp 4 --micro-batch-size 2 --num-hidden-layers 4 --eval-every 1",
    ],
)
def test_what_agreeing_sends(small_run, tmp_path, layout):
    """4 bytes more, over all ranks."""
    args = [*small_run, *layout.split()]
    without = run_ranks(4, ledger_of, args, STEP)
    for found, before in zip(
        run_ranks(4, ledger_of, [*args, "--checkpoint-dir", str(tmp_path)], STEP), without, strict=True
    ):
        counts = {key: (t.calls / 3, t.bytes / 3) for key, t in found["counts"].items()}
        assert found["steps"] == 3 and counts == {key: tuple(t) for key, t in found["expected"].items()}
        total, total_before = (sum(t.bytes for t in each["expected"].values()) for each in (found, before))
        assert total == total_before + 4


# A rank is missing

PLACE = r"in step \d+, at \w+\.py:\d+"


def errors(run):
    """The lines that say what went wrong."""
    return [line for line in run.output().splitlines() if re.match(r"\[rank|error|Traceback|\w*Error", line)]


@pytest.mark.quick
def test_a_killed_rank_is_named_in_one_line(small_run, tmp_path):
    run = Launch(4, STEP, arguments(small_run, tmp_path, *GRID), tmp_path / "logs")
    after(run, 3)
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
    after(run, 3)
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
        process.join(40)
    run.signal(signal.SIGKILL, rank)
    codes = run.wait()
    assert codes[:rank] + codes[rank + 1 :] == [1] * (len(codes) - 1)
    (error,) = errors(run)
    return error


# In forward_backward it is first missed by some ranks, which others then miss.
@pytest.mark.parametrize("name", ["forward_backward", "clip_grad_norm"])
@pytest.mark.parametrize("layout", ["--dp 2 --tp 2", "--dp 2 --pp 2 --micro-batch-size 2"])
def test_a_rank_that_lives_but_does_not_come_is_named(small_run, tmp_path, layout, name):
    args = arguments(small_run, tmp_path, *layout.split(), "--timeout", "4")
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

    args = arguments(small_run, tmp_path, "--timeout", "4")
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
    args = [*small_run, "--steps", "2", "--eval-every", "1", "--heartbeat-timeout", "3"]
    prepare = on_rank(0, name, lambda call: time.sleep(5 * (call == 1)))
    run = Launch(2, STEP, args, tmp_path / "logs", prepare)
    assert run.wait() == [0, 0], run.output()


def test_options_that_cannot_be(small_run):
    with pytest.raises(UserError, match="--heartbeat-timeout must be 0 or at least 3, but is 2"):
        parse(load_step(STEP).Config, [*small_run, "--heartbeat-timeout", "2"])


# Started again


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchrun_starts_it_again(small_run, tmp_path):
    """A rank dies of kill -9, twice; the same command goes on by itself.

    With a store of its own for each attempt, or it would find the addresses of the last one.
    """
    directory, exported, metrics = (tmp_path / name for name in ("c", "exported", "metrics.jsonl"))
    args = [*small_run, "--steps", "60", "--zero", "1"]

    def run_in_peace(directory):
        assert Launch(2, STEP, [*args, "--export-dir", str(directory)], tmp_path / "logs").wait() == [0, 0]
        return load_file(directory / "model.safetensors")

    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
    ]
    command += [f"{STEP}/train.py", *args, "--export-dir", str(exported), "--metrics-file", str(metrics)]
    command += ["--checkpoint-dir", str(directory), "--save-every", "5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, **pipes
    )
    killed = set()
    try:
        for newest in (10, 25):
            deadline = time.monotonic() + 120
            while not any(int(path.name[5:]) >= newest for path in directory.glob("step-*")):
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            # Those of this attempt have the highest numbers.
            killed.add(max(map(int, workers)))
            os.kill(max(killed), signal.SIGKILL)
        output, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 0 and len(killed) == 2, output
    assert output.count("resumed from") == 2
    ours, theirs = load_file(exported / "model.safetensors"), run_in_peace(tmp_path / "expected")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in lines(metrics) if "loss" in line] == list(range(1, 61))


def test_a_short_soak(small_run, tmp_path):
    """More of it: tests/soak/soak.py."""
    args = [*small_run, *GRID, "--steps", "40", "--zero", "1", "--save-every", "10", "--eval-every", "7"]
    soak(4, [*args, "--micro-batch-size", "2"], [tell_one, kill_one, tell_twice], 3, tmp_path)
