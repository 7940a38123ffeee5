"""pp = 2: step04 against torch.distributed.pipelining on the same stages, and two ranks that do not talk at all.

    python tests/benchmarks/step04_against_pipelining.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. "even" gives each of torch's stages
half of the layers, as its tutorials do; otherwise they are step04's. With --link the two ranks sit in network
namespaces joined by a link of that speed (needs root and iproute2).
"""

import sys
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from two_ranks import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    MODEL,
    RANKS,
    ROOT,
    SEQ_LEN,
    alternate,
    main,
    make_trainer,
    micro_batches,
    optimizer_step,
    ratio,
    warm_up,
)

sys.path.append(str(ROOT / "step04_pipeline_parallel"))
import pipeline_parallel
import train as step04

TOKENS, MICRO_BATCHES = GLOBAL_BATCH * SEQ_LEN, GLOBAL_BATCH // MICRO_BATCH
TORCH = {"torch 1F1B": Schedule1F1B, "torch GPipe": ScheduleGPipe, "torch 1F1B, even": Schedule1F1B}
VARIANTS = ("alone", "step04 1f1b", "step04 afab", *TORCH)


class Stage(nn.Module):
    """torch's stages pass on what they return."""

    def __init__(self, model):
        super().__init__()
        self.model = model.model
        self.positions = torch.arange(SEQ_LEN).expand(MICRO_BATCH, -1)

    def forward(self, x):
        return self.model(x, self.positions)


def torch_forward_backward(kind, model, batches):
    def loss(hidden, labels):
        return model.lm_head.loss(hidden, labels) / TOKENS

    rank = dist.get_rank()
    stage = PipelineStage(Stage(model), rank, RANKS, torch.device("cpu"))
    schedule = kind(stage, MICRO_BATCHES, loss_fn=loss, scale_grads=False)
    ids, labels = (torch.cat(tensors) for tensors in list(zip(*batches, strict=True))[:2])
    if rank == 0:
        return lambda: schedule.step(ids)
    return lambda: schedule.step(target=labels)


def make_step(variant, meshes):
    mesh = meshes["alone" if variant == "alone" else "pp"]
    batches = micro_batches(RANKS if variant == "alone" else 1)
    config = step04.Config(
        seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        pp_schedule="afab" if "afab" in variant else "1f1b",
    )
    split = pipeline_parallel.split_layers
    if "even" in variant:
        half = MODEL.num_hidden_layers // 2
        pipeline_parallel.split_layers = lambda *args: [range(half), range(half, 2 * half)]
    trainer = make_trainer(step04, config, mesh)
    pipeline_parallel.split_layers = split
    if variant in TORCH:
        forward_backward = torch_forward_backward(TORCH[variant], trainer.model, batches)

    def step():
        if variant in TORCH:
            trainer.reducer.start(len(batches))
            forward_backward()
            trainer.reducer.finish()
        else:
            trainer.forward_backward(batches)
        optimizer_step(trainer)
        return trainer

    return step


def worker(rounds):
    names = ("pp", "dp", "tp")
    meshes = {
        # A mesh of one rank each: all that step04 does but talk.
        "alone": init_device_mesh("cpu", (RANKS, 1, 1, 1), mesh_dim_names=("rank", *names))[names],
        "pp": init_device_mesh("cpu", (RANKS, 1, 1), mesh_dim_names=names),
    }
    steps, peaks = {}, {}
    for variant in VARIANTS:
        steps[variant], trainer, peaks[variant] = warm_up(lambda variant=variant: make_step(variant, meshes))
        weights = trainer.whole(dict(trainer.model.named_parameters()))
        if variant == "step04 1f1b":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        limit = MICRO_BATCHES / (MICRO_BATCHES + RANKS - 1)
        print(f"the bubble leaves {limit:.1%} of two alone")
        print(f"{'':18}{'tokens/s':>10}{'of two alone':>14}{'of the limit':>14}{'× torch 1F1B':>14}  peak MiB of ranks")
        for variant in VARIANTS:
            rate = TOKENS / median(seconds[variant])
            share, speedup = (ratio(seconds[other], seconds[variant]) for other in ("alone", "torch 1F1B"))
            memory = ", ".join(f"{peak / 2**20:.0f}" for peak in peaks[variant])
            print(f"{variant:18}{rate:10.0f}{share:14.1%}{share / limit:14.1%}{speedup:14.2f}  {memory}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
