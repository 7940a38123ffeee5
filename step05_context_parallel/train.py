"""Train a Llama-like model."""

from dataclasses import dataclass
from types import SimpleNamespace

import context_parallel
import torch
import torch.distributed as dist
from data_parallel import DataParallel, DataParallelConfig, check_replicas, data_parallel_traffic, make_data_parallel
from pipeline_parallel import Pipeline, PipelineParallelConfig, apply_pipeline_parallel, counted_on_stages
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
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig

from shared.config import BaseConfig, run
from shared.corpus import prepare_corpus
from shared.data import Batch, GlobalBatches, split_corpus
from shared.distributed import start_mesh
from shared.ledger import LedgerReport
from shared.llama_configs import load_model_config
from shared.metrics import Metrics
from shared.model import LlamaForCausalLM
from shared.optim import make_optimizer, set_learning_rate
from shared.weights import Weights, export, full_weights, materialize


@dataclass
class Config(context_parallel.Config, PipelineParallelConfig, TensorParallelConfig, DataParallelConfig, BaseConfig):
    """Train a Llama-like model."""


def setup(config: Config) -> tuple[DeviceMesh, torch.device]:
    """What this process trains on."""
    return start_mesh(config, pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp)


def build_model(
    config: Config,
    model_config: LlamaConfig,
    weights: Weights,
    device: torch.device,
    mesh: DeviceMesh,
) -> LlamaForCausalLM:
    """The model with its initial weights. Built without memory first, so that only what is kept is ever allocated."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
        apply_tensor_parallel(model, mesh.get_group("tp"), config.tp_overlap)
        apply_pipeline_parallel(model, config.seq_len, mesh.get_group("pp"))
        context_parallel.apply(model, config, mesh)
    materialize(model, shard_weights(model, weights), config.param_dtype, device)
    if config.compile:
        for layer in model.model.layers.values():
            layer.compile(dynamic=False)
    return model


def build_optimizer(config: Config, model: LlamaForCausalLM) -> torch.optim.Optimizer:
    return make_optimizer(config, list(model.parameters()))


def micro_batch_loss(config: Config, model: LlamaForCausalLM, batch: Batch, hidden: Tensor | None) -> Tensor:
    """Cross entropy summed over the tokens of a micro-batch. Before the last stage: hidden states for the next one."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        hidden = model.model(batch.input_ids if hidden is None else hidden, batch.position_ids)
        return model.lm_head.loss(hidden, batch.labels) if model.lm_head else hidden


def forward_backward(
    config: Config,
    model: LlamaForCausalLM,
    batches: list[Batch],
    gradients: DataParallel,
    pipeline: Pipeline,
) -> Tensor:
    """Accumulate the gradients of a step over its micro-batches. Returns the loss, in nats per token."""
    # Divided by the tokens of the global batch before backward: gradients need no scaling, however it is split.
    tokens = config.global_batch_size * config.seq_len
    gradients.start()
    total = pipeline.run(batches, micro_batch_loss, tokens, gradients.reduce_in_next_backward)
    gradients.finish()
    pipeline.sum_tied_gradients()
    dist.all_reduce(total, group=gradients.group)
    return total


def clip_grad_norm(config: Config, model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """Scale the gradients down to the largest norm allowed. Returns their norm before that."""
    tp = mesh.get_group("tp")
    norm = nn.utils.get_total_norm([p.grad for p in counted_on_stages(model, counted_parameters(model, tp))])
    norm = norm_over_ranks(norm, tp)
    norm = norm_over_ranks(norm, mesh.get_group("pp"))
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    return norm


@torch.inference_mode()
def evaluate(
    config: Config,
    model: LlamaForCausalLM,
    validation: GlobalBatches,
    gradients: DataParallel,
    pipeline: Pipeline,
) -> float:
    """Loss per token over the first global batches of the held-out sequences."""
    steps = min(config.eval_steps, len(validation.sequences) // config.global_batch_size)
    validation.consumed = 0
    batches = [batch for _ in range(steps) for batch in validation.next()]
    total = pipeline.evaluate(batches, micro_batch_loss)
    dist.all_reduce(total, group=gradients.group)
    return total.item() / (steps * config.global_batch_size * config.seq_len)


def train(config: Config) -> None:
    mesh, device = setup(config)
    model_config = load_model_config(config)
    weights = full_weights(config, model_config)
    corpus = prepare_corpus(config, model_config.vocab_size)
    train_sequences, validation_sequences = split_corpus(corpus.tokens, config)
    # This process's share of each global batch.
    rank, size = mesh.get_local_rank("dp"), mesh["dp"].size()
    positions = context_parallel.local_positions(config, mesh.get_local_rank("cp"))
    batches = context_parallel.SplitBatches(train_sequences, config, rank, size, positions)
    validation = context_parallel.SplitBatches(validation_sequences, config, rank, size, positions)
    model = build_model(config, model_config, weights, device, mesh)
    gradients = make_data_parallel(config, list(model.parameters()), context_parallel.replicas(config, mesh))
    optimizer = build_optimizer(config, model)
    pipeline = Pipeline(config, model, mesh)

    expected_traffic = {
        **data_parallel_traffic(gradients),
        **tensor_parallel_traffic(config, model, batches),
        **pipeline.traffic(batches),
        **config.traffic(SimpleNamespace(model=model, batches=batches)),
    }
    ledger = LedgerReport(config.ledger, mesh, expected_traffic)
    with Metrics(config, model_config, device) as metrics, ledger:
        for step in range(1, config.steps + 1):
            lr = set_learning_rate(config, optimizer, step - 1)
            loss = forward_backward(config, model, batches.next(), gradients, pipeline)
            grad_norm = clip_grad_norm(config, model, mesh)
            optimizer.step()
            optimizer.zero_grad()
            ledger.end_step()
            metrics.log(step, loss.item(), grad_norm.item(), lr)
            if config.eval_every and step % config.eval_every == 0:
                metrics.log_evaluation(step, evaluate(config, model, validation, gradients, pipeline))

    check_replicas(list(model.parameters()), gradients.group)
    if config.export_dir:
        state_dict = pipeline.gather(full_tensors(model, dict(model.named_parameters())))
        export(state_dict, model_config, corpus.tokenizer, config.export_dir)
    pipeline.write_timeline()


def main() -> None:
    run(train, Config)


if __name__ == "__main__":
    main()
