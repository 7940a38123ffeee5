"""What a wrong training looks like: the records of all ranks, compared with those of one device.

Nothing here knows a lab. An error spreads, so what counts is where it is met first: in the loss, then in the gradients
as backward reaches them, then in their norm, then in the weights.
"""

import itertools
import math
from collections.abc import Callable

import torch
from parity import TOLERANCE, StepRecord
from torch import Tensor

# A layer's parameters in the order in which forward reaches them.
IN_A_LAYER = (
    *("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("post_attention_layernorm", "gate_proj", "up_proj", "down_proj"),
)
WRONG, NOT_FINITE = "wrong, and not by a factor", "not finite"
NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}


def is_same(ours: Tensor, right: Tensor) -> bool:
    return bool((ours - right).abs().max() <= TOLERANCE * right.abs().max())


def is_factor(ours: Tensor, right: Tensor) -> float | None:
    """The one number by which all of `right` has been multiplied."""
    factor = (ours * right).sum() / right.square().sum()
    return factor.item() if factor and is_same(ours, factor * right) else None


def explain(ours: list[Tensor], right: Tensor, known: dict[str, float]) -> str | None:
    """How what the ranks have differs from what is right. None if it does not. `known`: factors and their names."""
    if all(is_same(x, right) for x in ours):
        return None
    if not all(x.isfinite().all() for x in ours):
        return NOT_FINITE
    if not all(is_same(x, ours[0]) for x in ours):
        if is_same(sum(ours), right):
            return "this rank's own share: nothing was summed"
        return "different from rank to rank: the replicas differ from each other"
    if not ours[0].any():
        return "zero"
    # Any two numbers differ by some factor: of one alone, only a factor that has a name says something.
    if (factor := is_factor(ours[0], right)) and (right.numel() > 1 or _named(factor, known)):
        return _times(factor, known)
    if right.numel() > 1 and is_same(ours[0].flatten().sort().values, right.flatten().sort().values):
        return "made of the right numbers, in the wrong places"
    return WRONG


def _named(factor: float, known: dict[str, float]) -> list[str]:
    return [name for name, value in known.items() if math.isclose(value, max(factor, 1 / factor), rel_tol=1e-6)]


def _times(factor: float, known: dict[str, float]) -> str:
    if factor < 0:
        return f"{factor:.3f} times what it should be: a wrong sign"
    names = _named(factor, known)
    as_many = f" (as many as {' or '.join(names)})" if names else ""
    if factor > 1:
        return f"{factor:.3f} times too large{as_many}: what is summed too often, or not divided?"
    return f"{1 / factor:.3f} times too small{as_many}: who else divides?"


def _family(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _place_in_forward(name: str) -> tuple:
    family = _family(name)
    if family in IN_A_LAYER:
        return 1, int(name.split(".")[2]), IN_A_LAYER.index(family)
    return ("embed_tokens", "", "norm", "lm_head").index(family), 0, 0


def _of_gradients(of_ranks: list[StepRecord], right: StepRecord, known: dict[str, float]) -> str | None:
    backwards = sorted(right.gradients, key=_place_in_forward, reverse=True)
    found = {
        name: text
        for name in backwards
        if (text := explain([record.gradients[name] for record in of_ranks], right.gradients[name], known))
    }
    if not found:
        return None
    first, families, texts = next(iter(found)), {_family(name) for name in found}, set(found.values())
    how = found[first] if len(texts) == 1 else f"in {first}, {found[first]}"
    if len(found) == len(backwards) and len(texts) == 1:
        return f"every gradient is {how}"
    if families <= NORMS:
        return f"only the norms' weights differ, of which the gradient is {how}"
    if len(families) <= 3 and {name for name in backwards if _family(name) in families} == found.keys():
        return f"only the gradients of {', '.join(sorted(families))} differ: {how}"
    return (
        f"{len(found)} of {len(backwards)} gradients differ. The first that backward reaches is that of {first}: "
        f"it is {found[first]}"
    )


def _of_norm(of_ranks: list[StepRecord], right: StepRecord, known: dict[str, float]) -> str | None:
    """Where all gradients are right."""
    norms = [torch.tensor(record.grad_norm, dtype=torch.float64) for record in of_ranks]
    right_norm = torch.tensor(right.grad_norm, dtype=torch.float64)
    text = explain(norms, right_norm, known)
    if not text:
        return None
    before = "all gradients are right, their norm is not"
    if is_same(sum(norm.square() for norm in norms), right_norm.square()):
        return f"{before}: each rank has the norm of its own share, and their squares were not summed"
    squares: dict[str, float] = {}
    for name, gradient in right.gradients.items():
        kind = "the norms' weights" if _family(name) in NORMS else _family(name)
        squares[kind] = squares.get(kind, 0) + gradient.square().sum().item()
    excess = (norms[0].square() - right_norm.square()).item()
    for n, more in itertools.product((1, 2, 3), (1, 2, 3, -1)):
        for kinds in itertools.combinations(squares, n):
            if math.isclose(excess, more * sum(squares[kind] for kind in kinds), rel_tol=1e-8):
                times = {-1: "not counted"}.get(more, f"counted {more + 1} times")
                return f"{before}: {' and '.join(kinds)} {'is' if n == 1 and kinds[0][:3] != 'the' else 'are'} {times}"
    return f"{before}: it is {text}"


def _of_loss(of_ranks: list[StepRecord], right: StepRecord, known: dict[str, float]) -> str | None:
    losses = [torch.tensor(record.loss, dtype=torch.float64) for record in of_ranks]
    text = explain(losses, torch.tensor(right.loss, dtype=torch.float64), known)
    return text and f"{text} (the loss of each rank: {', '.join(f'{x:.4f}' for x in losses)}; right: {right.loss:.4f})"


def diagnose(
    of_ranks: list[list[StepRecord]],
    right: list[StepRecord],
    known: dict[str, float],
    parts: dict[str, StepRecord],
    forward: Callable[[], str | None],
) -> str | None:
    """What is wrong, where it shows first. None if nothing is.

    `parts`: the first step of runs that see less, by what that is. `forward` tells where forward goes wrong.
    """
    first = [records[0] for records in of_ranks]
    loss, gradients = _of_loss(first, right[0], known), _of_gradients(first, right[0], known)
    for name, part in parts.items():
        if gradients and not _of_gradients(first, part, known):
            gradients = f"every gradient is that of {name}"
    if loss and gradients and (WRONG in gradients or not gradients.startswith("every")):
        # What comes after a wrong forward is wrong as well.
        where = forward() or "what the modules return is right, where it can be compared"
        return f"forward is wrong already: {where}. The loss is {loss}"
    if loss:
        return f"{gradients}; the loss is wrong as well" if gradients else f"all is right but the loss: it is {loss}"
    if gradients:
        return f"the loss is right, but {gradients}"
    if norm := _of_norm(first, right[0], known):
        return norm
    for i, expected in enumerate(right[1:], 1):
        step = [records[i] for records in of_ranks]
        if loss := _of_loss(step, expected, known):
            weights = _of_weights(of_ranks, right, known)
            return f"step {i} is right but for the weights that it leaves{weights}. The next loss is {loss}"
        if _of_norm(step, expected, known):
            return f"step {i} is right. In step {i + 1} the loss is, the gradients are not: is something left over?"
    if weights := _of_weights(of_ranks, right, known):
        return f"losses and gradients are right, the weights after the last step are not{weights}"
    return None


def _of_weights(of_ranks: list[list[StepRecord]], right: list[StepRecord], known: dict[str, float]) -> str:
    for name, weight in right[-1].weights.items():
        if text := explain([records[-1].weights[name] for records in of_ranks], weight, known):
            return f": {name} is {text}"
    return ""
