"""Bytes that a rank holds during a step besides its states: activations, gradients on their way, buffers.

A step is walked through action by action. Each adds what it leaves for later, and has a peak of its own above what is
there when it begins. Formulas are those of this code (model.py, tensor/, context/, zero/, channels.py) on a CPU, which
its dry run counts; a test holds the two together.
"""

from collections.abc import Callable, Sequence

from planning.layout import Place, Sizes, layer_parameters

# Sequences of int64 in a batch: tokens, positions, labels.
BATCH_BYTES = 3 * 8


class Tape:
    """Bytes now, and the most so far."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, nbytes: int, transient: int = 0) -> None:
        """Bytes that stay, and others that are there for a moment besides."""
        self.now += nbytes
        self.peak = max(self.peak, self.now + max(transient, 0))

    def repeat(self, times: int, step: Callable[[], None]) -> None:
        """A step several times over. Each changes `now` by as much, so its peak is highest at one of the ends."""
        for i in range(min(times, 2)):
            before = self.now
            step()
            if i == 0 and times > 2:
                self.now += (times - 2) * (self.now - before)


class Layer:
    """What a layer keeps of a micro-batch for backward, and needs for a moment."""

    def __init__(self, sizes: Sizes) -> None:
        layout, e, r = sizes.layout, sizes.compute_bytes, sizes.param_bytes
        h, t, own, total = sizes.model.hidden_size, sizes.tokens, sizes.own_tokens, sizes.sum_bytes
        selective, naive = layout.recompute == "selective", layout.tp_engine == "naive"
        # A residual sum (b, s, h), and such a tensor in a matmul: of all tokens if they have to be gathered.
        self.residual = own * h * r
        self.gathered = t * h * e if t > own else 0
        self.ffn = t * sizes.ffn * e
        q, kv = t * sizes.queries * e, 2 * t * sizes.keys * e
        # Naive linears keep what each has gathered.
        copies = self.gathered if naive else 0
        normed = 0 if copies else own * h * e
        statistics = own * total
        log_sum = t * sizes.heads * total
        exchanged = q if layout.cp > 1 and layout.cp_engine == "all-to-all" else 0
        # Heads of q and k before they are normalized.
        heads = q + kv // 2 + t * (sizes.queries + sizes.keys) // sizes.model.head_dim * total
        # What the linears read, unless the norm can be run again.
        self.attention = (
            self.residual + statistics + 3 * copies + (0 if selective else normed) + 2 * q + kv + log_sum + exchanged
        )
        if sizes.model.head_norms:
            self.attention += heads
        self.mlp = self.residual + statistics + 2 * copies + (0 if selective else normed) + 2 * self.ffn
        self.renormed = normed if selective else 0
        cast = e < r
        weights = layer_parameters(sizes)
        # Copies of weights in the dtype of the matmuls, which autocast keeps until the step's end.
        read = weights if naive else ("o_proj", "down_proj")
        self.copies = e * sum(weights[name] for name in read if name.endswith("proj")) if cast else 0
        # A gradient of a weight, in the matmul's dtype and in the weight's.
        down, gates = weights["down_proj"], weights["gate_proj"]
        largest = max(weights["q_proj"], weights["o_proj"])
        self.weight_gradient = down * (e + (r if cast else 0))
        grad = t * h * e if (cast or t > own) else 0
        self.forward = 2 * self.ffn + t * h * e
        # Backward of the MLP inside its checkpoint, above what is kept.
        if layout.pp_schedule == "zero-bubble":
            # Copies are then made for each micro-batch. What is in a checkpoint is made anew, the other kept.
            self.mlp_backward = 5 * self.ffn + (down * e if cast else 0)
            self.copies = weights["o_proj"] * e if cast and layout.recompute != "full" else 0
        else:
            self.mlp_backward = max(4 * self.ffn, 3 * self.ffn + self.weight_gradient + grad)
        # Of its fan-out: what the checkpoint kept is gone, the gradients of gate and up are there, and all tokens.
        # The gradients of both, and those that are put off with the one before.
        self.weight_gradients = gates * (2 * r + (e if cast else 0))
        self.late_gradients = self.weight_gradients + down * r
        self.fan_out_backward = 2 * self.ffn + self.gathered + self.renormed + t * h * e
        around = q + kv + q
        if layout.cp > 1 and layout.cp_engine != "all-to-all":
            blocks = layout.cp if layout.cp_engine == "all-gather" else 2
            wide = total / e
            around = 2 * q + kv + int((q + kv) * wide) + int(blocks * kv * (1 + wide))
        self.attention_backward = around + max(grad, self.gathered + t * h * e)
        if layout.pp_schedule != "zero-bubble":
            self.fan_out_backward += self.weight_gradients
            self.attention_backward = around + max(grad, self.gathered + t * h * e + largest * (r + e))
        # The norm's, in at least float32.
        self.norm_backward = 3 * own * h * total
        # What the gradients of weights need later, if they are put off.
        self.late = 4 * t * h * e + 3 * self.ffn + 2 * q + kv

    @property
    def kept(self) -> int:
        return self.attention + self.mlp


class Head:
    """Of the final norm and the loss."""

    def __init__(self, sizes: Sizes) -> None:
        e, r, total, h = sizes.compute_bytes, sizes.param_bytes, sizes.sum_bytes, sizes.model.hidden_size
        weight, rows = sizes.vocabulary * h, min(sizes.tokens, max(h // 2, 128))
        own = sizes.own_tokens
        self.gradient = weight * total
        self.norm = own * h * r + own * total
        # The gradients of the weight and of what it reads are taken in forward.
        self.kept = self.norm + self.gradient + sizes.tokens * h * e
        logits = rows * sizes.vocabulary
        # In a matmul's dtype: the logits, then their gradient, and what they add to the weight's.
        rounded = (logits + weight) * e if e < total else 0
        self.forward = logits * total + rounded + (weight * e if e < r else 0)
        # What the norm returns, and that of all tokens.
        self.forward += own * h * e + (sizes.tokens * h * e if sizes.tokens > own else 0)
        self.late_gradient = weight * r


class Stage:
    """A rank's stage of the pipeline, with the layers of each of its chunks."""

    def __init__(self, sizes: Sizes, place: Place, chunks: Sequence[int]) -> None:
        self.sizes, self.chunks = sizes, chunks
        layout = sizes.layout
        self.layer, self.head = Layer(sizes), Head(sizes)
        self.first, self.last = place.pp == 0, place.pp == layout.pp - 1
        # Numbers in the parameters of a layer, and of what is on the ends.
        self.numbers = sum(layer_parameters(sizes).values())
        self.hidden, weight = sizes.model.hidden_size, sizes.vocabulary * sizes.model.hidden_size
        self.tied = sizes.model.tie_word_embeddings and layout.pp == 1
        self.embedding = weight if self.first else 0
        self.head_weight = weight if self.last and not self.tied else 0
        self.full = layout.recompute == "full"
        h, d = sizes.model.hidden_size, sizes.model.head_dim
        self.message = sizes.own_tokens * h * sizes.param_bytes
        # cos and sin of a micro-batch, and tokens and mask of an embedding.
        self.angles = sizes.tokens * d * sizes.sum_bytes
        self.embedded = sizes.tokens * 9
        self.put_off = layout.pp_schedule == "zero-bubble"
        # Gradients of weights that are not added to what is there already.
        self.new_gradients = not layout.zero and layout.dp_engine == "naive"

    def has_head(self, chunk: int) -> bool:
        return self.last and chunk == len(self.chunks) - 1

    def has_embedding(self, chunk: int) -> bool:
        return self.first and chunk == 0

    def forward(self, chunk: int) -> tuple[int, int]:
        """Peak and change of a forward."""
        tape, layer, layers = Tape(), self.layer, self.chunks[chunk]
        each = layer.residual if self.full else layer.kept
        tape.add(self.angles + self.has_embedding(chunk) * self.embedded)
        # With --zero 3 a layer's weights are here, and the next one's arrive.
        tape.add(self.gathered(self.embedding) + 2 * self.gathered(self.numbers) * (layers > 1))
        if not self.tied:
            tape.add(-self.gathered(self.embedding))

        def forward_of_layer() -> None:
            tape.add(each, layer.kept - each + layer.forward)

        tape.repeat(layers - 1, forward_of_layer)
        tape.add(-2 * self.gathered(self.numbers) * (layers > 1))
        tape.add(self.gathered(self.numbers + self.hidden) + self.gathered(self.head_weight))
        forward_of_layer()
        if self.put_off:
            tape.add(layer.copies * layers)
        if self.has_head(chunk):
            tape.add(self.head.kept, self.head.forward)
        return tape.peak, tape.now

    def gathered(self, numbers: int) -> int:
        """Bytes of the weights of a unit with so many numbers, if --zero 3 frees them at times."""
        return self.padded(numbers) * self.sizes.param_bytes if self.sizes.layout.zero == 3 else 0

    def reduced(self, numbers: int) -> int:
        """Bytes of the gradients of a unit, if they are freed once they are reduced."""
        return self.padded(numbers) * self.sizes.sum_bytes if self.sizes.layout.zero > 1 else 0

    def padded(self, numbers: int) -> int:
        return -(-numbers // self.sizes.shards) * self.sizes.shards

    def left(self, numbers: int, first: bool) -> int:
        """Bytes that the gradients of a unit take from its first backward to the step's end, if none before it."""
        if not first:
            return 0
        return self.reduced(numbers) // self.sizes.shards + numbers * self.sizes.param_bytes * self.new_gradients

    def backward(self, chunk: int, turn: int) -> tuple[int, int]:
        """Peak and change of this chunk's backward of a step number `turn`, from 0."""
        first = turn == 0
        tape, layer, head, layers = Tape(), self.layer, self.head, self.chunks[chunk]
        late = layer.late if self.put_off else 0
        # A tied gradient waits for that of the embedding.
        held = head.late_gradient if self.has_head(chunk) and self.tied else 0
        # Copies of weights are older than this micro-batch: autograd takes their gradients last.
        waiting = 0 if first or self.put_off else layer.copies
        # The unit whose gradients are being reduced: at first the embedding, of the micro-batch before.
        reducing, carried = 0, 0 if first else self.left(self.embedding, turn == 1) - self.reduced(self.embedding)
        if self.has_head(chunk):
            tape.add(head.late_gradient - head.kept)
            tape.add(self.reduced(self.head_weight) + self.left(self.head_weight, first) * (not self.sizes.layout.zero))
            tape.add(held - head.late_gradient - self.gathered(self.head_weight))
            tape.add(0, layer.norm_backward)
            reducing = self.head_weight
        if reducing:
            tape.add(carried)
        # The gradient of the residual sum: at first, what the next stage has sent.
        received = not self.has_head(chunk)
        tape.add(0 if received else layer.residual)

        def backward_of_layer(unit: int, before: int, previous: int) -> None:
            """`unit` numbers of this layer, `before` of the next to be gathered, `previous` that are being reduced."""
            tape.add(self.gathered(before) + self.reduced(unit))
            if self.full:
                tape.add(layer.kept - layer.residual)
            tape.add(0, layer.mlp_backward)
            tape.add(waiting - 2 * layer.ffn, layer.fan_out_backward)
            tape.add(2 * layer.ffn - layer.mlp, layer.attention_backward)
            tape.add(self.left(unit, first) * (not self.sizes.layout.zero) + late)
            tape.add(-layer.attention - self.gathered(unit))
            # What is on its way is reduced by now, and this follows.
            tape.add(self.left(previous, first) * bool(self.sizes.layout.zero) - self.reduced(previous))

        last = self.numbers + self.hidden * self.last
        backward_of_layer(last, self.numbers * (layers > 1), reducing)
        if not reducing:
            tape.add(carried)
        tape.add(layer.residual if received else 0)
        if layers > 1:
            backward_of_layer(self.numbers, self.numbers * (layers > 2), last)
        tape.repeat(layers - 3, lambda: backward_of_layer(self.numbers, self.numbers, self.numbers))
        if layers > 2:
            backward_of_layer(self.numbers, 0, self.numbers)
        reducing = self.numbers if layers > 1 else last
        if self.put_off:
            tape.add(-layer.copies * layers)
        if self.has_embedding(chunk):
            wide, own = self.sizes.sum_bytes, self.sizes.param_bytes
            # The gradient is summed in at least float32. Beside it is first what it sums, then a copy in the weight's
            # dtype.
            beside = max(self.sizes.tokens * self.hidden * wide, self.embedding * own) if wide > own else 0
            tape.add(self.reduced(self.embedding), self.embedding * wide + beside)
            tape.add(-self.gathered(self.embedding) * self.tied)
            tape.add(self.left(self.embedding, first) * (not self.sizes.layout.zero))
        tape.add(self.left(reducing, first) * bool(self.sizes.layout.zero) - self.reduced(reducing))
        tape.add(-self.angles - self.has_embedding(chunk) * self.embedded - held - layer.residual - waiting * layers)
        return tape.peak, tape.now
