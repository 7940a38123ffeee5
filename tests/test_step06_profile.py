"""step06: where the time of a step goes, and traces. No time is compared with another run's."""

import gzip
import json
import re
import time

import pytest
import torch.distributed as dist
from conftest import load_step
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import train

from shared.config import UserError, parse

STEP = "step06_4d"
PHASES = ["data", "forward", "backward", "exposed_communication", "optimizer", "other"]
# Seconds that a rank sleeps, in which the others do all that they do.
LONG = 2.0


def profiles(path):
    """The profile of each step that has one."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["step"]: record["profile"] for record in records if "profile" in record}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, "--dp 2"),
        (2, "--tp 2"),
        (2, "--pp 2 --pp-schedule afab"),
        (2, "--cp 2"),
        (8, "--dp 2 --tp 2 --pp 2 --micro-batch-size 2"),
    ],
)
def test_phases_add_up_to_the_step(small_run, tmp_path, ranks, layout, capfd):
    path = tmp_path / "metrics"
    options = ["--steps", "5", "--eval-every", "2", "--profile", "2", "--metrics-file", str(path)]
    run_ranks(ranks, train, [*small_run, *options, *layout.split()], STEP)
    assert list(profiles(path)) == [2, 4]
    for profile in profiles(path).values():
        assert list(profile) == [*PHASES, "step", "peak_memory"]
        assert sum(profile[phase]["mean"] for phase in PHASES) == pytest.approx(profile["step"]["mean"])
        for name, row in profile.items():
            assert 0 < row["mean"] <= row["max"] * (1 + 1e-9) and 0 <= row["rank"] < ranks, name
            assert name == "peak_memory" or row["max"] <= profile["step"]["max"], name
    out = capfd.readouterr().out
    assert re.search(r"step 4 \| where the time goes +mean +max +on rank\ndata .*\nforward .* ms +\d\n", out)


@pytest.mark.quick
def test_the_ledger_does_not_see_the_gathering(small_run):
    check_ledgers(2, [*small_run, "--tp", "2", "--profile", "1"], STEP)


def _sleepy(args, phase):
    """Train, and let rank 1 sleep in this phase, once a step."""

    def sleep(*args):
        if dist.get_rank() == 1:
            time.sleep(LONG)

    def micro_batch_loss(original):
        def sleepy(config, model, batch):
            loss = original(config, model, batch)
            sleep() if phase == "forward" else loss.register_hook(sleep) if phase == "backward" else None
            return loss

        return sleepy

    def batches(original):
        class Sleepy(original):
            def next(self):
                sleep() if phase == "data" else None
                return super().next()

        return Sleepy

    def make_optimizer(original):
        def make(*args):
            optimizer = original(*args)
            optimizer.register_step_pre_hook(lambda *_: sleep() if phase == "optimizer" else None)
            return optimizer

        return make

    def clip_grad_norm(original):
        def clip(*args):
            sleep() if phase == "other" else None
            return original(*args)

        return clip

    wrappers = {"micro_batch_loss": micro_batch_loss, "SplitBatches": batches, "make_optimizer": make_optimizer}
    train(args, STEP, **wrappers, clip_grad_norm=clip_grad_norm)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "exposed_communication"])
def test_the_slowest_rank_is_found_and_the_other_waits(small_run, tmp_path, phase):
    path = tmp_path / "metrics"
    options = ["--dp", "2", "--steps", "1", "--profile", "1", "--metrics-file", str(path)]
    run_ranks(2, _sleepy, [*small_run, *options], phase)
    (profile,) = profiles(path).values()
    assert profile[phase]["rank"] == 1 and profile[phase]["max"] >= LONG
    # The sleep counts once: not on the other rank, and in no other phase but the other's waiting, if it waits after it.
    assert 2 * profile[phase]["mean"] - profile[phase]["max"] < LONG
    waits = profile["exposed_communication"]
    if phase in ("data", "forward", "backward"):
        assert waits["rank"] == 0 and waits["max"] > LONG / 2
    assert sum(profile[name]["max"] for name in PHASES if name not in (phase, "exposed_communication")) < LONG


def _replaced(args):
    """What the run has left changed, and what it had changed in the middle."""
    before, during = (dist.Work.wait, dist.all_reduce, dist.batch_isend_irecv), []

    def clip(original):
        def clip_grad_norm(*args):
            during.append(dist.all_reduce is not before[1])
            return original(*args)

        return clip_grad_norm

    train(args, STEP, clip_grad_norm=clip)
    return before == (dist.Work.wait, dist.all_reduce, dist.batch_isend_irecv), during


@pytest.mark.parametrize("every", ["0", "2"])
def test_functions_are_replaced_while_a_run_is_profiled_only(small_run, every):
    args = [*small_run, "--dp", "2", "--steps", "2", "--heartbeat-timeout", "60", "--profile", every]
    assert run_ranks(2, _replaced, args) == [(True, [every != "0"] * 2)] * 2


@pytest.mark.quick
@pytest.mark.parametrize("first_and_last", [(1, 1), (2, 3), (4, 4)])
def test_traces_are_of_the_chosen_steps_only(small_run, tmp_path, first_and_last):
    first, last = first_and_last
    options = ["--dp", "2", "--eval-every", "0", "--trace-steps", str(first), str(last)]
    options += ["--trace-dir", str(tmp_path / "traces"), "--metrics-file", str(tmp_path / "metrics")]
    run_ranks(2, train, [*small_run, *options], STEP)
    paths = sorted((tmp_path / "traces").iterdir())
    assert [path.name for path in paths] == [f"steps-{first}-{last}-rank-{rank}.json.gz" for rank in range(2)]
    for path in paths:
        names = [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        steps = {name for name in names if name.startswith("ProfilerStep")}
        assert steps == {f"ProfilerStep#{step}" for step in range(first, last + 1)}
        assert "gloo:all_reduce" in names and "aten::mm" in names
    records = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
    assert [record for record in records if "trace" in record] == [{"step": last, "trace": str(paths[0])}]


def test_a_trace_of_a_run_that_goes_on(small_run, tmp_path):
    """Its steps are counted from the beginning of the whole run."""
    args = [*small_run, "--eval-every", "0", "--checkpoint-dir", str(tmp_path / "saved")]
    run_ranks(1, train, [*args, "--stop-after", "2"], STEP)
    run_ranks(1, train, [*args, "--trace-steps", "4", "4", "--trace-dir", str(tmp_path / "traces")], STEP)
    (path,) = (tmp_path / "traces").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    # The second one of its process.
    assert {event["name"] for event in events if event["name"].startswith("ProfilerStep")} == {"ProfilerStep#2"}
    assert any(event["name"] == "aten::mm" for event in events)


def test_no_trace_without_the_option(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_ranks(1, train, [*small_run, "--profile", "1"], STEP)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--profile -1", "--profile must not be negative, but is -1"),
        ("--trace-steps 0 1", "--trace-steps 0 1: choose a first and a last one of the 4 steps"),
        ("--trace-steps 3 2", "--trace-steps 3 2: choose"),
        ("--trace-steps 3 5", "--trace-steps 3 5: choose"),
        ("--trace-steps 1 2 --trace-dir {here}", "--trace-dir {here} is not empty: choose another directory"),
        ("--trace-steps 1 2 --trace-dir {here}/file", "--trace-dir {here}/file is not empty"),
        ("--trace-steps 1 2 --trace-dir /proc/traces", "--trace-dir: cannot write to /proc"),
    ],
)
def test_errors_name_the_numbers(small_run, tmp_path, args, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(message.format(here=tmp_path))):
        parse(load_step(STEP).Config, [*small_run, *args.format(here=tmp_path).split()])
