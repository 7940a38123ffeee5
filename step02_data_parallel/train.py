"""Train a Llama-like model."""

from dataclasses import dataclass

import data_parallel
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shared import data, distributed
from shared.command import run
from shared.config import BaseConfig
from shared.corpus import Corpus, prepare_corpus
from shared.ledger import LedgerReport
from shared.llama_configs import load_model_config
from shared.loss import linear_cross_entropy
from shared.metrics import Metrics
from shared.model import LlamaForCausalLM
from shared.optim import make_optimizer, set_learning_rate
from shared.weights import Weights, export, full_weights, materialize


@dataclass
class Config(
    data_parallel.Config,
    BaseConfig,
):
    """Train a Llama-like model."""


def micro_batch_loss(config: Config, model: LlamaForCausalLM, batch: data.Batch) -> Tensor:
    """Cross entropy summed over the tokens of a micro-batch."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        hidden = model.model(batch.input_ids, batch.position_ids)
        return linear_cross_entropy(hidden, model.lm_head.weight, batch.labels)


class Trainer:
    """What a run holds, and the parts of a training step."""

    def __init__(self, config: Config, model_config: PreTrainedConfig, corpus: Corpus, weights: Weights) -> None:
        self.config = config
        self.mesh, self.device = distributed.start_mesh(config)
        train_sequences, held_out = data.split_corpus(corpus, config)
        # This process's share of each global batch.
        rank, size = self.mesh.get_local_rank("dp"), self.mesh["dp"].size()
        self.batches = data.GlobalBatches(train_sequences, config, rank, size)
        self.validation = {
            name: data.GlobalBatches(sequences, config, rank, size) for name, sequences in held_out.items()
        }
        self.model = self.build_model(model_config)
        materialize(self.model, weights, config.param_dtype, self.device)
        self.reducer = data_parallel.make_reducer(config, self.model, self.mesh.get_group("dp"))
        self.optimizer = make_optimizer(config, list(self.model.parameters()))

    def build_model(self, model_config: PreTrainedConfig) -> LlamaForCausalLM:
        """The model without memory for its weights yet: only what is kept is ever allocated."""
        with torch.device("meta"):
            model = LlamaForCausalLM(model_config)
        if self.config.compile:
            for layer in model.model.layers.values():
                layer.compile(dynamic=False)
        return model

    def forward_backward(self, batches: list[data.Batch]) -> Tensor:
        """Accumulate the gradients of a step over its micro-batches. Returns the loss, in nats per token."""
        # Divided by the tokens of the global batch before backward: gradients need no scaling, however it is split.
        tokens = self.config.global_batch_size * self.config.seq_len
        total = torch.zeros((), device=self.device, dtype=self.config.param_dtype)
        self.reducer.start(len(batches))
        for batch in batches:
            loss = micro_batch_loss(self.config, self.model, batch) / tokens
            loss.backward()
            total += loss.detach()
        self.reducer.finish()
        return self.reducer.sum(total)

    def clip_grad_norm(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed. Returns their norm before that."""
        counted = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in counted])
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, norm)
        return norm

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Loss per token over the first global batches that are held out of each source, by its name."""
        config, losses = self.config, {}
        for name, validation in self.validation.items():
            steps = min(config.eval_steps, len(validation.sequences) // config.global_batch_size)
            validation.consumed = 0
            batches = [batch for _ in range(steps) for batch in validation.next()]
            total = sum(micro_batch_loss(config, self.model, batch) for batch in batches)
            total = self.reducer.sum(total)
            losses[name] = total.item() / (steps * config.global_batch_size * config.seq_len)
        return losses

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the whole model, or their gradients, given by name what this process has of them."""
        return tensors


def train(config: Config) -> None:
    distributed.check_launch(config)
    model_config = load_model_config(config)
    weights = full_weights(config, model_config)
    # Before this process has a device and others wait for it.
    corpus = prepare_corpus(config, model_config.vocab_size)
    trainer = Trainer(config, model_config, corpus, weights)
    distributed.check_same(corpus, trainer.device)
    optimizer = trainer.optimizer

    metrics = Metrics(config, model_config, trainer.device)
    with metrics, LedgerReport(config.ledger, config.traffic(trainer)) as ledger:
        for step in range(1, config.steps + 1):
            lr = set_learning_rate(config, optimizer, step - 1)
            loss = trainer.forward_backward(trainer.batches.next())
            grad_norm = trainer.clip_grad_norm()
            optimizer.step()
            optimizer.zero_grad()
            ledger.end_step()
            metrics.log(step, loss, grad_norm, lr)
            if config.eval_every and step % config.eval_every == 0:
                metrics.log_evaluation(step, trainer.evaluate())

    trainer.reducer.check_replicas()
    if config.export_dir:
        state_dict = trainer.whole(dict(trainer.model.named_parameters()))
        export(state_dict, model_config, corpus.tokenizer, config.export_dir)


def main() -> None:
    run(train, Config)


if __name__ == "__main__":
    main()
