"""Process groups: all are made by one helper, by all ranks, from a partition of all ranks."""

import sys
from itertools import chain
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT, load_step, make_trainer
from fake_ranks import run_fake_ranks

from shared import distributed

LAYOUTS = [
    ("step02_data_parallel", 4, "--micro-batch-size 2"),
    ("step03_tensor_parallel", 8, "--dp 2 --tp 4"),
    ("step04_pipeline_parallel", 6, "--pp 3 --tp 2 --num-hidden-layers 3 --tie-word-embeddings True"),
    ("step05_context_parallel", 4, "--dp 2 --cp 2 --micro-batch-size 2"),
    ("step05_context_parallel", 16, "--dp 2 --tp 2 --pp 2 --cp 2 --micro-batch-size 2"),
    ("step06_4d", 4, "--zero 3 --dp 2 --cp 2"),
    ("step06_4d", 16, "--zero 3 --dp 4 --cp 2 --tp 2 --shard 4 --micro-batch-size 2"),
    ("step06_4d", 3, "--pp 3 --virtual-stages 2 --num-hidden-layers 6 --global-batch-size 12 --micro-batch-size 2"),
    ("step06_4d", 16, "--dp 2 --tp 2 --pp 2 --cp 2 --sequence-parallel --zero 1 --micro-batch-size 2"),
]


def made(step, args):
    """Each call of the helper on this rank: partition, name, and the ranks of the group that it got."""
    calls, make_group = [], distributed.make_group

    def observed(partition, *args, **kwargs):
        group = make_group(partition, *args, **kwargs)
        calls.append((partition, args, dist.get_process_group_ranks(group) if group else [dist.get_rank()]))
        return group

    loaded = load_step(step)
    with pytest.MonkeyPatch.context() as patches:
        # Wherever the step's modules have it.
        for module in list(sys.modules.values()):
            if getattr(module, "make_group", None) is make_group:
                patches.setattr(module, "make_group", observed)
        trainer = make_trainer(loaded, args)
    axes = [dist.get_process_group_ranks(trainer.mesh.get_group(axis)) for axis in trainer.mesh.mesh_dim_names]
    return calls, axes


@pytest.mark.parametrize(
    ("step", "ranks", "layout"),
    [pytest.param(*layout, marks=pytest.mark.quick if layout[1] < 8 else ()) for layout in LAYOUTS],
)
def test_every_group_is_a_part_of_a_partition(small_run, step, ranks, layout):
    everyones = run_fake_ranks(ranks, step, made, step, [*small_run, *layout.split()])
    calls_of_first, _ = everyones[0]
    for rank, (calls, axes) in enumerate(everyones):
        # All ranks ask for the same groups in the same order: torch names them by count, and NCCL splits collectively.
        assert [call[:2] for call in calls] == [call[:2] for call in calls_of_first]
        for partition, _, group in calls:
            members = list(chain.from_iterable(partition))
            assert len(members) == len(set(members)) and set(members) <= set(range(ranks))
            # Who is left out is alone.
            assert group == next((sorted(part) for part in partition if rank in part), [rank])
        # The rank with these neighbours along an axis sees the same group as they do.
        for axis, group in enumerate(axes):
            assert rank in group and all(everyones[other][1][axis] == group for other in group)
    assert calls_of_first or step in ("step02_data_parallel", "step03_tensor_parallel")


def test_each_rank_gets_a_group_of_each_split(monkeypatch):
    """On NCCL, where ranks with other numbers of groups would close them in other orders (torch 2.13)."""
    splits = []

    def split(split_ranks, **options):
        splits.append(split_ranks)
        return SimpleNamespace(size=lambda: len(next(ranks for ranks in split_ranks if 3 in ranks)))

    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=0)))
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)
    monkeypatch.setattr(dist, "split_group", split)
    assert distributed.make_group([[0, 4], [2]], "pp", 9) is None
    assert distributed.make_group([[3, 1]], "pp", 9).size() == 2
    assert distributed.make_group([[3], [0]], "pp", 9) is None
    assert splits == [[[0, 4], [1], [2], [3]], [[3, 1], [0], [2], [4]]]


def test_no_other_code_makes_groups():
    sources = [
        path for path in chain(ROOT.glob("shared/*.py"), ROOT.glob("step*/**/*.py")) if "slurm" not in path.parts
    ]
    makers = [path.name for path in sources if "new_group(" in path.read_text() or "split_group(" in path.read_text()]
    assert makers == ["distributed.py"]
