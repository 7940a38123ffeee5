"""step06 --zero: the bytes that a rank holds between steps, at once and at the peak."""

import math

import pytest
from fake_ranks import run_fake_ranks
from test_step06_sharding import LEVELS, STEP, observed

from shared.live_bytes import LiveBytes


def nbytes(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def held_between_steps(args):
    """Bytes of weights, gradients and the optimizer's states when a step has begun, and the sizes of the units."""
    held = []

    def instrument(model, reducer, optimizer):
        def start(micro_batches, start=reducer.start):
            units, states = reducer.units, optimizer.state.values()
            moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
            # Masters in float32 are the shards themselves.
            masters = [unit.master for unit in units if unit.master is not unit.shard]
            held.append(
                (
                    nbytes(tensor for unit in units for tensor in (unit.flat, unit.shard)),
                    nbytes(tensor for unit in units for tensor in (unit.flat_gradient, unit.shard_gradient)),
                    nbytes(masters) + sum(moment.nbytes for moment in moments),
                )
            )
            start(micro_batches)

        reducer.start = start

    seen = observed([*args, "--steps", "2"], instrument)
    return held[-1], [sum(p.numel() for p in unit.range_of) for unit in seen["reducer"].units]


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "layout"), [(2, ""), (3, "--global-batch-size 24"), (4, "--dp 2 --cp 2 --shard 2")])
def test_what_a_rank_holds_between_steps(small_run, zero, dtype, ranks, layout):
    args = [*small_run, *layout.split(), "--dtype", dtype, "--zero", str(zero)]
    # Bytes per parameter. In bfloat16, the optimizer has a master of each weight beside its two moments.
    weight, gradient, states = (4, 4, 8) if dtype == "float32" else (2, 4, 12)
    shards = 2 if "--shard" in layout else ranks
    for held, sizes in run_fake_ranks(ranks, STEP, held_between_steps, args):
        # Each unit is padded to whole shards.
        part = sum(math.ceil(size / shards) for size in sizes)
        whole = part * shards
        # Of moments the padding has none.
        missing = whole - sum(sizes)
        weights, gradients, optimizer = held
        assert weights == weight * (part if zero == 3 else whole)
        assert gradients == gradient * (whole if zero == 1 else part)
        assert states * part - 8 * missing <= optimizer <= states * part


def most_at_once(args):
    """How many units have their weights, and how many their gradients, at the same time in a training step."""
    weights, gradients = [0], [0]

    def instrument(model, reducer, optimizer):
        def observe():
            weights.append(sum(unit.flat.untyped_storage().nbytes() > 0 for unit in reducer.units))
            gradients.append(sum(unit.flat_gradient is not None for unit in reducer.units))

        for unit in reducer.units:
            unit.gather = lambda gather=unit.gather: gather() or observe()
            unit.add = lambda *args, add=unit.add: add(*args) or observe()

    observed(args, instrument)
    return max(weights), max(gradients)


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("tied", [True, False])
def test_few_units_are_whole_at_once(small_run, zero, tied):
    sizes = f"--num-hidden-layers 6 --micro-batch-size 2 --steps 2 --tie-word-embeddings {tied} --zero {zero}"
    for weights, gradients in run_fake_ranks(2, STEP, most_at_once, [*small_run, *sizes.split()]):
        # One that computes and the next; one whose gradients grow and one whose are on their way. A tied embedding
        # is whole until its last gradient is there.
        units = 7 if tied else 8
        assert weights == (2 + tied if zero == 3 else units)
        assert gradients == (units if zero == 1 else 2)


def peak(args):
    """Bytes at the peak of the second step. No thread of gloo's lets go of a tensor late: nothing is sent."""
    found = []

    def instrument(model, reducer, optimizer):
        def start(micro_batches, start=reducer.start):
            memory.peak = memory.now
            start(micro_batches)

        changed = reducer.weights_changed
        reducer.start, reducer.weights_changed = start, lambda: found.append(memory.peak) or changed()

    with LiveBytes() as memory:
        observed(args, instrument)
    return found[-1]


def test_peak_of_each_layer_more(small_run):
    """The peak grows with the number of layers by what they hold, and without --zero by so many bytes more."""
    sizes = (
        "--hidden-size 64 --intermediate-size 128 --global-batch-size 4 --micro-batch-size 1 --steps 2 --eval-every 0"
    )
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64
    growth = []
    for zero in (0, 1, 2, 3):
        args = [*small_run, *sizes.split(), "--zero", str(zero)]
        few, many = (max(run_fake_ranks(2, STEP, peak, [*args, "--num-hidden-layers", n])) for n in ("4", "8"))
        growth.append((many - few) / 4 / layer)
    # Half of the moments; of the gradients; of the weights.
    assert [growth[0] - g for g in growth[1:]] == pytest.approx([4, 6, 8], abs=0.1)
