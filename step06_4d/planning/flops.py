"""FLOPs of a rank in a step, as a dry run counts them.

Of the engines, those that the planner looks at: linears with one sum for each fan-out, and the ring.
"""

from planning.layout import Layout, Model, Place, Sizes, linears


def flops(model: Model, layout: Layout, place: Place, layers: int) -> int:
    """Of the rank at a place, whose stage has so many layers in all its chunks. Executed ones: also of what is
    recomputed, and of the scores that a causal mask hides."""
    sizes = Sizes(model, layout, place.tp)
    t, full = sizes.tokens, layout.recompute == "full"
    numbers = {name: inputs * outputs for name, (inputs, outputs) in linears(sizes).items()}
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
