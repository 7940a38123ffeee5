"""`labs break`: a run with a bug next to the same without. The losses are hard to tell apart, the gradients are not."""

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from labs import ROOT, seen
from labs.bugs import BUGS, REASONS, Bug

PICTURES = ROOT / "my"
STEPS = 30
SHOWN = (1, 2, 3, 5, 10, 20, 30)


class Error(NamedTuple):
    """Of a gradient: relative to the largest number of the right one, its length in units of the right one's, and the
    angle between the two in degrees."""

    relative: float
    length: float
    angle: float


def error(wrong: Tensor, right: Tensor) -> Error:
    a, b = wrong.flatten(), right.flatten()
    cosine = (a @ b / (a.norm() * b.norm()).clamp_min(1e-300)).item()
    angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    return Error(((a - b).abs().max() / b.abs().max()).item(), (a.norm() / b.norm()).item(), angle)


def errors(wrong: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Error]:
    """By parameter, in the order of the model."""
    return {name: error(wrong[name], tensor) for name, tensor in right.items()}


def table(of: dict[str, Error]) -> str:
    width = max(map(len, of))
    lines = [f"{'gradient of step 1':<{width}}  {'error':>8}  {'length':>9}  {'angle':>6}"]
    for name, (relative, length, angle) in of.items():
        lines.append(f"{name:<{width}}  {relative:>8.0e}  {'× ' + format(length, '.4g'):>9}  {angle:>5.1f}°")
    return "\n".join(lines)


def curves(rows: dict[str, list[float]]) -> str:
    """Numbers of some steps, a row for each run."""
    steps = [step for step in SHOWN if step <= len(next(iter(rows.values())))]
    width = max(map(len, rows))
    lines = [f"{'step':<{width}}" + "".join(f"{step:>10}" for step in steps)]
    lines += [f"{name:<{width}}" + "".join(f"{row[step - 1]:>10.4f}" for step in steps) for name, row in rows.items()]
    return "\n".join(lines)


def draw(path: Path, title: str, losses: dict[str, list[float]], of: dict[str, Error]) -> None:
    """The losses over each other, and the error of each gradient."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6), layout="constrained")
    figure.suptitle(title)
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(values) + 1), values, style, label=name)
    left.set(xlabel="step", ylabel="loss", title="What everybody looks at")
    left.legend()
    # Below, it is rounding.
    right.barh(list(of), [max(error.relative, 1e-16) for error in of.values()], left=1e-16, color="#d1605e")
    right.set(xscale="log", xlim=(1e-16, 1e3), xlabel="relative error of the gradient of step 1", title="What is wrong")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def listing() -> str:
    return "\n".join(f"{bug.step[:6]}  {name:<40}{bug.what}" for name, bug in BUGS.items())


def show(bug: Bug) -> None:
    right, wrong = (seen.run(bug, planted, STEPS)[0].records for planted in (False, True))
    options = f" {bug.options}" if bug.options else ""
    print(f"{bug.name}: {bug.step} on {bug.ranks} ranks{options}\n\n{bug.what}")
    print(f"This is in {' or '.join(bug.files)}. Of its kind: {REASONS[bug.reasons[0]]}.\n")
    losses = {name: [r.loss for r in records] for name, records in (("right", right), ("wrong", wrong))}
    print(curves({f"loss, {name}": values for name, values in losses.items()}))
    print(curves({f"norm, {name}": [r.grad_norm for r in rs] for name, rs in (("right", right), ("wrong", wrong))}))
    falls = [values[0] - values[-1] for values in losses.values()]
    print(f"\nThe wrong loss falls by {falls[1]:.3f}, the right one by {falls[0]:.3f}.\n")
    of = errors(wrong[0].gradients, right[0].gradients)
    print(table(of))
    if max(error.relative for error in of.values()) < 1e-10:
        print("\nThe first gradients are right. What is done with them is not:")
    weights = errors(wrong[-1].weights, right[-1].weights)
    worst = max(weights, key=lambda name: weights[name].relative)
    print(f"\nAfter {len(right)} steps, weights are off by up to {weights[worst].relative:.0e}, in {worst}.")
    path = PICTURES / f"break_{bug.name}.svg"
    draw(path, f"{bug.name}: {bug.step}{options}", losses, of)
    print(f"Picture: {os.path.relpath(path)}")


def command(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.bug is None:
        print(listing())
    else:
        show(BUGS[args.bug])
    return 0


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("break", help="train with a bug next to the same without, and compare")
    parser.add_argument("bug", nargs="?", choices=list(BUGS), metavar="BUG", help="without it: all bugs")
    parser.set_defaults(run=command)
