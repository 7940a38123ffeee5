"""Where forward goes wrong: what each module returns for the first micro-batch, next to one device's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from labs.diagnosis import WRONG, explain, is_same


@dataclass
class Outputs:
    """What the modules of a rank have returned, by name and in the order of forward."""

    of_modules: dict[str, Tensor] = field(default_factory=dict)
    # Which of the b · s tokens of one device's first micro-batch they are about, (b, s).
    tokens: Tensor | None = None


@contextmanager
def recorded(module: ModuleType) -> Iterator[Outputs]:
    """The outputs of the first micro-batch that the Trainer of this module sees."""
    outputs, run = Outputs(), module.Trainer.forward_backward

    def forward_backward(trainer: Any, batches: list) -> Tensor:
        if outputs.of_modules:
            return run(trainer, batches)
        outputs.tokens = _tokens(trainer)
        names = {part: name for name, part in trainer.model.named_modules()}

        def note(part: nn.Module, args: tuple, output: object) -> None:
            if part in names and isinstance(output, Tensor):
                outputs.of_modules.setdefault(names[part], output.detach().clone())

        hook = register_module_forward_hook(note)
        try:
            return run(trainer, batches)
        finally:
            hook.remove()

    with patch.object(module.Trainer, "forward_backward", forward_backward):
        yield outputs


def _tokens(trainer: Any) -> Tensor | None:
    config = trainer.config
    if hasattr(config, "dp") and trainer.mesh["dp"].size() > 1:
        # Other sequences.
        return None
    positions = getattr(trainer.batches, "positions", torch.arange(config.seq_len))
    tokens = torch.arange(config.micro_batch_size).unsqueeze(1) * config.seq_len + positions
    if getattr(config, "sequence_parallel", False):
        tokens = tokens.flatten().chunk(config.tp)[trainer.mesh.get_local_rank("tp")].view(len(tokens), -1)
    return tokens


def first_difference(of_ranks: list[Outputs], right: Outputs, known: dict[str, float]) -> str | None:
    """The first module whose output is not one device's, of those that a rank has whole."""
    for name, whole in right.of_modules.items():
        ours = [
            (outputs.of_modules[name], whole.flatten(0, 1)[outputs.tokens])
            for outputs in of_ranks
            if name in outputs.of_modules and outputs.tokens is not None
        ]
        ours = [(output, expected) for output, expected in ours if output.shape == expected.shape]
        if not all(is_same(output, expected) for output, expected in ours):
            share = all(torch.equal(expected, ours[0][1]) for _, expected in ours)
            how = explain([output for output, _ in ours], ours[0][1], known) if share else WRONG
            return f"the first output that differs is that of {name}: it is {how}"
    return None
