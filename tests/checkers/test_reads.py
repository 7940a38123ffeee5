"""Reads of the device per optimizer step, of each step. Fewer are better: then lower the number here."""

import pytest
import torch
from ranks import run_ranks
from reads import reads
from running import instrumented, train

# The loss and the norm of a step that is reported, in one read.
READS = {
    "step01_single_gpu": 1,
    "step02_data_parallel": 1,
    "step03_tensor_parallel": 1,
    "step04_pipeline_parallel": 1,
    "step05_context_parallel": 1,
    "step06_4d": 1,
}
# With a checkpoint directory, all ranks agree before each step whether to go on.
READS_OF_A_RUN_THAT_CAN_BE_STOPPED = 2


def reads_of_a_step(step, args):
    """Of the second step, where all is in place: from one call of forward_backward to the next."""
    starts = []

    def note_start(original):
        def forward_backward(*args):
            starts.append(len(found))
            return original(*args)

        return forward_backward

    def leave_out_batches(trainer):
        """They are made of the CPU's own tensors."""
        original = trainer.batches.next

        def next_batches():
            before = len(found)
            batches = original()
            del found[before:]
            return batches

        trainer.batches.next = next_batches

    with reads() as found:
        train([*args, "--steps", "3"], step, forward_backward=note_start, **instrumented(leave_out_batches))
    return found[starts[1] : starts[2]]


@pytest.mark.parametrize("step", [*list(READS)[:-1], pytest.param("step06_4d", marks=pytest.mark.quick)])
def test_reads_of_a_step(small_run, step):
    (found,) = run_ranks(1, reads_of_a_step, step, small_run)
    assert len(found) == READS[step], found


@pytest.mark.parametrize("step", READS)
def test_a_step_that_is_not_reported_reads_nothing(small_run, step):
    (found,) = run_ranks(1, reads_of_a_step, step, [*small_run, "--log-every", "100"])
    assert found == []


def test_reads_of_a_run_that_can_be_stopped(small_run, tmp_path):
    (found,) = run_ranks(1, reads_of_a_step, "step06_4d", [*small_run, "--checkpoint-dir", str(tmp_path / "run")])
    assert len(found) == READS_OF_A_RUN_THAT_CAN_BE_STOPPED, found


@pytest.mark.quick
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: 1 if x[0] > 0 else 0,
        lambda x: [1, 2][x[0].long()],
        lambda x: f"{x[0]:.2f}",
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).repeat_interleave(x.long()),
        lambda x: torch.nn.utils.clip_grads_with_norm_([torch.nn.Parameter(x)], x.sum().item(), x.sum()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy(),
    ],
)
def test_each_is_found_once(read):
    with reads() as found:
        read(torch.ones(3))
    assert len(found) == 1


@pytest.mark.quick
def test_what_is_none():
    with reads() as found:
        x = torch.ones(3)
        x[torch.tensor([0, 2])] += x[torch.tensor([0, 2])].to(torch.float64)
        x.to("cpu", non_blocking=True)
        torch.where(x > 0, x, 0).sum()
    assert found == []
