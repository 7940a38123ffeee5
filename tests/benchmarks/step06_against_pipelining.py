"""pp = 2: step06's schedules against torch.distributed.pipelining's, and two ranks that do not talk at all.

    python tests/benchmarks/step06_against_pipelining.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. torch's stages have the same layers.
With --link the two ranks sit in network namespaces joined by a link of that speed (needs root and iproute2).
"""

import sys
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from two_ranks import (
    GLOBAL_BATCH,
    RANKS,
    ROOT,
    SEQ_LEN,
    alternate,
    main,
    make_trainer,
    optimizer_step,
    ratio,
    warm_up,
)

sys.path.append(str(ROOT / "step06_4d"))
import train as step06

from shared.data import Batch
from shared.timeline import bubble, simulate

MICRO_BATCH = 2
TOKENS, MICRO_BATCHES = GLOBAL_BATCH * SEQ_LEN, GLOBAL_BATCH // MICRO_BATCH
OPTIONS = {
    "alone": {},
    "1f1b": {},
    "interleaved": {"virtual_stages": 2},
    "zero-bubble": {"pp_schedule": "zero-bubble"},
    "torch 1f1b": {},
    "torch interleaved": {"virtual_stages": 2},
    "torch zero-bubble": {"virtual_stages": 2},
}


def micro_batches(shares):
    """This rank's micro-batches of a global batch that is cut into `shares`."""
    rows = torch.randint(8192, (GLOBAL_BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQ_LEN).expand(MICRO_BATCH, -1)
    mine = rows.chunk(shares)[dist.get_rank() % shares].split(MICRO_BATCH)
    return [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in mine]


class Stage(nn.Module):
    """torch's stages pass on what they return: with `lm_head` the last one's logits, else its hidden states."""

    def __init__(self, model, lm_head):
        super().__init__()
        self.model, self.lm_head = model.model, lm_head
        self.positions = torch.arange(SEQ_LEN).expand(MICRO_BATCH, -1)

    def forward(self, x):
        hidden = self.model(x, self.positions)
        return F.linear(hidden, self.lm_head.weight) if self.lm_head else hidden


def torch_forward_backward(variant, chunks, batches):
    # What splits a backward in two cannot split our loss, which has the gradients of the head when forward ends.
    splits = "zero-bubble" in variant

    def loss(output, labels):
        if splits:
            return F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum") / TOKENS
        return chunks[-1].lm_head.loss(output, labels) / TOKENS

    rank, stages = dist.get_rank(), RANKS * len(chunks)
    made = [
        PipelineStage(Stage(chunk, chunk.lm_head if splits else None), i * RANKS + rank, stages, torch.device("cpu"))
        for i, chunk in enumerate(chunks)
    ]
    if len(made) == 1:
        schedule = Schedule1F1B(made[0], MICRO_BATCHES, loss_fn=loss, scale_grads=False)
    else:
        made_by = ScheduleInterleavedZeroBubble if splits else ScheduleInterleaved1F1B
        schedule = made_by(made, MICRO_BATCHES, loss_fn=loss, scale_grads=False)
    ids, labels = (torch.cat(tensors) for tensors in list(zip(*batches, strict=True))[:2])
    return (lambda: schedule.step(ids)) if rank == 0 else (lambda: schedule.step(target=labels))


def make_step(variant, meshes):
    alone = variant == "alone"
    mesh, batches = meshes["alone" if alone else "pp"], micro_batches(RANKS if alone else 1)
    config = step06.Config(
        dp=1,
        pp=1 if alone else RANKS,
        seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH // (RANKS if alone else 1),
        micro_batch_size=MICRO_BATCH,
        **OPTIONS[variant],
    )
    trainer = make_trainer(step06, config, mesh)
    if variant.startswith("torch"):
        torch_step = torch_forward_backward(variant, trainer.pipeline.chunks, batches)

    def step():
        if variant.startswith("torch"):
            trainer.reducer.start(len(batches))
            torch_step()
            trainer.reducer.finish()
        else:
            trainer.forward_backward(batches)
        optimizer_step(trainer)
        return trainer

    return step


def worker(rounds):
    names = ("pp", "dp", "tp", "cp")
    meshes = {
        # A mesh of one rank each: all that step06 does but talk.
        "alone": init_device_mesh("cpu", (RANKS, 1, 1, 1, 1), mesh_dim_names=("rank", *names))[names],
        "pp": init_device_mesh("cpu", (RANKS, 1, 1, 1), mesh_dim_names=names),
    }
    steps, peaks, limits = {}, {}, {}
    for variant in OPTIONS:
        steps[variant], trainer, peaks[variant] = warm_up(lambda variant=variant: make_step(variant, meshes))
        pipeline, weights = trainer.pipeline, trainer.whole(dict(trainer.model.named_parameters()))
        if not variant.startswith("torch"):
            ideal = simulate([pipeline.schedule(stage, MICRO_BATCHES) for stage in range(pipeline.stages)])
            limits[variant] = f"{1 - bubble(ideal):.1%}"
        if variant == "1f1b":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        print(f"{'':18}{'tokens/s':>10}{'of two alone':>14}{'limit':>8}{'× torch':>9}  peak MiB of ranks")
        for variant in OPTIONS:
            rate = TOKENS / median(seconds[variant])
            share = ratio(seconds["alone"], seconds[variant])
            peer = f"torch {variant.removeprefix('torch ').replace('alone', '1f1b')}"
            memory = ", ".join(f"{peak / 2**20:.0f}" for peak in peaks[variant])
            speedup = ratio(seconds[peer], seconds[variant])
            print(
                f"{variant:18}{rate:10.0f}{share:14.1%}{limits.get(variant, ''):>8}{speedup:9.2f}  {memory}", flush=True
            )


if __name__ == "__main__":
    main(__doc__, worker)
