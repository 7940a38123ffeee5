"""The checker of orders: what its rules allow and forbid, by the smallest programs; then real steps that hang. The
layouts are in test_layouts.py."""

import sys

import pytest
import torch
import torch.distributed as dist
from fake_ranks import Listening, fake_group
from layouts import listen, sizes
from order import OutOfOrder, Trace, replay


def run(program):
    """Replay a function of the rank, the other one, and two communicators of both."""
    traces = []
    for rank in range(2):
        trace = Trace(rank)
        with fake_group(rank, 2), Listening(trace):
            program(rank, 1 - rank, *(dist.new_group([0, 1]) for _ in range(2)))
        traces.append(trace)
    replay(traces)


def start(*operations):
    """Messages as one kernel: dist.isend or dist.irecv, the other rank, and the communicator."""
    return dist.batch_isend_irecv(
        [dist.P2POp(operation, torch.ones(4), group=group, group_peer=other) for operation, other, group in operations]
    )


def end(works):
    for work in works:
        work.wait()


def receive_ahead(rank, other, there, back):
    """The first rank answers to what the second computes. That one posts its receive of the answer early."""
    if rank == 0:
        end(start((dist.irecv, other, there)))
        end(start((dist.isend, other, back)))
    else:
        receiving = start((dist.irecv, other, back))
        torch.ones(4).sin_()
        end(start((dist.isend, other, there)))
        end(receiving)


def receive_ahead_of_known_kernels(rank, *args):
    """The same, where all code has been loaded before: it may run next to the receive."""
    torch.ones(4).sin_()
    receive_ahead(rank, *args)


def receive_when_due(rank, other, there, back):
    if rank == 0:
        receive_ahead(rank, other, there, back)
    else:
        torch.ones(4).sin_()
        end(start((dist.isend, other, there)))
        end(start((dist.irecv, other, back)))


def exchange_one_by_one(rank, other, there, back):
    """Both send first. Neither send ends before the other rank receives, and the communicator is serial."""
    sending = start((dist.isend, other, there))
    end(sending + start((dist.irecv, other, there)))


def exchange_in_a_batch(rank, other, there, back):
    end(start((dist.isend, other, there), (dist.irecv, other, there)))


def exchange_on_two_communicators(rank, other, *groups):
    """A direction of travel on each, as pipelines here have them."""
    sending = start((dist.isend, other, groups[rank]))
    end(sending + start((dist.irecv, other, groups[other])))


def collectives_in_opposite_order(rank, other, *groups):
    """Of two communicators: on devices with room for two at a time, this would end."""
    works = [dist.all_reduce(torch.ones(4), group=groups[i], async_op=True) for i in (rank, other)]
    end(works)


def other_sizes(rank, *_):
    dist.all_reduce(torch.ones(4 + rank))


def one_rank_skips(rank, *_):
    if rank == 0:
        dist.all_reduce(torch.ones(4))


@pytest.mark.quick
@pytest.mark.parametrize(
    "program",
    [receive_ahead_of_known_kernels, receive_when_due, exchange_in_a_batch, exchange_on_two_communicators],
)
def test_what_ends(program):
    run(program)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (receive_ahead, r"rank 1: first launch of sin_ .*; running: receive with rank 0"),
        (exchange_one_by_one, r"rank 0: start of receive with rank 1 .*; running: send with rank 1"),
        (collectives_in_opposite_order, r"rank 0: start of all-reduce .*; running: all-reduce"),
        (one_rank_skips, r"rank 0: wait of all-reduce .*; running: all-reduce"),
        (other_sizes, r"rank 1 has all-reduce and 5 torch.float32 .*, where rank 0 has all-reduce and 4 "),
    ],
)
def test_what_does_not(program, message):
    with pytest.raises(OutOfOrder, match=message):
        run(program)


def waits_for_what_it_sends(module, rank):
    channel = sys.modules["channels"].Channel
    send = channel.send

    def blocking(self, tensor):
        send(self, tensor)
        self.sending.wait()

    channel.send = blocking


def first_rank_skips_the_loss(module, rank):
    if rank == 0:
        module.data_parallel.Reducer.sum = lambda self, value: value


def last_bucket_first_on_one_rank(module, rank):
    if rank == 1:
        make = module.data_parallel.make_reducer

        def reversed_buckets(*args):
            reducer = make(*args)
            reducer.buckets.reverse()
            return reducer

        module.data_parallel.make_reducer = reversed_buckets


@pytest.mark.parametrize(
    ("step", "options", "how", "message"),
    [
        # What each pipeline here did before receives were posted when they are due.
        ("step04_pipeline_parallel", "--pp 2", {"on_gpu": False}, "first launch of .*; running: receive with rank 1"),
        ("step06_4d", "--pp 2", {"on_gpu": False}, "first launch of .*; running: receive with rank 1"),
        ("step04_pipeline_parallel", "--pp 2", {"change": waits_for_what_it_sends}, "running: send with rank 1"),
        ("step02_data_parallel", "", {"change": first_rank_skips_the_loss}, "rank . has all-reduce and 1 "),
        ("step02_data_parallel", "--bucket-mib 0.01", {"change": last_bucket_first_on_one_rank}, "where rank . has"),
    ],
)
def test_a_step_that_hangs_is_found(small_run, step, options, how, message):
    args = (*sizes(small_run), "--micro-batch-size", "1", *options.split())
    with pytest.raises(OutOfOrder, match=message):
        replay([heard.trace for heard in listen(step, 2, args, **how)])
