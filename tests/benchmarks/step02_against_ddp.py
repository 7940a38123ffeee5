"""dp = 2: step02's engines against torch's DistributedDataParallel, and against two ranks that do not talk at all.

    python tests/benchmarks/step02_against_ddp.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. With --link the two ranks sit in
network namespaces joined by a link of that speed (needs root and iproute2): loopback hides what overlap is for.
"""

import contextlib
import sys
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from two_ranks import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    RANKS,
    ROOT,
    SEQ_LEN,
    alternate,
    main,
    make_trainer,
    micro_batches,
    optimizer_step,
    ratio,
    timed,
    warm_up,
)

sys.path.append(str(ROOT / "step02_data_parallel"))
import train as step02

VARIANTS = ("alone", "naive", "bucketed", "DDP")


class Loss(nn.Module):
    """DDP wants one module whose forward ends in the loss."""

    def __init__(self, config, model):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batch):
        return step02.micro_batch_loss(self.config, self.model, batch)


def make_step(variant, meshes, batches):
    config = step02.Config(
        seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        # DDP gets the engine that does nothing while backward runs.
        dp_engine="bucketed" if variant in ("alone", "bucketed") else "naive",
    )
    trainer = make_trainer(step02, config, meshes["alone" if variant == "alone" else "dp"])
    if variant == "DDP":
        loss_module = DistributedDataParallel(
            Loss(config, trainer.model), process_group=trainer.reducer.group, gradient_as_bucket_view=True
        )

    def ddp_forward_backward():
        for batch in batches:
            synchronized = contextlib.nullcontext() if batch is batches[-1] else loss_module.no_sync()
            with synchronized:
                # DDP averages, so each rank's loss is multiplied by their number.
                (loss_module(batch) * RANKS / (GLOBAL_BATCH * SEQ_LEN)).backward()

    def step():
        if variant == "DDP":
            ddp_forward_backward()
        else:
            trainer.forward_backward(batches)
        optimizer_step(trainer)
        return trainer.model

    return step


def worker(rounds):
    batches = micro_batches(RANKS)
    meshes = {
        # A mesh of one rank each: all that step02 does but talk.
        "alone": init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("rank", "dp"))["dp",],
        "dp": init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",)),
    }
    steps, peaks = {}, {}
    for variant in VARIANTS:
        steps[variant], model, peak = warm_up(lambda variant=variant: make_step(variant, meshes, batches))
        weights, peaks[variant] = model.state_dict(), max(peak)
        if variant == "naive":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")

    gradients = torch.zeros(sum(weight.numel() for weight in reference.values()))
    communication = median(timed(lambda: dist.all_reduce(gradients)) for _ in range(3))
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        print(f"one all-reduce of the gradients takes {communication * 1e3:.0f} ms when nothing else runs")
        print(f"{'':10}{'tokens/s':>10}{'of two alone':>14}{'× DDP':>8}{'hidden':>8}{'peak MiB':>10}{'× DDP':>8}")
        for variant in VARIANTS:
            rate = GLOBAL_BATCH * SEQ_LEN / median(seconds[variant])
            share, speedup = (ratio(seconds[other], seconds[variant]) for other in ("alone", "DDP"))
            exposed = median(b - a for a, b in zip(seconds["alone"], seconds[variant], strict=True))
            hidden = "" if variant == "alone" else f"{1 - exposed / communication:.0%}"
            memory = f"{peaks[variant] / 2**20:10.0f}{peaks[variant] / peaks['DDP']:8.2f}"
            print(f"{variant:10}{rate:10.0f}{share:14.1%}{speedup:8.2f}{hidden:>8}{memory}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
