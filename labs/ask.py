"""`ask`: questions with drawn numbers, judged by the project's code. `decide`: layouts, judged by a dry run."""

import argparse
import random
from fractions import Fraction

STEPS = ("00", "01", "02", "03", "04", "05", "06")


def add_commands(commands: argparse._SubParsersAction) -> None:
    ask = commands.add_parser("ask", help="questions with drawn numbers, that know your answer")
    ask.add_argument("step", nargs="?", choices=STEPS, help="the default is all of them")
    ask.add_argument("--question", type=int, help="only this one of the step, counted from 1: from easy to hard")
    ask.add_argument("--seed", type=int, help="of the numbers. The same seed draws the same ones")
    ask.add_argument("--answer", nargs="+", metavar="X", help="instead of asking: the answers to the first questions")
    ask.set_defaults(run=run_ask)
    decide = commands.add_parser("decide", help="choose a layout and defend it: a dry run is the judge")
    decide.add_argument("axis", choices=("dp", "tp", "pp", "cp"))
    decide.add_argument("--answer", metavar="OPTIONS", help='instead of asking: "--dp 8 --zero 1 ..."')
    decide.set_defaults(run=run_decide)


def number(text: str) -> float:
    """1,024 or 1_024 or 2.5e9 or 3/4 or 12.5%. Raises ValueError."""
    text = text.strip().removesuffix("%").replace(",", "").replace(" ", "")
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def is_right(given: str, answer: float, tolerance: float) -> bool:
    """Whether a student's answer is right. What is no number is not."""
    try:
        return abs(number(given) - answer) <= tolerance * abs(answer) + 1e-9
    except ValueError:
        return False


def run_ask(args: argparse.Namespace) -> int:
    from importlib import import_module

    seed = random.randrange(1000) if args.seed is None else args.seed
    questions = []
    for step in [args.step] if args.step else STEPS:
        of_step = import_module(f"labs.questions.step{step}").QUESTIONS
        if args.question is not None and not 1 <= args.question <= len(of_step):
            print(f"error: step {step} has the questions 1 to {len(of_step)}, not {args.question}")
            return 1
        chosen = [args.question] if args.question else range(1, len(of_step) + 1)
        questions += [(step, i, of_step[i - 1]) for i in chosen]
    answers = list(args.answer or [])
    if args.answer and len(answers) > len(questions):
        print(f"error: {len(answers)} answers to {len(questions)} questions")
        return 1
    right = asked = 0
    for step, i, make in questions[: len(answers)] if args.answer else questions:
        question = make(random.Random(seed))
        print(f"\nstep {step}, question {i} (--seed {seed})\n{question.text}")
        try:
            given = answers.pop(0) if args.answer else input("> ")
        except EOFError:
            break
        answer = question.answer()
        good = is_right(given, answer, question.tolerance)
        right, asked = right + good, asked + 1
        print(f"{'right' if good else 'not yet'}: {answer:,.6g}\n{question.solution}")
    print(f"\n{right} of {asked} right")
    return 0 if right == asked else 1


def run_decide(args: argparse.Namespace) -> int:
    from labs.questions.decisions import DECISIONS

    decision = DECISIONS[args.axis]
    print(decision.text)
    try:
        given = args.answer or input("options of step06's train.py > ")
    except EOFError:
        return 1
    verdicts = decision.judge(given)
    for verdict in verdicts:
        print(verdict)
    return 0 if all(verdict.good for verdict in verdicts) else 1
