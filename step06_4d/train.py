"""Train a Llama-like model."""

from dataclasses import dataclass
from functools import partial

import data_parallel
import numpy as np
import torch
import torch.distributed as dist
from context_parallel import (
    ContextParallelConfig,
    SplitBatches,
    apply_context_parallel,
    context_parallel_traffic,
)
from data_parallel import DataParallelConfig
from documents import DocumentBatches, DocumentsConfig, apply_document_masks, forward_in_documents
from observe import dry_run, observation
from pipeline_parallel import Pipeline, PipelineParallelConfig, apply_pipeline_parallel, counted_on_stages
from recompute import RecomputeConfig, apply_recompute
from sequence_parallel import (
    SequenceParallelConfig,
    apply_sequence_parallel,
    sequence_parallel_traffic,
    sum_norm_gradients,
)
from sharded_optimizer import ShardedOptimizerConfig, gradient_traffic, make_gradients
from survive import survival
from tensor_parallel import (
    TensorParallelConfig,
    apply_tensor_parallel,
    counted_parameters,
    full_tensors,
    norm_over_ranks,
    shard_weights,
    tensor_parallel_traffic,
)
from torch import Tensor, nn
from transformers import LlamaConfig

from shared import data, distributed
from shared.config import BaseConfig, run
from shared.corpus import prepare_corpus
from shared.ledger import LedgerReport, Traffic
from shared.llama_configs import load_model_config
from shared.model import LlamaForCausalLM
from shared.optim import make_optimizer, set_learning_rate
from shared.weights import Weights, export, full_weights


@dataclass
class AxesConfig(
    DocumentsConfig,
    RecomputeConfig,
    ShardedOptimizerConfig,
    SequenceParallelConfig,
    ContextParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
    DataParallelConfig,
    BaseConfig,
):
    def traffic(self, trainer: "Trainer") -> dict[tuple[str, str], Traffic]:
        model, reducer, batches = trainer.model, trainer.reducer, trainer.batches
        return {
            **gradient_traffic(reducer, batches.micro_batches),
            **tensor_parallel_traffic(self, model, batches),
            **sequence_parallel_traffic(self, model, reducer, batches),
            **trainer.pipeline.traffic(reducer, batches),
            **context_parallel_traffic(self, model, batches),
        }


@dataclass
class Config(
    observation.Config,
    survival.Config,
    AxesConfig,
):
    """Train a Llama-like model."""


def micro_batch_loss(config: Config, model: LlamaForCausalLM, batch: data.Batch, hidden: Tensor | None) -> Tensor:
    """Cross entropy summed over the tokens of a micro-batch. Before the last stage: hidden states for the next one."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        x = batch.input_ids if hidden is None else hidden
        hidden = forward_in_documents(model, x, batch) if config.mask_documents else model.model(x, batch.position_ids)
        return model.lm_head.loss(hidden, batch.labels) if model.lm_head else hidden


class Trainer:
    """What a run holds, and the parts of a training step."""

    def __init__(
        self, config: Config, model_config: LlamaConfig, tokens: np.ndarray, weights: Weights, eos: int = 0
    ) -> None:
        self.config = config
        self.mesh, self.device = distributed.start_mesh(config, pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp)
        train_sequences, validation_sequences = data.split_corpus(tokens, config)
        # This process's share of each global batch.
        rank, size, cp = self.mesh.get_local_rank("dp"), self.mesh["dp"].size(), self.mesh.get_group("cp")
        make_batches = partial(DocumentBatches, eos=eos) if config.mask_documents else SplitBatches
        self.batches = make_batches(train_sequences, config, rank, size, cp)
        self.validation = make_batches(validation_sequences, config, rank, size, cp)
        self.model = self.build_model(model_config)
        weights = shard_weights(self.model, weights)
        partition = distributed.groups_along(self.mesh, "dp", "cp")
        replicas = distributed.make_group(partition, "dp", config.timeout) or self.mesh.get_group("dp")
        self.reducer = make_gradients(config, self.model, weights, self.device, replicas)
        self.optimizer = make_optimizer(config, self.reducer.trained)
        self.pipeline = Pipeline(config, self.model, self.mesh)

    def build_model(self, model_config: LlamaConfig) -> LlamaForCausalLM:
        """The model of this rank, without memory: `make_gradients` gives it weights, so that only what is kept is ever
        allocated."""
        config, mesh = self.config, self.mesh
        with torch.device("meta"):
            model = LlamaForCausalLM(model_config)
            apply_tensor_parallel(model, mesh.get_group("tp"), config.tp_overlap)
            apply_sequence_parallel(model, config)
            apply_pipeline_parallel(model, config, mesh)
            apply_context_parallel(model, config, mesh.get_group("cp"), self.device)
            apply_document_masks(model, config, mesh.get_group("cp"))
        if config.compile:
            for layer in model.model.layers.values():
                # Its forward alone, so that hooks stay outside.
                layer.forward = torch.compile(layer.forward, dynamic=False)
        apply_recompute(model, config)
        return model

    def forward_backward(self, batches: list[data.Batch]) -> Tensor:
        """Accumulate the gradients of a step over its micro-batches. Returns the loss, in nats per token."""
        # Divided by the tokens of the global batch before backward: gradients need no scaling, however it is split.
        tokens = self.config.global_batch_size * self.config.seq_len
        self.reducer.start(len(batches))
        total = self.pipeline.run(batches, micro_batch_loss, tokens, self.reducer)
        self.reducer.finish()
        sum_norm_gradients(self.config, self.model, self.reducer)
        self.pipeline.sum_tied_gradients(self.reducer)
        dist.all_reduce(total, group=self.reducer.group)
        return total

    def clip_grad_norm(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed. Returns their norm before that."""
        tp = self.mesh.get_group("tp")
        counted = counted_on_stages(self.model, counted_parameters(self.model, tp))
        norm = nn.utils.get_total_norm([self.reducer.gradient(p) for p in counted])
        if self.config.zero:
            norm = norm_over_ranks(norm, self.reducer.group)
        norm = norm_over_ranks(norm, tp)
        norm = norm_over_ranks(norm, self.mesh.get_group("pp"))
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.reducer.trained, self.config.grad_clip, norm)
        return norm

    @torch.inference_mode()
    def evaluate(self) -> float:
        """Loss per token over the first global batches of the held-out sequences."""
        config, validation = self.config, self.validation
        steps = min(config.eval_steps, len(validation.sequences) // config.global_batch_size)
        validation.consumed = 0
        batches = [batch for _ in range(steps) for batch in validation.next()]
        total = self.pipeline.evaluate(batches, micro_batch_loss)
        dist.all_reduce(total, group=self.reducer.group)
        return total.item() / (steps * config.global_batch_size * config.seq_len)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the whole model, or their gradients, given by name what this process has of them."""
        self.reducer.wait_for_weights()
        return self.pipeline.gather(full_tensors(self.model, tensors))


def train(config: Config) -> None:
    if config.dry_run:
        return dry_run.dry_run(config, Trainer)
    model_config = load_model_config(config)
    weights = full_weights(config, model_config)
    # Before this process has a device and others wait for it.
    corpus = prepare_corpus(config, model_config.vocab_size)
    trainer = Trainer(config, model_config, corpus.tokens, weights, corpus.tokenizer.eos_token_id)
    optimizer = trainer.optimizer

    with (
        survival.Run(trainer, model_config, corpus.tokenizer) as run,
        LedgerReport(config.ledger, trainer.mesh, config.traffic(trainer)) as ledger,
        observation.Observation(trainer, run.metrics) as observed,
    ):
        for step in run.steps():
            observed.start_step(step)
            lr = set_learning_rate(config, optimizer, step - 1)
            loss = trainer.forward_backward(trainer.batches.next())
            grad_norm = trainer.clip_grad_norm()
            if run.accepts(loss, grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            trainer.reducer.weights_changed()
            ledger.end_step()
            run.log(step, loss.item(), grad_norm.item(), lr)
            observed.end_step(step)
            if config.eval_every and step % config.eval_every == 0:
                run.log_evaluation(step, trainer.evaluate())

    if config.zero < 3:
        # Sharded weights have no replicas, and whole they may not fit.
        trainer.reducer.wait_for_weights()
        data_parallel.check_replicas(list(trainer.model.parameters()), trainer.reducer.group)
    if config.export_dir:
        state_dict = trainer.whole(dict(trainer.model.named_parameters()))
        export(state_dict, model_config, corpus.tokenizer, config.export_dir)
    trainer.pipeline.write_timeline()


def main() -> None:
    run(train, Config)


if __name__ == "__main__":
    main()
