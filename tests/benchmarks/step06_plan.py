"""Seconds of a step that step06's planner predicts, next to those measured, of 12 layouts on two ranks.

    python tests/benchmarks/step06_plan.py [--rounds 5] [--link MBIT]

32M parameters. The machine is measured in the same run: its matmuls, memory and all-reduces. With --link the two ranks
sit in network namespaces joined by a link of that speed (needs root and iproute2).
"""

import importlib
import sys
from statistics import median

import torch
import torch.distributed as dist
from step06_against_torch import load
from two_ranks import GLOBAL_BATCH, MICRO_BATCH, MODEL, ROOT, SEQ_LEN, alternate, main, make_trainer, optimizer_step

from shared.distributed import make_mesh

LAYOUTS = {
    "dp": {"dp": 2},
    "dp naive": {"dp": 2, "dp_engine": "naive"},
    "zero 1": {"dp": 2, "zero": 1},
    "zero 3": {"dp": 2, "zero": 3},
    "tp": {"tp": 2},
    "tp, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "tp naive": {"tp": 2, "tp_engine": "naive"},
    "pp": {"pp": 2},
    "pp, 2 virtual stages": {"pp": 2, "virtual_stages": 2},
    "pp, zero bubble": {"pp": 2, "pp_schedule": "zero-bubble"},
    "cp": {"cp": 2},
    "dp, recompute": {"dp": 2, "recompute": "full"},
}
DEVICE = torch.device("cpu")


def planner(name):
    sys.path.insert(0, str(ROOT / "step06_4d"))
    try:
        return importlib.import_module(f"planning.{name}")
    finally:
        sys.path.remove(str(ROOT / "step06_4d"))


def make_step(module, config):
    axes = {axis: getattr(config, axis) for axis in ("pp", "dp", "cp", "tp")}
    trainer = make_trainer(module, config, make_mesh("cpu", axes, dict.fromkeys(axes, "gloo")))
    batches = trainer.batches.next()

    def step():
        trainer.forward_backward(batches)
        optimizer_step(trainer)
        trainer.reducer.weights_changed()

    return step


def worker(rounds):
    module = load("step06_4d")
    options = {"seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH}
    configs = {
        name: module.Config(**options, eval_every=0, dtype="float32", **({"dp": 1} | layout))
        for name, layout in LAYOUTS.items()
    }
    # Both ranks at once, as they train.
    numbers = planner("calibrate").device_numbers(DEVICE) | planner("calibrate").link_numbers(DEVICE)
    machine = planner("machines").Machine(**numbers)
    steps = {name: make_step(module, config) for name, config in configs.items()}
    alternate(steps, 1)
    measured = {name: median(seconds) for name, seconds in alternate(steps, rounds).items()}
    if dist.get_rank() == 0:
        report(configs, machine, measured)


def report(configs, machine, measured):
    model, errors, predicted = planner("layout").Model.of(MODEL), [], {}
    for name, config in configs.items():
        layout = planner("layout").Layout.of(config)
        times = planner("time").Times(model, layout, machine)
        split = importlib.import_module("pipeline.stages").split_layers(
            MODEL, SEQ_LEN, layout.pp * layout.virtual_stages
        )
        chunks = [[len(layers) for layers in split[stage :: layout.pp]] for stage in range(layout.pp)]
        predicted[name] = planner("time").step_time(times, chunks, simulated=True).total
        errors.append(predicted[name] / measured[name] - 1)
        print(f"{name:<24}{predicted[name]:8.2f} s predicted{measured[name]:8.2f} s measured{errors[-1]:+8.1%}")
    print(f"median error {median(map(abs, errors)):.1%}, worst {max(map(abs, errors)):.1%}")
    best = sorted(predicted, key=predicted.get)[:2]
    print(f"fastest: {min(measured, key=measured.get)}; of the predicted best two: {', '.join(best)}")


if __name__ == "__main__":
    main(__doc__, worker)
