"""dp = 2: step06's sharding against torch's ZeroRedundancyOptimizer and FSDP2, and against two ranks that do not talk.

    python tests/benchmarks/step06_against_torch.py [--rounds 5] [--link MBIT]

Same model (32M parameters, step06's code for all), batches and threads, in alternating rounds of one run. gloo's
reduce-scatter moves what an all-reduce moves, so on CPUs only memory shows what sharding is for. With --link the two
ranks sit in network namespaces joined by a link of that speed (needs root and iproute2).
"""

import contextlib
import importlib
import sys
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
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
    warm_up,
)

TOKENS = GLOBAL_BATCH * SEQ_LEN
# Each with the one that it is compared to.
VARIANTS = {
    "alone": "step06",
    "step05": "step06",
    "step06": "DDP",
    "DDP": "DDP",
    "--zero 1": "DDP + ZeRO",
    "DDP + ZeRO": "DDP + ZeRO",
    "--zero 2": "FSDP2, no reshard",
    "FSDP2, no reshard": "FSDP2, no reshard",
    "--zero 3": "FSDP2",
    "FSDP2": "FSDP2",
}


def load(step):
    """The train.py of a step. Steps have files of the same names."""
    names = {path.stem for path in ROOT.glob("step*/*")}
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.path.insert(0, str(ROOT / step))
    try:
        return importlib.import_module("train")
    finally:
        sys.path.remove(str(ROOT / step))


class Loss(nn.Module):
    """DDP and FSDP2 want one module whose forward ends in the loss."""

    def __init__(self, module, config, model):
        super().__init__()
        self.module, self.config, self.model = module, config, model

    def forward(self, batch):
        return self.module.micro_batch_loss(self.config, self.model, batch)


def make_config(module, **options):
    return module.Config(
        seq_len=SEQ_LEN, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, eval_every=0, **options
    )


def make_step(module, mesh, options):
    """A step of ours, and what returns its weights."""
    trainer, batches = make_trainer(module, make_config(module, **options), mesh), micro_batches(RANKS)

    def step():
        trainer.forward_backward(batches)
        optimizer_step(trainer)
        if hasattr(trainer.reducer, "weights_changed"):
            trainer.reducer.weights_changed()

    def weights():
        if hasattr(trainer.reducer, "wait_for_weights"):
            trainer.reducer.wait_for_weights()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    return step, weights


def make_torch_step(module, mesh, variant):
    """The same model, its parallelism and optimizer from torch."""
    # Without the hooks of buckets.
    config = make_config(module, dp_engine="naive")
    model = make_trainer(module, config, mesh).model
    batches, loss = micro_batches(RANKS), Loss(module, config, model)
    names = [name for name, _ in model.named_parameters()]
    arguments = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    if "FSDP2" in variant:
        reshard = "no reshard" not in variant
        for layer in model.model.layers.values():
            fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=reshard)
        fully_shard(loss, mesh=mesh["dp"], reshard_after_forward=reshard)
    else:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    decayed = [
        {"params": [p for p in loss.parameters() if (p.ndim > 1) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    if "ZeRO" in variant:
        # Its own overlap would run the optimizer in DDP's hooks, before gradients can be clipped.
        optimizer = ZeroRedundancyOptimizer(
            decayed[0]["params"], torch.optim.AdamW, parameters_as_bucket_view=True, **arguments
        )
        optimizer.add_param_group(decayed[1])
    else:
        optimizer = torch.optim.AdamW(decayed, **arguments)

    def step():
        for batch in batches:
            reduces = batch is batches[-1] or "FSDP2" in variant
            with contextlib.nullcontext() if reduces else loss.no_sync():
                # Gradients are averaged, so each rank's loss is multiplied by their number.
                (loss(batch) * RANKS / TOKENS).backward()
        norm = nn.utils.get_total_norm([p.grad for p in loss.parameters()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(loss.parameters(), config.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()

    def weights():
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in loss.parameters()]
        return {name: p.detach().clone() for name, p in zip(names, whole, strict=True)}

    return step, weights


def worker(rounds):
    axes = ("pp", "dp", "cp", "tp")
    # A mesh of one rank each: all that step06 does but talk.
    alone = init_device_mesh("cpu", (RANKS, 1, 1, 1, 1), mesh_dim_names=("rank", *axes))[axes]
    mesh = init_device_mesh("cpu", (1, RANKS, 1, 1), mesh_dim_names=axes)
    steps, peaks, reference = {}, {}, None
    for variant in VARIANTS:
        made = {}

        def make(variant=variant, made=made):
            module = load("step05_context_parallel" if variant == "step05" else "step06_4d")
            if "DDP" in variant or "FSDP2" in variant:
                step, made["weights"] = make_torch_step(module, mesh, variant)
            else:
                options = {"zero": int(variant[-1])} if "zero" in variant else {}
                step, made["weights"] = make_step(module, alone if variant == "alone" else mesh, options)
            return step

        steps[variant], _, peak = warm_up(make)
        peaks[variant] = max(peak)
        weights = made["weights"]()
        if variant == "step05":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        print(f"{'':20}{'tokens/s':>10}{'of two alone':>14}{'peak MiB':>10}   × speed, × memory of")
        for variant, other in VARIANTS.items():
            rate = TOKENS / median(seconds[variant])
            share, speed = (ratio(seconds[name], seconds[variant]) for name in ("alone", other))
            compared = f"{speed:10.2f}{peaks[variant] / peaks[other]:10.2f}  {other}" if other != variant else ""
            print(f"{variant:20}{rate:10.0f}{share:14.1%}{peaks[variant] / 2**20:10.0f}{compared}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
