"""What a rank trains, as a checkpoint has it: boxes of the weights, and of AdamW's moments, which are as these are."""

from typing import Any

import torch
from survive import durable
from survive.boxes import Boxes, OwnBoxes, own_boxes
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shared.weights import Weights, any_weights, full_weights

MOMENTS = ("exp_avg", "exp_avg_sq")


def will_load(config: Any) -> bool:
    """Whether there is a checkpoint to go on from, as this rank sees it. `config` has the options of checkpoints."""
    return bool(config.resume_from or (config.resumes and durable.complete(config.checkpoint_dir)))


def initial_weights(config: Any, model_config: PreTrainedConfig) -> Weights:
    """As `full_weights`. Neither drawn nor read, but of any value, if a checkpoint will be loaded into all of them."""
    return any_weights(model_config) if will_load(config) else full_weights(config, model_config)


class TrainedState:
    """Of a `Trainer` of train.py."""

    def __init__(self, trainer: Any) -> None:
        self.optimizer, self.device = trainer.optimizer, trainer.device
        self.moments = MOMENTS if trainer.config.optimizer == "adamw" else ()
        self.all = own_boxes(trainer.model, trainer.reducer)
        # Of what data-parallel ranks all have, each saves its share.
        self.share = own_boxes(trainer.model, trainer.reducer, share=True)
        # Where that is copied to: the same memory at every save.
        self.copied: dict[str, Tensor] = {}

    def weights(self) -> dict[str, Boxes]:
        """Views of all that this rank has."""
        return {f"model.{own.name}": own.of(own.trained.detach()) for own in self.all}

    def views(self) -> dict[str, Boxes]:
        """Of all that this rank has, to load into."""
        return {name: own.of(tensor) for own in self.all for name, tensor in self._tensors(own).items()}

    def copies(self) -> dict[str, Boxes]:
        """Of this rank's share, in the memory of the CPU, which the next call overwrites."""
        copies = {}
        for own in self.share:
            for name, tensor in self._tensors(own).items():
                if name not in self.copied:
                    n = own.part.stop - own.part.start
                    # A GPU copies into pinned memory by itself: so all copies are on their way at once.
                    self.copied[name] = torch.empty(n, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[name] = own.of(tensor, self.copied[name])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies

    def checksums(self) -> dict[tuple[str, torch.Size], int]:
        """Of each box of the weights, by name and offset: ranks that have the same box have the same numbers."""
        sums = {(own.name, offset): total for own in self.all for offset, total in own.checksums().items()}
        # A GPU is waited for once.
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))

    def _tensors(self, own: OwnBoxes) -> dict[str, Tensor]:
        moments = self._moments(own.trained).items()
        return {f"model.{own.name}": own.trained.detach(), **{f"{kind}.{own.name}": m for kind, m in moments}}

    def _moments(self, trained: nn.Parameter) -> dict[str, Tensor]:
        """AdamW has none before its first step, and would begin with zeros then."""
        if not self.moments:
            return {}
        state = self.optimizer.state[trained]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=trained.device)
            state |= {name: torch.zeros_like(trained) for name in self.moments}
        return {name: state[name] for name in self.moments}
