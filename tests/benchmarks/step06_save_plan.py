"""What planning a save takes at a run's scale: `python tests/benchmarks/step06_save_plan.py [CONFIG.yaml ...]`.

torch's planner decides which rank writes which box. Here it plans for all ranks of a configuration, as its rank 0 does.
No other rank exists, and no tensor has memory. A run plans at its first save, in the thread that writes.
"""

import math
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import ROOT
from planner import STEP, sibling, train
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from shared import distributed
from shared.config import parse
from shared.llama_configs import load_model_config
from shared.weights import any_weights

# Of each parameter, AdamW's with its weights.
KINDS = ("model", "exp_avg", "exp_avg_sq")


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def local_plans(config: Any) -> list[bytes]:
    """What each rank sends to rank 0, pickled."""
    step, model_config = train(), load_model_config(config)
    axes = {axis: getattr(config, axis) for axis in ("pp", "dp", "cp", "tp")}
    # Ranks of a stage that have the same part of its layers differ in what they train of it.
    plans, models = [], {}
    for rank in range(math.prod(axes.values())):
        with sibling("observe.dry_run").fake_rank(rank, **axes):
            mesh, _ = distributed.start_mesh()
            place = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
            if place not in models:
                models[place] = step.Trainer.build_model(SimpleNamespace(config=config, mesh=mesh), model_config)
            model = models[place]
            weights = step.tensor_parallel.shard_weights(model, any_weights(model_config))
            replicas = step.context_parallel.replicas(config, mesh)
            engine = step.sharded_optimizer.make_reducer
            with torch.device("meta"):
                reducer = engine(config, model, weights, torch.device("meta"), replicas, mesh)
            share = sibling("survive.boxes").own_boxes(model, reducer, share=True)
            state = {f"{kind}.{own.name}": own.of(own.trained.detach()) for own in share for kind in KINDS}
            planner = DefaultSavePlanner(enable_plan_caching=True)
            planner.set_up_planner(state, is_coordinator=rank == 0)
            plans.append(pickle.dumps(planner.create_local_plan()))
    return plans


def main(paths: list[str]) -> None:
    print(f"{'':30}{'ranks':>7}{'boxes':>9}{'MB sent':>9}{'MB held':>9}{'first':>9}{'later':>9}")
    for path in paths or sorted((ROOT / STEP / "configs").glob("*.yaml")):
        sent = local_plans(parse(train().Config, ["--config", str(path), "--device", "cpu"]))
        before, planner = resident(), DefaultSavePlanner(enable_plan_caching=True)
        plans, seconds = [pickle.loads(plan) for plan in sent], []
        for everyones in (plans, [SavePlan([], usable=False)] * len(sent)):
            start = time.perf_counter()
            planner.create_global_plan(everyones)
            seconds.append(time.perf_counter() - start)
        boxes, megabytes = sum(len(plan.items) for plan in plans), sum(map(len, sent)) / 1e6
        print(f"{Path(path).stem:30}{len(sent):7}{boxes:9,}{megabytes:9,.0f}{resident() - before:9,.0f}", end="")
        print("".join(f"{each:7.2f} s" for each in seconds), flush=True)
        for cache in (SavePlanner._cached_all_plans, SavePlanner._cached_global_plan, SavePlanner._cached_metadata):
            cache.clear()


if __name__ == "__main__":
    main(sys.argv[1:])
