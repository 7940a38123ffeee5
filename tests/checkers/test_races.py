"""The checker of races: right on what is right, and on each of its rules broken once; then on pipelines of a CPU, and
on real steps with a race. The layouts are in test_layouts.py."""

import sys

import pytest
import torch
import torch.distributed as dist
from fake_ranks import Listening, fake_group
from layouts import listen, sizes
from races import Races


def races_of(function):
    """What the checker finds in a function of two tensors, on the first of two ranks."""
    races = Races()
    with fake_group(0, 2), Listening(races):
        function(torch.ones(8), torch.ones(4))
    return races.end()


def right(x, y):
    work = dist.all_reduce(x, async_op=True)
    y += 1
    work.wait()
    x += 1
    dist.all_reduce(x)


def sent_is_read(x, y):
    work = dist.isend(x, 1)
    y += x[:4]
    work.wait()


def received_next_to(x, y):
    """The halves of a tensor have different bytes."""
    work = dist.irecv(x[:4], 1)
    y += x[4:]
    work.wait()


def no_wait(x, y):
    dist.all_reduce(x, async_op=True)


def sent_is_written(x, y):
    work = dist.isend(x, 1)
    x[2:] += 1
    work.wait()


def received_is_read(x, y):
    work = dist.all_gather_single(x, y, async_op=True)
    x[:4] + y
    work.wait()


def received_twice(x, y):
    works = [dist.irecv(x, 1), dist.irecv(x[3:], 1)]
    for work in works:
        work.wait()


def memory_is_given_back(x, y):
    work = dist.all_reduce(x, async_op=True)
    x.untyped_storage().resize_(0)
    work.wait()


def strided(x, y):
    dist.isend(x[::2], 1).wait()


@pytest.mark.quick
@pytest.mark.parametrize("function", [right, sent_is_read, received_next_to])
def test_what_is_right(function):
    assert races_of(function) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_wait, "nothing waits for the all-reduce"),
        (sent_is_written, "add_ at ? writes what is sent by the send"),
        (received_is_read, "add at ? touches what is received by the all-gather"),
        (received_twice, "the receive at ? touches what is received by the receive"),
        (memory_is_given_back, "memory is given back before the end of the all-reduce"),
        (strided, "a tensor with strides (2,) is given to the send"),
    ],
)
def test_each_rule(function, message):
    assert [found for found in races_of(function) if found.startswith(message)]


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("step04_pipeline_parallel", "--pp 2 --micro-batch-size 1"),
        ("step06_4d", "--pp 2 --pp-schedule zero-bubble --micro-batch-size 1"),
        ("step06_4d", "--pp 2 --virtual-stages 2 --num-hidden-layers 4 --micro-batch-size 2"),
    ],
)
def test_pipelines_on_a_cpu_have_none(small_run, step, options):
    """Where receives are posted ahead: a message may arrive while a stage computes."""
    for heard in listen(step, 2, (*sizes(small_run), *options.split()), on_gpu=False):
        assert heard.races == []


def drops_a_wait(module, rank):
    """Tensor parallelism: backward goes on with its part of the gradient."""
    sum_over_ranks = module.tensor_parallel.sum_over_ranks
    module.tensor_parallel.sum_over_ranks = lambda *args, **kwargs: (sum_over_ranks(*args, **kwargs)[0], None)


def does_not_wait_for_buckets(module, rank):
    """Data parallelism: the optimizer reads a bucket that is still being summed."""

    def finish(reducer):
        while reducer.launched < len(reducer.buckets):
            reducer._launch()

    module.data_parallel.BucketedReducer.finish = finish


def has_one_buffer_for_all_messages(module, rank):
    """Pipeline: hidden states arrive where backward has still to read those of the micro-batch before."""
    channel = sys.modules["channels"].Channel
    start = channel.start

    def start_with_one(self, messages, new_buffer):
        buffer = new_buffer()
        start(self, messages, lambda: buffer.detach())

    channel.start = start_with_one


def does_not_wait_for_weights(module, rank):
    """Sharding: a layer computes with weights that are still being gathered."""
    unit = sys.modules["zero.unit"].Unit
    unit.wait = lambda self: (self.gather(), setattr(self, "gathering", None))


@pytest.mark.parametrize(
    ("step", "options", "change", "message"),
    [
        ("step03_tensor_parallel", "--tp 2", drops_a_wait, "nothing waits for the all-reduce"),
        ("step02_data_parallel", "", does_not_wait_for_buckets, "touches what is received by the all-reduce"),
        ("step04_pipeline_parallel", "--pp 2", has_one_buffer_for_all_messages, "is received by the receive"),
        ("step06_4d", "--zero 3", does_not_wait_for_weights, "touches what is received by the all-gather"),
    ],
)
def test_a_step_with_a_race_is_found(small_run, step, options, change, message):
    args = (*sizes(small_run), "--micro-batch-size", "2", *options.split())
    found = [race for heard in listen(step, 2, args, on_gpu=False, change=change) for race in heard.races]
    assert [race for race in found if message in race]
