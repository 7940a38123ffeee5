"""tp = 2: step03 against torch's DTensor `parallelize_module` on the same model, and two ranks that do not talk at all.

    python tests/benchmarks/step03_against_dtensor.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. With --link the two ranks sit in
network namespaces joined by a link of that speed (needs root and iproute2).
"""

import sys
from collections import Counter
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
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

sys.path.append(str(ROOT / "step03_tensor_parallel"))
import train as step03
from tensor_parallel import full_tensors

from shared.model import LlamaForCausalLM
from shared.weights import full_weights, materialize

VARIANTS = ("alone", "step03", "no overlap", "naive", "DTensor", "DTensor, loss_parallel")
TOKENS = GLOBAL_BATCH * SEQ_LEN


def dtensor_model(mesh, parallel_loss):
    with torch.device("meta"):
        model = LlamaForCausalLM(MODEL)
    config = step03.Config()
    materialize(model, full_weights(config, MODEL), torch.float32, torch.device("cpu"))
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(
            output_layouts=Shard(-1) if parallel_loss else Replicate(), use_local_output=not parallel_loss
        ),
    }
    return parallelize_module(model, mesh["tp"], plan)


def dtensor_step(mesh, batches, parallel_loss):
    model = dtensor_model(mesh, parallel_loss)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    # One optimizer each: a fused step does not mix DTensors and tensors. Matrices are split, norms are whole.
    optimizers = [
        torch.optim.AdamW(part, lr=2e-3, betas=(0.9, 0.95), weight_decay=decay, fused=True)
        for part, decay in ((split, 0.1), (whole, 0.0))
    ]

    def forward_backward(batch):
        logits = model(batch.input_ids, batch.position_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / TOKENS
        loss.backward()

    def step():
        for batch in batches:
            if parallel_loss:
                with loss_parallel():
                    forward_backward(batch)
            else:
                forward_backward(batch)
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in (split, whole)]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for part in (split, whole):
            torch.nn.utils.clip_grads_with_norm_(part, 1.0, norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return model

    return step


def make_step(variant, meshes):
    mesh = meshes["alone" if variant == "alone" else "tp"]
    batches = micro_batches(RANKS if variant == "alone" else 1)
    if variant.startswith("DTensor"):
        return dtensor_step(mesh, batches, "loss" in variant)
    config = step03.Config(
        seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        tp_engine="naive" if variant == "naive" else "fan-out",
        tp_overlap=variant != "no overlap",
    )
    trainer = make_trainer(step03, config, mesh)

    def step():
        trainer.forward_backward(batches)
        optimizer_step(trainer)
        return trainer.model

    return step


class Collectives(TorchDispatchMode):
    """Calls and MiB of the collectives of more than 256 KiB, DTensor's own kind included, which the ledger refuses."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            # Which then runs, and what it sends comes by here.
            return NotImplemented
        kind = next((kind for kind in ("allreduce", "allgather") if kind in func._opname.replace("_", "")), None)
        alone = any(isinstance(a, torch.ScriptObject) and ProcessGroup.unbox(a).size() == 1 for a in args[1:2])
        if kind and "c10d" in func.namespace and not alone:
            payload = sum(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))
            if payload > 2**18:
                self.calls[kind] += 1
                self.bytes[kind] += payload
        return func(*args, **(kwargs or {}))

    def __str__(self):
        return ", ".join(f"{n} {kind} {self.bytes[kind] / 2**20:.0f} MiB" for kind, n in self.calls.items())


def weights(model):
    parameters = dict(model.named_parameters())
    if any(isinstance(p, DTensor) for p in parameters.values()):
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    return full_tensors(model, parameters)


def worker(rounds):
    meshes = {
        # A mesh of one rank each: all that step03 does but talk.
        "alone": init_device_mesh("cpu", (RANKS, 1, 1), mesh_dim_names=("rank", "dp", "tp"))["dp", "tp"],
        "tp": init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp")),
    }
    steps, peaks, traffic = {}, {}, {}
    for variant in VARIANTS:
        steps[variant], model, peak = warm_up(lambda variant=variant: make_step(variant, meshes))
        peaks[variant] = max(peak)
        with Collectives() as traffic[variant]:
            steps[variant]()
        if variant == "step03":
            reference = weights(model)
        elif variant != "alone":
            for name, weight in weights(model).items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        print(f"{'':24}{'tokens/s':>10}{'of two alone':>14}{'× DTensor':>11}{'peak MiB':>10}{'× DTensor':>11}")
        for variant in VARIANTS:
            rate = TOKENS / median(seconds[variant])
            share, speedup = (ratio(seconds[other], seconds[variant]) for other in ("alone", "DTensor"))
            memory = f"{peaks[variant] / 2**20:10.0f}{peaks[variant] / peaks['DTensor']:11.2f}"
            print(f"{variant:24}{rate:10.0f}{share:14.1%}{speedup:11.2f}{memory}  {traffic[variant]}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
