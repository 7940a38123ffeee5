"""Bytes that a rank sends in a step. A test holds them to the formulas of the axes, which are held to what is sent.

Each call counts with its payload, as shared/ledger.py has it.
"""

from collections import Counter

from planning.layout import Layout, Place, Sizes, layer_parameters, units
from planning.states import in_shard

# Of a kind of collective, how many.
Calls = dict[str, int]


def sums_of_layer(layout: Layout) -> tuple[Calls, Calls, Calls]:
    """Collectives of (b, s, h) that tensor parallelism makes in a layer: in forward, in backward, and where backward
    recomputes the layer. Nobody needs the last sum of a forward that is recomputed."""
    naive = layout.tp_engine == "naive"
    # The five linears that read hidden states sum their gradients apart, or in two fan-outs.
    reads = 5 if naive else 2
    if layout.tp == 1:
        return {}, {}, {}
    if not layout.sequence_parallel:
        return {"all-reduce": 2}, {"all-reduce": reads}, {"all-reduce": 1}
    # Naive linears keep what they have gathered; a fan-out gathers it anew.
    again = 0 if naive else 2
    return (
        {"all-gather": reads, "reduce-scatter": 2},
        {"all-gather": 2 + again, "reduce-scatter": reads},
        {"all-gather": reads, "reduce-scatter": 1},
    )


def keys_and_values(sizes: Sizes) -> int:
    """Numbers that a rank has of a layer's, for a micro-batch."""
    return 2 * sizes.tokens * sizes.keys


def padded(numbers: int, parts: int) -> int:
    """What a unit of so many numbers moves, for shards are equal."""
    return -(-numbers // parts) * parts


def traffic(sizes: Sizes, place: Place, layers: int) -> dict[tuple[str, str], int]:
    """Bytes by axis and kind, of the rank at a place, whose stage has so many layers in all its chunks."""
    sent: Counter[tuple[str, str]] = Counter()
    _data(sent, sizes, place, layers)
    _tensor(sent, sizes, place, layers)
    _context(sent, sizes, layers)
    _pipeline(sent, sizes, place, layers)
    return {key: nbytes for key, nbytes in sent.items() if nbytes}


def _data(sent: Counter, sizes: Sizes, place: Place, layers: int) -> None:
    layout, total, shards = sizes.layout, sizes.sum_bytes, sizes.shards
    numbers = [sum(unit) for unit in units(sizes, place.pp, layers)]
    sent["dp", "all-reduce"] += total
    if not layout.zero:
        sent["dp", "all-reduce"] += sum(numbers) * total
        return
    m, moved = sizes.micro_batches, [padded(n, shards) for n in numbers]
    replicated = shards < sizes.replicas
    axis = "shard" if replicated else "dp"
    sent[axis, "all-reduce"] += total
    sent[axis, "reduce-scatter"] += sum(moved) * total * (m if layout.zero > 1 else 1)
    gathered = sum(moved)
    if layout.zero == 3:
        # All but the last layer, and the head, are gathered again in backward. There is no pipeline.
        gathered = m * (gathered + sum(moved[1:layers]))
    sent[axis, "all-gather"] += gathered * sizes.param_bytes
    if replicated:
        sent["replicas", "all-reduce"] += sum(moved) // shards * total


def _tensor(sent: Counter, sizes: Sizes, place: Place, layers: int) -> None:
    layout, model, m = sizes.layout, sizes.model, sizes.micro_batches
    sent["tp", "all-reduce"] += sizes.sum_bytes
    first, last = place.pp == 0, place.pp == layout.pp - 1
    if last:
        # Three numbers per token, for the loss.
        sent["tp", "all-reduce"] += 3 * m * sizes.tokens * sizes.sum_bytes
    if layout.tp == 1:
        return
    hidden = m * sizes.tokens * model.hidden_size
    forward, backward, again = sums_of_layer(layout)
    for calls in (forward, backward, again if layout.recompute == "full" else {}):
        for kind, n in calls.items():
            sent["tp", kind] += layers * n * hidden * sizes.compute_bytes
    # Of the embedding's output, and of the gradient of what the head reads.
    ends = hidden * (first * sizes.param_bytes + last * sizes.compute_bytes)
    for kind in ("all-gather", "reduce-scatter") if layout.sequence_parallel else ("all-reduce",):
        sent["tp", kind] += ends
    if model.num_key_value_heads < layout.tp:
        # Ranks that share a key-value head sum its gradients.
        copied = 2 * sizes.keys * (model.hidden_size + ("k_proj" in model.biased))
        sent["tp", "all-reduce"] += m * layers * copied * sizes.sum_bytes
    sent["tp", "all-reduce"] += _partial_gradients(sizes, place, layers) * sizes.sum_bytes


def _partial_gradients(sizes: Sizes, place: Place, layers: int) -> int:
    """Numbers of this rank's gradients that are a sum over the tokens or heads of tp's ranks."""
    names, mine = [*layer_parameters(sizes), "norm"], 0
    for unit in units(sizes, place.pp, layers):
        # An embedding or a head is one matrix, and split.
        if len(unit) > 1:
            held = in_shard(sizes, place, unit) if sizes.layout.zero else unit
            mine += sum(n for name, n in zip(names, held, strict=False) if _is_partial(name, sizes.layout))
    return mine


def _is_partial(name: str, layout: Layout) -> bool:
    # Norms, and biases of what a row-parallel linear returns.
    whole = name.endswith("norm") or name in ("o_proj.bias", "down_proj.bias")
    return whole and (layout.sequence_parallel or name in ("q_norm", "k_norm"))


def _context(sent: Counter, sizes: Sizes, layers: int) -> None:
    layout, e = sizes.layout, sizes.compute_bytes
    c, times = layout.cp, sizes.micro_batches * layers
    if c == 1:
        return
    # Forward, backward, and the forward that backward recomputes.
    passes = 3 if layout.recompute == "full" else 2
    kv, q = keys_and_values(sizes), sizes.tokens * sizes.queries
    if layout.cp_engine == "all-gather":
        sent["cp", "all-gather"] += times * passes * c * kv * e
        sent["cp", "reduce-scatter"] += times * c * kv * sizes.sum_bytes
    elif layout.cp_engine == "all-to-all":
        sent["cp", "all-to-all"] += times * passes * (2 * q + kv) * e
    else:
        # Gradients travel with what they are of.
        sent["cp", "send"] += times * (c - 1) * kv * (passes * e + sizes.sum_bytes)


def _pipeline(sent: Counter, sizes: Sizes, place: Place, layers: int) -> None:
    layout, last = sizes.layout, sizes.layout.pp - 1
    sent["pp", "all-reduce"] += 2 * sizes.sum_bytes
    ends = (place.pp == 0) + (place.pp == last)
    if last and ends and sizes.model.tie_word_embeddings:
        (tied,) = units(sizes, place.pp, layers)[0]
        held = in_shard(sizes, place, [tied])[0] if layout.zero else tied
        sent["pp", "all-reduce"] += held * sizes.sum_bytes
    messages = (2 * layout.virtual_stages - ends) * sizes.micro_batches
    sent["pp", "send"] += messages * message(sizes)


def message(sizes: Sizes) -> int:
    """Bytes of a micro-batch between two stages."""
    return sizes.own_tokens * sizes.model.hidden_size * sizes.param_bytes
