"""What a rank computes and sends in a step: FLOPs, and bytes by axis and kind of call.

The same numbers as a dry run's, by formulas. Of the engines, those that the planner looks at: bucketed or sharded
gradients, linears with one sum for each fan-out, the ring.
"""

from collections.abc import Sequence
from itertools import chain

from planning.layout import Layout, Model, Place, Sizes, layer_parameters, units

# Split over tp: each rank has a part. Of the others each has the whole.
SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def flops(model: Model, layout: Layout, place: Place, chunks: Sequence[int]) -> int:
    """Executed ones: also of what is recomputed, and of the scores that a causal mask hides."""
    sizes = Sizes(model, layout, place.tp)
    t, layers, full = sizes.tokens, sum(chunks), layout.recompute == "full"
    numbers = {name: n for name, n in layer_parameters(sizes).items() if name in SPLIT}
    matmuls = 6 * t * sum(numbers.values())
    # Scores, and what they weigh; in backward five products instead of two.
    attention = 14 * layout.micro_batch_size * scores(layout, place.cp) * sizes.queries
    if full:
        # What the last linear returns, nobody needs again.
        matmuls += 2 * t * (sum(numbers.values()) - numbers["down_proj"])
        attention += attention * 4 // 14
    last = place.pp == layout.pp - 1
    head = last * 6 * t * sizes.vocabulary * model.hidden_size
    # The gradient of a norm's weight is a product with a vector.
    norms = 2 * (2 * layers + last) * sizes.own_tokens * model.hidden_size
    if model.head_norms:
        norms += 2 * layers * t * (sizes.queries + sizes.keys)
    return sizes.micro_batches * (layers * (matmuls + attention) + head + norms)


def scores(layout: Layout, rank: int) -> int:
    """Of a sequence and head: pairs of a query and a key in the blocks that a rank of cp computes."""
    own = layout.seq_len // layout.cp
    others = (layout.cp - 1) / 2 if layout.cp_split == "zigzag" else rank
    return int(own**2 * (1 + others))


def sent(model: Model, layout: Layout, place: Place, chunks: Sequence[int]) -> dict[tuple[str, str], int]:
    """Payload in bytes by axis and kind, as the ledger counts it: what a ring makes of it is `on_wire`."""
    sizes, layers = Sizes(model, layout, place.tp), sum(chunks)
    data, tensor = _data(sizes, place, layers), _tensor(sizes, place, layers)
    found = data | tensor | _pipeline(sizes, place, layers, len(chunks))
    if layout.cp > 1:
        hops = sizes.micro_batches * layers * (layout.cp - 1)
        passes = 2 + (layout.recompute == "full")
        nbytes = hops * 2 * sizes.tokens * sizes.keys * (passes * sizes.compute_bytes + sizes.sum_bytes)
        found |= {("cp", "send"): nbytes, ("cp", "receive"): nbytes}
    return found


def on_wire(kind: str, nbytes: int, size: int) -> float:
    """Bytes that each of `size` ranks sends for a payload, by a ring. What it receives is sent by another."""
    if kind == "send":
        return nbytes
    steps = {"all-reduce": 2 * (size - 1), "all-gather": size - 1, "reduce-scatter": size - 1}
    return nbytes * steps.get(kind, 0) / size


def _data(sizes: Sizes, place: Place, layers: int) -> dict[tuple[str, str], int]:
    layout, total = sizes.layout, sizes.sum_bytes
    groups = [sum(group) for group in units(sizes, place.pp, layers)]
    if not layout.zero:
        return {("dp", "all-reduce"): (sum(groups) + 1) * total}
    shards = sizes.shards
    # Shards of a unit have equally many numbers.
    whole = [-(-numbers // shards) * shards for numbers in groups]
    times = sizes.micro_batches if layout.zero > 1 else 1
    gathered = sum(whole)
    if layout.zero == 3:
        # Backward gathers all layers but the last once more.
        first = len(groups) - layers - (place.pp == layout.pp - 1 and not sizes.model.tie_word_embeddings)
        gathered = sizes.micro_batches * (gathered + sum(whole[first : first + layers - 1]))
    spread = shards < sizes.replicas
    axis = "shard" if spread else "dp"
    found = {
        (axis, "reduce-scatter"): times * sum(whole) * total,
        (axis, "all-gather"): gathered * sizes.param_bytes,
        ("dp", "all-reduce"): 2 * total,
    }
    if spread:
        found |= {
            ("dp", "all-reduce"): total,
            ("shard", "all-reduce"): total,
            ("replicas", "all-reduce"): sum(whole) // shards * total,
        }
    return found


def _tensor(sizes: Sizes, place: Place, layers: int) -> dict[tuple[str, str], int]:
    """Sums of hidden states around the split matrices, and some small ones."""
    layout, model, total = sizes.layout, sizes.model, sizes.sum_bytes
    m, split, full = sizes.micro_batches, layout.tp > 1, layout.recompute == "full"
    hidden = sizes.tokens * model.hidden_size
    first, last = place.pp == 0, place.pp == layout.pp - 1
    summed = (4 + full) * layers * hidden * sizes.compute_bytes
    summed += first * hidden * sizes.param_bytes + last * hidden * sizes.compute_bytes
    # Three numbers of each token's loss, and the gradients of key-value heads that ranks share.
    small = last * 3 * sizes.tokens * total
    if layout.tp > model.num_key_value_heads:
        shared = layer_parameters(sizes)
        small += layers * sum(n for name, n in shared.items() if name.startswith(("k_proj", "v_proj"))) * total
    alone = m * small + total + split * _partial(sizes, place, layers) * total
    if not layout.sequence_parallel or not split:
        return {("tp", "all-reduce"): m * split * summed + alone}
    again = (2 + full) * layers * hidden * sizes.compute_bytes
    return {
        ("tp", "reduce-scatter"): m * summed,
        ("tp", "all-gather"): m * (summed + again),
        ("tp", "all-reduce"): alone,
    }


def _partial(sizes: Sizes, place: Place, layers: int) -> int:
    """Numbers of a rank's gradients that are a sum over tp, though the weight is whole."""
    whole = ("q_norm", "k_norm")
    if sizes.layout.sequence_parallel:
        whole = [*(name for name in layer_parameters(sizes) if not name.startswith(SPLIT)), "norm"]
    return sum(n for name, n in _own(sizes, place, layers) if name in whole)


def _own(sizes: Sizes, place: Place, layers: int) -> list[tuple[str, int]]:
    """Of each parameter of a stage, the numbers that are in this rank's shard, if --zero cuts them."""
    names, last = [*layer_parameters(sizes)], place.pp == sizes.layout.pp - 1
    groups = units(sizes, place.pp, layers)
    has_embedding = place.pp == 0 or (last and sizes.model.tie_word_embeddings)
    named = [["embedding"]] * has_embedding + [names] * layers + [["head"]] * (len(groups) - layers - has_embedding)
    if last:
        named[layers - 1 + has_embedding] = [*names, "norm"]
    if not sizes.layout.zero:
        return list(zip(chain(*named), chain(*groups), strict=True))
    rank, found = (place.dp * sizes.layout.cp + place.cp) % sizes.shards, []
    for of_unit, group in zip(named, groups, strict=True):
        size = -(-sum(group) // sizes.shards)
        end = 0
        for name, numbers in zip(of_unit, group, strict=True):
            begin, end = end, end + numbers
            found.append((name, max(min(end, (rank + 1) * size) - max(begin, rank * size), 0)))
    return found


def _pipeline(sizes: Sizes, place: Place, layers: int, chunks: int) -> dict[tuple[str, str], int]:
    """Hidden states to the next stage and gradients back, the loss, the norm, and a tied embedding's gradient."""
    layout, total = sizes.layout, sizes.sum_bytes
    tied = sizes.model.tie_word_embeddings and layout.pp > 1
    ends = sum(n for name, n in _own(sizes, place, layers) if name == "embedding") if tied else 0
    found = {("pp", "all-reduce"): (2 + ends) * total}
    messages = sizes.micro_batches * (2 * chunks - (place.pp == 0) - (place.pp == layout.pp - 1))
    nbytes = messages * sizes.own_tokens * sizes.model.hidden_size * sizes.param_bytes
    return found | ({("pp", kind): nbytes for kind in ("send", "receive")} if messages else {})
