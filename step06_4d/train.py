"""Train a Llama-like model."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import context_parallel
import documents
import layers
import torch
import torch.distributed as dist
from bad_steps import BadSteps, BadStepsConfig, bad_steps_traffic
from checkpoint import CheckpointConfig, Checkpoints
from data_parallel import DataParallel, DataParallelConfig, check_replicas
from dry_run import Audit, DryRunConfig, fake_rank, fake_sequences, fake_weights
from garbage import GarbageConfig, collected
from heartbeat import Heartbeat, HeartbeatConfig
from phases import Phases, PhasesConfig
from pipeline_parallel import Pipeline, PipelineParallelConfig, apply_pipeline_parallel, counted_on_stages
from sequence_parallel import (
    SequenceParallelConfig,
    apply_sequence_parallel,
    sequence_parallel_traffic,
    sum_norm_gradients,
)
from sharded_optimizer import ShardedOptimizerConfig, gradient_traffic, make_gradients
from stopping import Stopping, stopping_traffic
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from traces import TracesConfig, traced
from transformers import LlamaConfig

from shared.config import BaseConfig, run
from shared.corpus import prepare_corpus
from shared.data import Batch, GlobalBatches, split_corpus
from shared.distributed import start_mesh
from shared.ledger import LedgerReport, Traffic
from shared.llama_configs import load_model_config
from shared.metrics import Metrics
from shared.model import LlamaForCausalLM
from shared.optim import make_optimizer, set_learning_rate
from shared.weights import export, full_weights


@dataclass
class Config(
    DryRunConfig,
    HeartbeatConfig,
    CheckpointConfig,
    TracesConfig,
    PhasesConfig,
    GarbageConfig,
    BadStepsConfig,
    documents.Config,
    layers.Config,
    ShardedOptimizerConfig,
    SequenceParallelConfig,
    context_parallel.Config,
    PipelineParallelConfig,
    TensorParallelConfig,
    DataParallelConfig,
    BaseConfig,
):
    """Train a Llama-like model."""


def setup(config: Config) -> tuple[DeviceMesh, torch.device]:
    """What this process trains on."""
    return start_mesh(config, pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp)


def build_model(config: Config, model_config: LlamaConfig, device: torch.device, mesh: DeviceMesh) -> LlamaForCausalLM:
    """The model of this rank, without memory: `make_gradients` gives it weights, so that only what is kept is ever
    allocated."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
        apply_tensor_parallel(model, mesh.get_group("tp"), config.tp_overlap)
        apply_sequence_parallel(model, config)
        apply_pipeline_parallel(model, config, mesh)
        context_parallel.apply(model, config, mesh)
        documents.apply(model, config, mesh)
    layers.apply(model, config)
    return model


def build_optimizer(config: Config, gradients: DataParallel) -> torch.optim.Optimizer:
    return make_optimizer(config, gradients.trained)


def micro_batch_loss(config: Config, model: LlamaForCausalLM, batch: Batch, hidden: Tensor | None) -> Tensor:
    """Cross entropy summed over the tokens of a micro-batch. Before the last stage: hidden states for the next one."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        batch = batch if hidden is None else batch._replace(input_ids=hidden)
        hidden = model.model(batch.input_ids, batch.position_ids, *documents.blocks(batch))
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
    gradients.start(len(batches))
    total = pipeline.run(batches, micro_batch_loss, tokens, gradients)
    gradients.finish()
    sum_norm_gradients(config, model, gradients)
    pipeline.sum_tied_gradients(gradients)
    dist.all_reduce(total, group=gradients.group)
    return total


def clip_grad_norm(config: Config, model: nn.Module, mesh: DeviceMesh, gradients: DataParallel) -> Tensor:
    """Scale the gradients down to the largest norm allowed. Returns their norm before that."""
    tp = mesh.get_group("tp")
    counted = counted_on_stages(model, counted_parameters(model, tp))
    norm = nn.utils.get_total_norm([gradients.gradient(p) for p in counted])
    if config.zero:
        norm = norm_over_ranks(norm, gradients.group)
    norm = norm_over_ranks(norm, tp)
    norm = norm_over_ranks(norm, mesh.get_group("pp"))
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(gradients.trained, config.grad_clip, norm)
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


def traffic(
    config: Config, model: LlamaForCausalLM, gradients: DataParallel, pipeline: Pipeline, batches: GlobalBatches
) -> dict[tuple[str, str], Traffic]:
    """What a training step sends, by the formulas of all axes."""
    return {
        **gradient_traffic(gradients, batches.micro_batches),
        **tensor_parallel_traffic(config, model, batches),
        **sequence_parallel_traffic(config, model, gradients, batches),
        **pipeline.traffic(gradients, batches),
        **config.traffic(SimpleNamespace(model=model, batches=batches)),
    }


def audited_step(config: Config, model_config: LlamaConfig, mesh: DeviceMesh) -> str:
    """A training step on fake tensors, and what it holds, computes and sends."""
    cpu, rank, size = torch.device("cpu"), mesh.get_local_rank("dp"), mesh["dp"].size()
    model, replicas = build_model(config, model_config, cpu, mesh), context_parallel.replicas(config, mesh)
    with FakeTensorMode(), Audit(mesh) as audit:
        positions = context_parallel.local_positions(config, mesh.get_local_rank("cp"))
        batches = context_parallel.SplitBatches(fake_sequences(config), config, rank, size, positions)
        gradients = make_gradients(config, model, shard_weights(model, fake_weights(model_config)), cpu, replicas)
        optimizer, pipeline = build_optimizer(config, gradients), Pipeline(config, model, mesh)
        # The first step makes states that the second finds.
        for _ in range(2):
            audit.begin_step()
            forward_backward(config, model, batches.next(), gradients, pipeline)
            clip_grad_norm(config, model, mesh, gradients)
            optimizer.step()
            optimizer.zero_grad()
            gradients.weights_changed()
    return audit.report(model, optimizer, traffic(config, model, gradients, pipeline, batches))


def dry_run(config: Config) -> None:
    """Print what the first and the last rank of the layout would hold, compute and send."""
    model_config = load_model_config(config)
    axes = {"pp": config.pp, "dp": config.dp, "cp": config.cp, "tp": config.tp}
    # A sequence that is one document is what costs most.
    config = dataclasses.replace(config, mask_documents=False, compile=False)
    for rank in sorted({0, math.prod(axes.values()) - 1}):
        with fake_rank(rank, **axes) as mesh:
            print(audited_step(config, model_config, mesh), flush=True)


def train(config: Config) -> None:
    if config.dry_run:
        return dry_run(config)
    mesh, device = setup(config)
    model_config = load_model_config(config)
    weights = full_weights(config, model_config)
    corpus = prepare_corpus(config, model_config.vocab_size)
    train_sequences, validation_sequences = split_corpus(corpus.tokens, config)
    # This process's share of each global batch.
    rank, size = mesh.get_local_rank("dp"), mesh["dp"].size()
    eos = corpus.tokenizer.eos_token_id
    make_batches = documents.make_batches(config, mesh, eos)
    positions = context_parallel.local_positions(config, mesh.get_local_rank("cp"))
    batches = make_batches(train_sequences, config, rank, size, positions)
    validation = make_batches(validation_sequences, config, rank, size, positions)
    model = build_model(config, model_config, device, mesh)
    gradients = make_gradients(
        config, model, shard_weights(model, weights), device, context_parallel.replicas(config, mesh)
    )
    optimizer = build_optimizer(config, gradients)
    pipeline = Pipeline(config, model, mesh)

    expected_traffic = traffic(config, model, gradients, pipeline, batches)
    expected_traffic |= bad_steps_traffic(config, mesh, expected_traffic)
    expected_traffic |= stopping_traffic(config, mesh, expected_traffic)
    ledger = LedgerReport(config.ledger, mesh, expected_traffic)
    phases = Phases(config, device, batches, pipeline, optimizer)
    bad_steps = BadSteps(config, batches)
    checkpoints = Checkpoints(config, model, gradients, optimizer, batches, bad_steps, corpus.tokenizer)
    start = checkpoints.load()
    stopping = Stopping(config, device)
    with (
        stopping,
        Heartbeat(config, mesh) as heartbeat,
        Metrics(config, model_config, device, start) as metrics,
        ledger,
        phases,
        checkpoints,
        collected(config) as collect_garbage,
        traced(config, metrics) as trace_step,
    ):
        for step in range(start + 1, config.steps + 1):
            trace_step()
            heartbeat.step = step
            phases.start_step(step)
            lr = set_learning_rate(config, optimizer, step - 1)
            loss = forward_backward(config, model, batches.next(), gradients, pipeline)
            grad_norm = clip_grad_norm(config, model, mesh, gradients)
            if bad_steps.accepts(loss, grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            gradients.weights_changed()
            bad_steps.log(metrics, step, loss.item(), grad_norm.item(), lr)
            collect_garbage(step)
            phases.end_step(step, metrics)
            if config.eval_every and step % config.eval_every == 0:
                metrics.log_evaluation(step, evaluate(config, model, validation, gradients, pipeline))
            stop = stopping.agreed(step)
            ledger.end_step()
            checkpoints.maybe_save(step)
            if stop:
                checkpoints.save(step)
                break

    if config.zero < 3 or config.export_dir:
        gradients.wait_for_weights()
    if stopping.stops:
        stopping.leave(saved=checkpoints.saved_step > 0)
    if config.zero < 3:
        # Sharded weights have no replicas, and whole they may not fit.
        check_replicas(list(model.parameters()), gradients.group)
    if config.export_dir:
        state_dict = pipeline.gather(full_tensors(model, dict(model.named_parameters())))
        export(state_dict, model_config, corpus.tokenizer, config.export_dir)
    pipeline.write_timeline()


def main() -> None:
    run(train, Config)


if __name__ == "__main__":
    main()
