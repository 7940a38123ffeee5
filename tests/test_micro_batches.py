"""How many micro-batches a rank has of a global batch: what it announces is what it delivers."""

from types import SimpleNamespace

import numpy as np
import pytest

from shared.data import GlobalBatches, Sequences


@pytest.mark.quick
@pytest.mark.parametrize(
    ("global_batch_size", "size", "micro_batch_size", "expected"),
    [(8, 1, 8, 1), (8, 1, 2, 4), (8, 2, 4, 1), (8, 2, 1, 4), (24, 3, 2, 4)],
)
def test_micro_batches_of_a_rank(global_batch_size, size, micro_batch_size, expected):
    config = SimpleNamespace(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, seed=0)
    for rank in range(size):
        batches = GlobalBatches(Sequences(np.arange(1001), 10), config, rank, size)
        assert batches.micro_batches == expected and batches.tokens == 10 * micro_batch_size
        micro_batches = batches.next()
        assert len(micro_batches) == expected
        assert all(tensor.shape == (micro_batch_size, 10) for batch in micro_batches for tensor in batch)
