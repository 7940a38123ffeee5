"""--compile: step01, and step03 with `--tp 2`, against the same uncompiled, and against transformers compiled.

    python tests/benchmarks/compiled.py [--rounds 5]

The model and the batches of the default run, on two ranks of one thread each, in alternating rounds of one run. step01
and transformers train alone on each rank, in layers that are compiled one by one, as `--compile` does it. bfloat16 is
left out where the CPU does not multiply in it: matmuls of many times the seconds would hide all else.
"""

import sys
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from two_ranks import RANKS, ROOT, alternate, main, make_trainer, optimizer_step, ratio

sys.path.append(str(ROOT / "tests"))
from conftest import load_step
from step01_against_transformers import step01, theirs

from shared.data import Batch
from shared.llama_configs import load_model_config

VARIANTS = ("step01", "step01 --compile", "transformers, compiled", "step03 --tp 2", "step03 --tp 2 --compile")


def make_step(variant, module, mesh, dtype):
    config = module.Config(dtype=dtype, device="cpu", compile="--compile" in variant)
    model_config = load_model_config(config)
    rows = (config.global_batch_size, config.seq_len + 1)
    rows = torch.randint(model_config.vocab_size, rows, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(config.seq_len).expand(config.micro_batch_size, -1)
    batches = [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in rows.split(config.micro_batch_size)]
    if "transformers" in variant:
        model, _, step = theirs(config, model_config, batches)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        return step
    trainer = make_trainer(module, config, mesh, model_config)

    def step():
        loss = trainer.forward_backward(batches)
        optimizer_step(trainer)
        return loss.item()

    return step


def worker(rounds):
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    step03 = load_step("step03_tensor_parallel")
    tokens = step01.Config().global_batch_size * step01.Config().seq_len
    if dist.get_rank() == 0:
        print(f"{'':26}{'dtype':10}{'tokens/s':>10}{'× uncompiled':>16}{'× transformers':>16}")
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    for dtype in ("float32", "bfloat16")[: 1 + has_bfloat16]:
        steps = {name: make_step(name, step03 if "step03" in name else step01, mesh, dtype) for name in VARIANTS}
        losses = [[step() for step in steps.values()] for _ in range(2)]
        assert all(max(step) - min(step) < 2e-2 for step in losses), f"not the same model: {losses}"
        seconds = alternate(steps, rounds)
        if dist.get_rank() == 0:
            for name in VARIANTS:
                others = name.removesuffix(" --compile"), "transformers, compiled"
                shares = "".join(f"{ratio(seconds[other], seconds[name]):16.2f}" for other in others)
                print(f"{name:26}{dtype:10}{tokens / median(seconds[name]):10.0f}{shares}", flush=True)


if __name__ == "__main__":
    main(__doc__, worker)
