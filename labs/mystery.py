"""`labs mystery`: a run with a bug that nobody names. One sees what one sees in practice, and finds where and why."""

import argparse
import random
from collections.abc import Callable

import torch

from labs import ROOT, breaks, seen
from labs.breaks import STEPS
from labs.bugs import BUGS, REASONS, Bug
from labs.seen import Seen
from shared.config import UserError
from shared.ledger import table
from shared.timeline import bubble, write_timeline


def planted(seed: int) -> Bug:
    """Which bug a seed stands for: consecutive seeds go through all of them, in an order that is drawn."""
    rounds, place = divmod(seed, len(BUGS))
    return random.Random(rounds).sample(list(BUGS.values()), len(BUGS))[place]


def loss(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """Loss and gradient norm, as rank 0 logs them."""
    records = ranks[0].records
    return breaks.curves({"loss": [r.loss for r in records], "gradient norm": [r.grad_norm for r in records]})


def reference(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """The same model on the same batches, on a single device (step01)."""
    rows = {}
    for name in ("loss", "grad_norm"):
        rows |= {name: [getattr(r, name) for r in ranks[0].records]}
        rows |= {f"{name}, one device": [getattr(r, name) for r in seen.single_device(bug, STEPS)]}
    return breaks.curves(rows)


def ledger(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """What rank 0 sends per step, next to the formula of the step's README."""
    counted = ranks[0].ledger
    return table(counted["counts"], counted["expected"], counted["steps"])


def timeline(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """What each stage of the pipeline did when, in the last step."""
    if "--pp" not in bug.options:
        return "This run has no pipeline."
    lines = []
    for stage in range(bug.ranks):
        actions = sorted((e for e in ranks[0].events if e.stage == stage), key=lambda e: e.start)
        lines.append(f"stage {stage}: " + " ".join(f"{e.kind[0].upper()}{e.micro_batch}" for e in actions))
    if ranks[0].impossible:
        return "\n".join([*lines, f"The simulator refuses these schedules: {ranks[0].impossible}."])
    lines.append(f"Idle: {bubble(ranks[0].events):.0%}, in theory {bubble(ranks[0].ideal):.0%}.")
    path = breaks.PICTURES / f"mystery_{seed}.svg"
    write_timeline(path, ranks[0].events, ranks[0].ideal)
    return "\n".join(lines)


def replicas(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """Whether ranks that are to hold the same weights do, after the last step: the check that ends a run. Numbers count
    the parameters that a rank holds, in the order of the model."""
    return "\n".join(f"rank {rank}: {one.replicas or 'all replicas agree'}" for rank, one in enumerate(ranks))


def gradients(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """The first step's gradient of each parameter, next to that of a single device: the parity check. It tells most."""
    return breaks.table(breaks.errors(ranks[0].records[0].gradients, seen.single_device(bug, STEPS)[0].gradients))


def weights(bug: Bug, seed: int, ranks: list[Seen]) -> str:
    """The weights after the last step, next to those of a single device."""
    of = breaks.errors(ranks[0].records[-1].weights, seen.single_device(bug, STEPS)[-1].weights)
    return breaks.table(of).replace("gradient of step 1", "last weights      ")


VIEWS: dict[str, Callable[[Bug, int, list[Seen]], str]] = {
    view.__name__: view for view in (loss, replicas, ledger, timeline, reference, gradients, weights)
}


def show(seed: int, views: list[str]) -> None:
    bug = planted(seed)
    print(f"mystery {seed}: {bug.step} on {bug.ranks} ranks, {bug.options or 'no options'}. Something in it is wrong.")
    ranks = seen.run(bug, True, STEPS)
    for view in views:
        print(f"\n{view}: {' '.join(VIEWS[view].__doc__.split())}\n{VIEWS[view](bug, seed, ranks)}")
    others = [view for view in VIEWS if view not in views]
    if others:
        print(f"\nMore: python -m labs mystery --seed {seed} --view {' '.join(others)}")
    print(f"Answer: python -m labs mystery --seed {seed} --answer FILE REASON (a file of {bug.step}; REASON is one of")
    print("\n".join(f"  {name:<14} {text}" for name, text in REASONS.items()) + ")")


def check(seed: int, file: str, reason: str) -> bool:
    """Whether the answer is right. Raises UserError for one that cannot be."""
    bug = planted(seed)
    if not (ROOT / bug.step / file).is_file():
        raise UserError(f"mystery {seed} is in {bug.step}, which has no file {file}")
    if reason not in REASONS:
        raise UserError(f"{reason} is none of the reasons: {', '.join(REASONS)}")
    right = file in bug.files, reason in bug.reasons
    if all(right):
        print(f"Right: {bug.name}, in {' or '.join(bug.files)}. {bug.what}")
        print(f"See it next to the correct run: python -m labs break {bug.name}")
    else:
        parts = [
            f"the {name} is {'right' if ok else 'another one'}"
            for name, ok in zip(("file", "reason"), right, strict=True)
        ]
        print(f"No: {', '.join(parts)}.")
    return all(right)


def command(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.answer and args.seed is None:
        raise SystemExit("error: an answer needs the --seed of its mystery")
    if args.answer:
        try:
            return 0 if check(args.seed, *args.answer) else 1
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
    show(random.randrange(1000) if args.seed is None else args.seed, args.view)
    return 0


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("mystery", help="find the bug in a run by what one sees of it")
    parser.add_argument("--seed", type=int, help="which mystery; without it, a new one")
    parser.add_argument("--view", nargs="+", choices=list(VIEWS), default=["loss", "replicas", "ledger"])
    parser.add_argument("--answer", nargs=2, metavar=("FILE", "REASON"))
    parser.set_defaults(run=command)
