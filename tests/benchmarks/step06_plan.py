"""Seconds of a step that step06's planner predicts, next to those measured, of 12 layouts on two ranks.

    python tests/benchmarks/step06_plan.py [--rounds 2] [--link MBIT]

32M parameters. In every round, and before every layout, the machine is measured as `plan.py --calibrate` does. With
--link the two ranks sit in network namespaces joined by a link of that speed (needs root and iproute2).
"""

import gc
import importlib
import sys
from collections import defaultdict
from statistics import median

import torch
import torch.distributed as dist
from step06_against_torch import load
from two_ranks import MODEL, ROOT, SEQ_LEN, main, make_trainer, optimizer_step, timed

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
# Half of what the other benchmarks take: a dozen layouts are many.
OPTIONS = {"seq_len": SEQ_LEN, "global_batch_size": 8, "micro_batch_size": 2, "eval_every": 0, "dtype": "float32"}
# Timed steps of a layout in each round.
STEPS = 2
DEVICE = torch.device("cpu")


def planner(name):
    sys.path.insert(0, str(ROOT / "step06_4d"))
    try:
        return importlib.import_module(name)
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
    configs = {name: module.Config(**OPTIONS, **({"dp": 1} | layout)) for name, layout in LAYOUTS.items()}
    calibrate = planner("planning.calibrate")
    measured, numbers = defaultdict(list), defaultdict(list)
    for _ in range(rounds):
        for name, config in configs.items():
            for key, value in calibrate.measure(DEVICE, calibrate.LARGEST["cpu"]).items():
                numbers[key].append(value)
            # One layout at a time is in memory.
            step = make_step(module, config)
            step()
            measured[name] += [timed(step) for _ in range(STEPS)]
            del step
            gc.collect()
    if dist.get_rank() == 0:
        machine = {key: median(values) for key, values in numbers.items()}
        print(", ".join(f"{key} {value:.3g}" for key, value in machine.items()))
        report(configs, planner("planning.machines").Machine(**machine), measured)


def report(configs, machine, measured):
    """Predicted against the median of what was measured, with the largest parts of what is predicted."""
    model, errors, predicted = planner("planning.layout").Model.of(MODEL), [], {}
    measured = {name: median(seconds) for name, seconds in measured.items()}
    print(f"{'seconds':<24}{'predicted':>10}{'measured':>10}{'error':>8}  of it")
    for name, config in configs.items():
        layout = planner("planning.layout").Layout.of(config)
        stages = planner("pipeline.stages").split_layers(MODEL, SEQ_LEN, layout.pp * layout.virtual_stages)
        chunks = [[len(layers) for layers in stages[stage :: layout.pp]] for stage in range(layout.pp)]
        times = planner("planning.time").Times(model, layout, machine)
        parts = planner("planning.time").step_time(times, chunks, simulated=True)
        predicted[name] = parts.total
        errors.append(parts.total / measured[name] - 1)
        shown = ", ".join(f"{part} {value:.2f}" for part, value in parts._asdict().items() if value > 0.005)
        print(f"{name:<24}{parts.total:10.2f}{measured[name]:10.2f}{errors[-1]:+8.1%}  {shown}")
    print(f"median error {median(map(abs, errors)):.1%}, worst {max(map(abs, errors)):.1%}")
    best = sorted(predicted, key=predicted.get)[:2]
    print(f"fastest: {min(measured, key=measured.get)}; of the predicted best two: {', '.join(best)}")


if __name__ == "__main__":
    main(__doc__, worker)
