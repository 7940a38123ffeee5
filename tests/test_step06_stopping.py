"""step06: a run that is told to stop saves, and the same command goes on."""

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from fake_ranks import check_ledgers
from launcher import Launch, on_rank
from ranks import run_ranks
from running import check_ledger, ledger_of, train
from safetensors.torch import load_file

STEP = "step06_4d"
REQUEUE = 85


def arguments(small_run, directory, *options):
    """A run that is longer than any test, and watched."""
    watched = ["--checkpoint-dir", str(directory / "c"), "--heartbeat-timeout", "60"]
    return [*small_run, "--steps", "2000", "--eval-every", "0", *watched, *options]


TOLD = [(signal.SIGUSR1, [2]), (signal.SIGTERM, [0, 1, 2, 3]), (signal.SIGINT, [0, 1, 2, 3])]


@pytest.mark.parametrize(("number", "ranks"), TOLD)
def test_all_stop_and_save_when_one_is_told(small_run, tmp_path, number, ranks):
    run = Launch(4, STEP, arguments(small_run, tmp_path, "--dp", "2", "--tp", "2", "--zero", "1"), tmp_path / "logs")
    run.after(3)
    run.signal(number, *ranks)
    assert run.wait() == [REQUEUE] * 4, run.output()
    steps = run.steps()
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
    assert saved == (["step-000002"] if where != "saving" else [f"step-{n:06}" for n in range(2, run.steps() + 1)])
    assert output.count("validation loss") == run.steps() == int(saved[-1][5:])


def test_a_second_signal_on_the_way_out_changes_nothing(small_run, tmp_path):
    """When all contexts are left."""

    def prepare(module):
        from survive.stopping import Stopping

        def leave(*args, leave=Stopping.leave, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            leave(*args, **kwargs)

        Stopping.leave = leave
        on_rank(0, "forward_backward", lambda call: call == 2 and os.kill(os.getpid(), signal.SIGTERM))(module)

    run = Launch(2, STEP, arguments(small_run, tmp_path), tmp_path / "logs", prepare)
    assert run.wait() == [REQUEUE] * 2, run.output()


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

    def prepare(module):
        from survive.checkpoint import Checkpoints

        def export(checkpoints, directory, export=Checkpoints.export):
            # A job sends it again and again, to all.
            os.kill(os.getpid(), signal.SIGTERM)
            export(checkpoints, directory)

        def write_timeline(pipeline):
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        Checkpoints.export, module.pipeline_parallel.Pipeline.write_timeline = export, write_timeline
        on_rank(0, "forward_backward", tell)(module)

    args = arguments(small_run, tmp_path, "--steps", "3", "--export-dir", str(tmp_path / "exported"))
    run = Launch(2, STEP, args, tmp_path / "logs", prepare)
    assert run.wait() == [0, 0] and (tmp_path / "exported").exists()


def test_signals_keep_their_meaning_if_nothing_is_saved(small_run, tmp_path):
    run = Launch(2, STEP, [*small_run, "--steps", "2000"], tmp_path / "logs")
    run.after(2)
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
    args = [*small_run, "--steps", "2", *layout.split()]
    saving = run_ranks(4, ledger_of, [*args, "--checkpoint-dir", str(tmp_path)], STEP)
    for ours, before in zip(saving, check_ledgers(4, args, STEP), strict=True):
        check_ledger(ours)
        total, total_before = (sum(t.bytes for t in each["expected"].values()) for each in (ours, before))
        assert total == total_before + 4
