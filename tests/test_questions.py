"""The labs' questions: what their solutions arrive at is what the project's code says, for 20 draws of each."""

import multiprocessing
import os
from functools import cache
from importlib import import_module
from random import Random
from unittest.mock import patch

import pytest
import ranks
import torch.distributed as dist
from conftest import ROOT, load_step
from ranks import run_ranks

# The questions run step06, whose files must not be taken for another step's.
load_step("step06_4d")
from labs.ask import STEPS, is_right, number
from labs.questions import step00
from labs.questions.decisions import DECISIONS, Decision, Verdict

DRAWS = 20
# What a solution leaves out, as a share: a few counters.
LEFT_OUT = {"states": 0.005}


def questions(step):
    return import_module(f"labs.questions.step{step}").QUESTIONS


def _wrong(task):
    """Of a step's questions with the same draw, those whose solution arrives at another number, and their texts."""
    step, seed = task
    wrong, texts = [], []
    for ask in questions(step):
        question = ask(Random(seed))
        answer = question.answer()
        texts.append(question.text)
        if abs(question.result - answer) > LEFT_OUT.get(ask.__name__, 1e-9) * abs(answer):
            wrong.append(f"{ask.__name__}, seed {seed}: {question.result} by formula, {answer} by code")
    return wrong, texts


def _one_after_the_other(function, tasks):
    found = []
    for task in tasks:
        found.append(function(task))
        dist.barrier()
        dist.destroy_process_group()
    return found


@cache
def of_all_draws(count, function):
    """What each rank returns of each task of so many ranks that step00 draws."""
    drawn = {step00._drawn(Random(seed)) for seed in range(DRAWS)}
    tasks = [numbers for numbers in drawn if numbers.ranks == count]
    of_ranks = run_ranks(count, _one_after_the_other, function, tasks)
    return dict(zip(tasks, zip(*of_ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def judged():
    """By step, of each draw. As many at a time as there are cores."""
    tasks = [(step, seed) for step in STEPS if step != "00" for seed in range(DRAWS)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        found = dict(zip(tasks, pool.map(_wrong, tasks, chunksize=1), strict=True))
    # Its ranks are real, and new processes for a student. This process holds no group that forked ones would inherit.
    with patch.object(ranks, "run_ranks", lambda count, function, task, method: of_all_draws(count, function)[task]):
        return found | {("00", seed): _wrong(("00", seed)) for seed in range(DRAWS)}


@pytest.mark.parametrize("step", STEPS)
def test_solutions_arrive_at_what_the_code_says(judged, step):
    of_step = [judged[step, seed] for seed in range(DRAWS)]
    assert not [line for wrong, _ in of_step for line in wrong]
    # Numbers are drawn: no question is asked with the same ones each time.
    assert all(len(set(texts)) > 1 for texts in zip(*(texts for _, texts in of_step), strict=True))


def test_there_are_six_questions_per_step():
    assert all(len(questions(step)) >= 6 for step in STEPS)


@pytest.mark.parametrize(
    ("text", "value"), [("1,024", 1024), ("2.5e9", 2.5e9), ("3/4", 0.75), (" 12.5 %", 12.5), ("-3", -3)]
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("given", "right"), [("100", True), ("100.9", True), ("102", False), ("a lot", False), ("", False), ("1/0", False)]
)
def test_answers_are_taken_with_a_tolerance(given, right):
    assert is_right(given, 100, 0.01) == right


def ask(monkeypatch, capsys, *words):
    from labs.__main__ import main

    monkeypatch.setattr("sys.argv", ["labs", *words])
    code = main()
    return code, capsys.readouterr().out


@pytest.mark.quick
def test_ask(monkeypatch, capsys):
    question = questions("04")[0](Random(5))
    command = ["ask", "04", "--question", "1", "--seed", "5", "--answer"]
    code, out = ask(monkeypatch, capsys, *command, f"{question.result:.2f}")
    assert code == 0 and question.text in out and f"right: {question.result:.6g}" in out and question.solution in out
    code, out = ask(monkeypatch, capsys, *command, "99")
    assert code == 1 and "not yet" in out and "0 of 1 right" in out
    code, out = ask(monkeypatch, capsys, "ask", "04", "--question", "77")
    assert code == 1 and "not 77" in out


SMALL = Decision(
    "",
    "--model tiny --global-batch-size 16 --micro-batch-size 1 --seq-len 32",
    4,
    lambda ranks: [Verdict(ranks.idle < 0.2, f"{ranks.idle:.4f} {ranks.sent('pp'):.6f} {ranks.micro_batches}")],
)


def test_decisions_are_judged_by_a_dry_run():
    fits, (good, text) = SMALL.judge("--dp 2 --pp 2")
    # 8 micro-batches over two stages; messages of 32 · 256 numbers, two all-reduced scalars, and a tied embedding.
    assert fits.good and good and text == f"{1 / 9:.4f} {(8 * 32 * 256 + 2 + 4096 * 256) * 4 / 1e9:.6f} 8"
    # Two micro-batches are too few.
    few = SMALL._replace(given=SMALL.given.replace("16", "4"))
    assert [verdict.good for verdict in few.judge("--dp 2 --pp 2")] == [True, False]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--dp 2 --pp 4", "is 8 GPUs, not 4"),
        ("--dp 2 --tp 2 --zero 2 --pp-schedule zero-bubble", "leave out --pp-schedule"),
        ("--dp 1 --pp 4 --num-hidden-layers 2", "need a layer each"),
    ],
)
def test_layouts_that_cannot_run(options, why):
    (verdict,) = SMALL.judge(options)
    assert not verdict.good and why in verdict.text


def test_there_is_a_decision_per_axis():
    assert set(DECISIONS) == {"dp", "tp", "pp", "cp"}


def test_files_stay_small():
    for path in (ROOT / "labs").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
