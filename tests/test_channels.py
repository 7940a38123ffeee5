"""Messages between the stages of a pipeline: when they are posted, and what is held for them."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import load_step
from ranks import run_ranks
from running import train

STEP = "step04_pipeline_parallel"


def _connected():
    """The channel from the first of two stages to the second."""
    load_step(STEP)
    from channels import Channel

    from shared.distributed import start_mesh

    mesh, device = start_mesh(SimpleNamespace(device="cpu", timeout=60, pp=None))
    return Channel(mesh, 1, device, 60)


def _release():
    """Whether a tensor that is sent still has its data when it is waited for, and afterwards."""
    channel, outgoing, bytes_of = _connected(), torch.ones(1000), []
    if dist.get_rank() == 0:
        channel.send(outgoing)
        work, storage = channel.sending, lambda: bytes_of.append(outgoing.untyped_storage().nbytes())
        channel.sending = SimpleNamespace(wait=lambda: (storage(), work.wait()))
        channel.release()
        storage()
    else:
        channel.start(1, lambda: torch.empty(1000))
        assert torch.equal(channel.receive(), torch.ones(1000))
    return bytes_of


@pytest.mark.quick
def test_data_is_freed_when_it_has_left_and_not_before():
    assert run_ranks(2, _release) == [[4000, 4], []]


def _ahead():
    """A message that has left before it is asked for."""
    channel = _connected()
    channel.start(dist.get_rank(), lambda: torch.zeros(1000))
    if dist.get_rank() == 0:
        channel.send(torch.ones(1000))
        channel.release()
    dist.barrier()
    return dist.get_rank() == 0 or torch.equal(channel.receive(), torch.ones(1000))


def test_on_a_cpu_messages_arrive_while_a_stage_computes():
    assert run_ranks(2, _ahead) == [True, True]


def posts_of_a_gpu(args, step):
    """Sends and receives as they are posted, and what is computed, where receives are posted as they are on a GPU."""
    order = []

    def pipeline(original):
        class Observed(original):
            def __init__(self, *args):
                super().__init__(*args)
                self.to_next.posts_ahead = self.to_previous.posts_ahead = False
                channels = sys.modules[type(self.to_next).__module__]
                start = channels._start

                def observed(operation, *args):
                    order.append("send" if operation is dist.isend else "receive")
                    return start(operation, *args)

                channels._start = observed

            def _recorded(self, action):
                order.append("compute")
                return super()._recorded(action)

        return Observed

    train([*args, "--steps", "2", "--eval-every", "1"], step, Pipeline=pipeline)
    return order


def check_posts(order):
    """A receive is posted when its message is due, after the send that is due then, with nothing launched between."""
    assert order.count("send") > 0 < order.count("receive")
    for before, after in itertools.pairwise(order):
        assert before != "receive" or after == "compute"
        assert after != "send" or before == "compute"


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("step04_pipeline_parallel", "--pp-schedule afab"),
        ("step04_pipeline_parallel", "--pp-schedule 1f1b"),
        ("step06_4d", "--virtual-stages 2"),
        ("step06_4d", "--pp-schedule zero-bubble"),
    ],
)
def test_on_a_gpu_a_receive_is_posted_when_its_message_is_due(small_run, step, options):
    """Or a kernel would be loaded while it runs, which may wait for its end."""
    sizes = "--pp 4 --num-hidden-layers 8 --micro-batch-size 1"
    for order in run_ranks(4, posts_of_a_gpu, [*small_run, *sizes.split(), *options.split()], step):
        check_posts(order)


def _around():
    """The first of two stages in a ring expects a message, sends two, and then gets its own."""
    load_step(STEP)
    from channels import Channel

    from shared.distributed import start_mesh

    mesh, device = start_mesh(SimpleNamespace(device="cpu", timeout=60, pp=None))
    rank = dist.get_rank()
    channel = Channel(mesh, 1, device, 60, ring=True)
    channel.start(1 if rank == 0 else 2, lambda: torch.empty(1))
    got = []
    for i in range(2):
        if rank == 0:
            channel.send(torch.tensor([float(i)]))
            channel.release()
        else:
            got.append(channel.receive().item())
            channel.expect()
    if rank == 1:
        channel.send(torch.tensor([7.0]))
        channel.release()
    return got or [channel.receive().item()]


def test_what_is_expected_does_not_hold_up_what_is_sent():
    assert run_ranks(2, _around) == [[7.0], [0.0, 1.0]]
