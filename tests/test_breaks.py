"""labs: each bug still trains, and parity sees it; a mystery takes its own answer only; hangs are diagnosed and end."""

import multiprocessing
import re
import signal
from functools import cache

import parity
import pytest

from labs import ROOT, __main__, hangs, mystery, seen
from labs.bugs import BUGS, REASONS
from shared.config import UserError

STEPS = 6


@cache
def check_right(step, ranks, options):
    """That the layout without a bug trains the model of a single device."""
    bug = next(b for b in BUGS.values() if (b.step, b.ranks, b.options) == (step, ranks, options))
    for rank in seen.run(bug, False, STEPS):
        error, where = parity.difference(rank.records, seen.single_device(bug, STEPS))
        assert error <= parity.TOLERANCE, where
        assert rank.replicas is None and rank.impossible is None
        counts = {key: tuple(n / rank.ledger["steps"] for n in t) for key, t in rank.ledger["counts"].items()}
        assert counts == {key: tuple(t) for key, t in rank.ledger["expected"].items()}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_trains_and_parity_sees_it(bug):
    check_right(bug.step, bug.ranks, bug.options)
    expected, ranks = seen.single_device(bug, STEPS), seen.run(bug, True, STEPS)
    error, where = max(parity.difference(rank.records, expected) for rank in ranks)
    assert error > 1e-3, where
    losses = [record.loss for record in ranks[0].records]
    # Of what the right loss falls by.
    fall = (losses[0] - losses[-1]) / (expected[0].loss - expected[-1].loss)
    print(f"{bug.name}: error {error:.0e} in {where}; the loss falls {fall:.0%} of what it should")
    assert fall > 0.4


def test_there_are_bugs_of_every_step_and_kind():
    assert len(BUGS) >= 20
    assert {bug.step[:6] for bug in BUGS.values()} == {"step02", "step03", "step04", "step05", "step06"}
    assert {reason for bug in BUGS.values() for reason in bug.reasons} == set(REASONS)
    for bug in BUGS.values():
        assert bug.what and all((ROOT / bug.step / file).is_file() for file in bug.files)


def labs(monkeypatch, *words):
    """The exit code of a command."""
    monkeypatch.setattr("sys.argv", ["labs", *words])
    return __main__.main()


def test_break_shows_both_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("labs.breaks.PICTURES", tmp_path)
    monkeypatch.setattr("labs.breaks.STEPS", STEPS)
    assert labs(monkeypatch, "break", "averaged_twice") == 0
    out = capsys.readouterr().out
    right, wrong = re.findall(r"loss, \w+ +(\S+)", out)
    # Before the first step they are the same.
    assert right == wrong
    assert re.search(r"model\.layers\.0\.mlp\.up_proj\.weight +5e-01 +× 0\.5 +0\.0°", out)
    assert (tmp_path / "break_averaged_twice.svg").stat().st_size > 10_000


def test_a_mystery_names_no_bug(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("labs.breaks.PICTURES", tmp_path)
    monkeypatch.setattr("labs.mystery.STEPS", STEPS)
    seed = next(seed for seed in range(len(BUGS)) if mystery.planted(seed).name == "gradients_in_reverse")
    assert labs(monkeypatch, "mystery", "--seed", str(seed), "--view", *mystery.VIEWS) == 0
    out = capsys.readouterr().out
    assert "stage 1: F0 F1 F2 F3 B3 B2 B1 B0" in out and "do not agree on the order of backward messages" in out
    assert "dp all-reduce" in out and "rank 1: all replicas agree" in out and "model.layers.1.mlp" in out
    bug = BUGS["gradients_in_reverse"]
    assert not any(text in out for text in (bug.name, bug.what, "pytest", *bug.files))


def test_consecutive_mysteries_are_all_bugs():
    for first in (0, len(BUGS)):
        assert {mystery.planted(seed).name for seed in range(first, first + len(BUGS))} == set(BUGS)


@pytest.mark.parametrize("seed", range(len(BUGS)))
def test_an_answer_is_accepted_if_file_and_reason_are_right(seed, monkeypatch, capsys):
    def answer(file, reason):
        return labs(monkeypatch, "mystery", "--seed", str(seed), "--answer", file, reason)

    bug = mystery.planted(seed)
    for file in bug.files:
        for reason in bug.reasons:
            assert answer(file, reason) == 0
            assert bug.what in capsys.readouterr().out
    wrong_file = next(f for f in ("train.py", "data_parallel.py", "tensor_parallel.py") if f not in bug.files)
    wrong_reason = next(reason for reason in REASONS if reason not in bug.reasons)
    assert answer(wrong_file, bug.reasons[0]) == 1
    assert capsys.readouterr().out == "No: the file is another one, the reason is right.\n"
    assert answer(bug.files[0], wrong_reason) == 1
    assert capsys.readouterr().out == "No: the file is right, the reason is another one.\n"


def test_answers_that_cannot_be():
    for file, reason, message in (("nowhere.py", "factor", "no file"), ("train.py", "love", "none of the reasons")):
        with pytest.raises(UserError, match=message):
            mystery.check(0, file, reason)


@pytest.fixture(scope="module")
def reports():
    """Of all hangs, which wait at the same time."""
    reports = dict(zip(hangs.HANGS, hangs.observe(*hangs.HANGS.values()), strict=True))
    assert not multiprocessing.active_children()
    return reports


def waiting(report):
    """The group in whose last collective each rank waits, by the flight recorder."""
    calls = [hangs.calls(recorder) for recorder in report.recorders]
    return [[group.split()[1] for group, of in groups.items() if of.waits] for groups in calls]


# The two innermost lines of each rank, what the flight recorder says, and the heartbeat.
NORM, RECEIVE = r"tensor_parallel.py:\d+ in norm_over_ranks", r"pipeline/channels.py:\d+ in receive"


@pytest.mark.parametrize(
    ("name", "stacks", "groups", "verdict"),
    [
        (
            "skipped",
            [rf"{NORM} train.py:\d+ in clip_grad_norm", rf"{RECEIVE} pipeline_parallel.py:\d+ in _forward"],
            [["mesh_pp"], []],
            r"every rank lives: rank 0 in step 3, at tensor_parallel.py:\d+; rank 1 in step 4, at channels.py:\d+",
        ),
        (
            "other_order",
            [rf"{NORM} train.py:\d+ in clip_grad_norm"] * 4,
            [["mesh_dp"], ["mesh_tp"], ["mesh_tp"], ["mesh_dp"]],
            r"every rank lives: ranks 0-3 in step 3, at tensor_parallel.py:\d+",
        ),
        (
            "receive_without_send",
            [rf"{RECEIVE} pipeline_parallel.py:\d+ in {action}" for action in ("_backward", "_forward")],
            [[], []],
            r"every rank lives: ranks 0-1 in step 3, at channels.py:\d+",
        ),
        (
            "one_channel",
            [
                rf"pipeline/channels.py:\d+ in release pipeline_parallel.py:\d+ in {action}"
                for action in ("_forward", "_backward")
            ],
            [[], []],
            r"every rank lives: ranks 0-1 in step 3, at channels.py:\d+",
        ),
        (
            "elsewhere",
            [r"data_parallel.py:\d+ in finish train.py:\d+ in forward_backward", r"train.py:\d+ in train "],
            [["mesh_dp"], []],
            r"lost rank 1 \(alive, .* in step 3, at train.py:\d+\); rank 0 in step 4, at data_parallel.py:\d+",
        ),
    ],
)
def test_a_hang_is_diagnosed_and_ends(reports, name, stacks, groups, verdict):
    report = reports[name]
    for found, expected in zip(report.stacks, stacks, strict=True):
        assert re.match(expected, " ".join([*found, ""])), found
    assert waiting(report) == groups
    assert re.search(verdict, "\n".join(report.verdict)), report.verdict
    # The page shows these stacks, whatever the numbers of their lines.
    page, shown = (ROOT / "labs/HANGS.md").read_text(), ""
    for rank, stack in enumerate(report.stacks):
        shown += "\n".join([f"rank {rank}", *(f"  {frame}" for frame in stack), ""])
    assert re.sub(r":\d+", "", shown) in re.sub(r":\d+", "", page.partition(f"## `{name}`")[2])
    assert all(code in (1, -signal.SIGKILL) for code in report.codes)
    assert 1 in report.codes
