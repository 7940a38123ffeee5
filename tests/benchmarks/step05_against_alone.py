"""cp = 2: step05's engines against two ranks that train separately and do not talk, on whole sequences.

    python tests/benchmarks/step05_against_alone.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. With --link the two ranks sit in
network namespaces joined by a link of that speed (needs root and iproute2).
"""

import sys
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
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

sys.path.append(str(ROOT / "step05_context_parallel"))
import train as step05
from context_parallel import local_positions

from shared.data import Batch
from shared.distributed import make_mesh
from shared.ledger import Ledger

VARIANTS = {
    "alone": {},
    "all-gather": {"cp_engine": "all-gather"},
    "ring, zigzag": {},
    "ring, contiguous": {"cp_split": "contiguous"},
    "all-to-all": {"cp_engine": "all-to-all"},
}


def make_step(variant, meshes):
    mesh = meshes["alone" if variant == "alone" else "cp"]
    cp = mesh["cp"].size()
    config = step05.Config(
        seq_len=SEQ_LEN, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, cp=cp, **VARIANTS[variant]
    )
    positions = local_positions(config, mesh.get_local_rank("cp"))
    whole = micro_batches(RANKS if variant == "alone" else 1)
    batches = [Batch(*(tensor[:, positions] for tensor in batch)) for batch in whole]
    trainer = make_trainer(step05, config, mesh)

    def step():
        trainer.forward_backward(batches)
        optimizer_step(trainer)
        return trainer.model

    return step


def worker(rounds):
    sizes = {"pp": 1, "dp": 1, "cp": RANKS, "tp": 1}
    meshes = {
        # A mesh of one rank each: all that step05 does but talk.
        "alone": init_device_mesh("cpu", (RANKS, 1, 1, 1, 1), mesh_dim_names=("rank", *sizes))[tuple(sizes)],
        "cp": make_mesh("cpu", sizes, dict.fromkeys(sizes, "gloo")),
    }
    steps, peaks, sent = {}, {}, {}
    for variant in VARIANTS:
        steps[variant], model, peak = warm_up(lambda variant=variant: make_step(variant, meshes))
        peaks[variant] = max(peak)
        with Ledger() as ledger:
            steps[variant]()
        shown = ("all-gather", "reduce-scatter", "send", "all-to-all")
        kinds = {kind: traffic for (axis, kind), traffic in ledger.counts.items() if axis == "cp" and kind in shown}
        sent[variant] = ", ".join(f"{t.calls} {kind}s {t.bytes / 2**20:.0f} MiB" for kind, t in kinds.items())
        weights = model.state_dict()
        if variant == "all-gather":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")
    seconds = alternate(steps, rounds)
    if dist.get_rank() == 0:
        print(f"{'':18}{'tokens/s':>10}{'of two alone':>14}{'peak MiB':>10}")
        for variant in VARIANTS:
            rate = GLOBAL_BATCH * SEQ_LEN / median(seconds[variant])
            share = ratio(seconds["alone"], seconds[variant])
            print(f"{variant:18}{rate:10.0f}{share:14.1%}{peaks[variant] / 2**20:10.0f}  {sent[variant]}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
