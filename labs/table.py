"""The labs in which one writes a function. The solution is the project's file: nothing here repeats it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Lab:
    """A row of the table: what is cut out, and who judges what is put in its place."""

    id: str
    title: str
    # The functions to write, each by its file in the step and its name there: "zero.unit.Unit.reduce".
    names: tuple[str, ...]
    # What to write, in the words of someone who hands out the exercise.
    task: str
    # A section of a README, to be read before: "step03_tensor_parallel/README.md", its heading.
    read: tuple[str, str]
    hints: tuple[str, ...] = ()
    # Trains with it (training.py), or a function of on_paper.py that needs no processes.
    judge: str = "training"
    # Of a training: processes and options of the step, and of the reference, too.
    ranks: int = 2
    options: str = ""
    model: str = ""
    # The axis of which a collective has to be called while backward runs.
    overlaps: Literal["", "dp"] = ""

    @property
    def step(self) -> str:
        return self.read[0].partition("/")[0]


LABS = {
    lab.id: lab
    for lab in (
        Lab(
            "01a",
            "Loss scaling",
            ("train.Trainer.forward_backward",),
            "Forward and backward of all micro-batches of a step. Afterwards `.grad` is the gradient of the mean loss "
            "over the tokens of the global batch, and that mean is what you return.",
            ("step01_single_gpu/README.md", "What a step consists of"),
            ("Backward adds to `.grad`.", "A sum over micro-batches is a mean once its terms have been divided."),
            ranks=1,
            options="--micro-batch-size 2",
        ),
        Lab(
            "02a",
            "Naive data parallelism",
            ("data_parallel.Reducer.finish",),
            "Each rank has done backward on its share of the batch. Make `.grad` what one device would have.",
            ("step02_data_parallel/README.md", "Naive and bucketed"),
            (
                "Each rank has divided its loss by the tokens of the global batch already.",
                "A parameter that a rank did not use has no gradient there. The others still wait for it.",
            ),
            options="--dp-engine naive",
        ),
        Lab(
            "02b",
            "Buckets, while backward runs",
            (
                "data_parallel.BucketedReducer.start",
                "data_parallel.BucketedReducer._on_gradient",
                "data_parallel.BucketedReducer._launch",
                "data_parallel.BucketedReducer.finish",
            ),
            "All-reduce each bucket as soon as its last gradient is complete, without waiting, and wait in `finish`.",
            ("step02_data_parallel/README.md", "Naive and bucketed"),
            (
                "A gradient is complete when each micro-batch has added to it: count the contributions to come.",
                "All ranks have to call in the same order, whatever the order in which gradients arrive.",
            ),
            options="--bucket-mib 0.01 --micro-batch-size 2",
            overlaps="dp",
        ),
        Lab(
            "03a",
            "The two conjugate functions",
            (
                "conjugates.CopyToRanks.forward",
                "conjugates.CopyToRanks.backward",
                "conjugates.SumOverRanks.forward",
                "conjugates.SumOverRanks.backward",
            ),
            "What stands before a split matrix, and what stands behind it: forward and backward of both.",
            ("step03_tensor_parallel/README.md", "The idea: two functions"),
            (
                "Each rank has a part of the outputs, so each knows only its part of the gradient of x.",
                "y = Σ x_r: what is dy/dx_r?",
            ),
            options="--tp 2 --tp-engine naive --micro-batch-size 8",
        ),
        Lab(
            "03b",
            "Vocab-parallel cross entropy",
            ("vocab_parallel.VocabParallelHead.cross_entropy",),
            "The loss of each token, where each rank has the logits of its rows of the vocabulary. These never travel: "
            "they become their own gradient, softmax − one-hot, in place.",
            ("step03_tensor_parallel/README.md", "The vocabulary"),
            (
                "Three numbers per token travel: the highest logit, then Σ exp and the label's logit in one call.",
                "Only the rank that has the label's row knows its logit. `local` says who.",
            ),
            options="--tp 2 --micro-batch-size 8",
        ),
        Lab(
            "03c",
            "The norm, counted once",
            ("tensor_parallel.counted", "tensor_parallel.norm_over_ranks"),
            "The parameters that this rank counts, so that all ranks together count each number of the model once; and "
            "the norm over the ranks.",
            ("step03_tensor_parallel/README.md", "The norm of the gradients"),
            ("Which weights are split, which are on all ranks, and which on some?",),
            # More ranks than key-value heads: two copies of each.
            ranks=4,
            options="--tp 4 --micro-batch-size 8",
        ),
        Lab(
            "04a",
            "1F1B as a list",
            ("schedules.one_forward_one_backward",),
            "The actions of a stage, in order: some forwards, then a forward and a backward in turn, then the rest.",
            ("step04_pipeline_parallel/README.md", "A schedule is a list"),
            ("How many later stages are there?", "The last stage does the backward of a micro-batch at once."),
            judge="one_forward_one_backward",
        ),
        Lab(
            "04b",
            "The executor's two halves",
            ("pipeline_parallel.Pipeline._forward", "pipeline_parallel.Pipeline._backward"),
            "Receive, compute, send: a forward of a micro-batch on this stage, and its backward.",
            ("step04_pipeline_parallel/README.md", "Who waits for what"),
            (
                "Backward needs what forward got and what it made: keep both in `self.held`.",
                "`release` waits until the last message of a channel has left: call it before the next `send`.",
                "`expect` makes room for the next message: call it when this one has been taken.",
            ),
            # A stage in the middle as well.
            ranks=3,
            options="--pp 3 --micro-batch-size 2",
            model="--num-hidden-layers 3",
        ),
        Lab(
            "05a",
            "Zigzag positions",
            ("context_parallel.local_positions",),
            "The positions of a sequence that a rank holds: so that under a causal mask all have the same work.",
            ("step05_context_parallel/README.md", "Zigzag"),
            ("Cut the sequence into 2c pieces. Who has the first should have the last.",),
            judge="positions",
        ),
        Lab(
            "05b",
            "Who sees what",
            ("context_parallel.visible",),
            "What the queries of a rank see of the keys of another one, as blocks: which queries, which keys, and "
            "whether the block is causal in itself.",
            ("step05_context_parallel/README.md", "Zigzag"),
            (
                "There are three cases: the rank's own keys, those of an earlier rank, those of a later one.",
                "A block's queries and keys are tuples of slices of (b, heads, s, d), in the order that each rank has.",
            ),
            judge="visibility",
        ),
        Lab(
            "05c",
            "Merging two softmaxes",
            ("fused_attention.merge",),
            "Add a block of keys to the attention over those before it, in place, given the log-sum-exp of both.",
            ("step05_context_parallel/README.md", "A softmax in pieces"),
            (
                "Each part counts by its share of Σ exp(score).",
                "Scores can be large: subtract logarithms before you take exp.",
            ),
            judge="merging",
        ),
        Lab(
            "05d",
            "The ring's forward",
            ("context_parallel._RingAttention.forward",),
            "Attention to the blocks of all ranks, one after the other, while the next keys and values travel.",
            ("step05_context_parallel/README.md", "Ring"),
            (
                "After a hop, whose keys and values are here?",
                "Start to pass them on before you compute, and wait after.",
            ),
            ranks=3,
            options="--cp 3 --micro-batch-size 8",
            model="--seq-len 24",
        ),
        Lab(
            "06a",
            "A step of ZeRO-1",
            ("zero.unit.Unit.in_shard", "zero.unit.Unit.reduce", "zero.unit.Unit.gather"),
            "Each rank gets its shard of the sum of gradients, and after the optimizer all get all weights again.",
            ("step06_4d/zero/README.md", "The idea"),
            (
                "All that is needed is in the flat tensors of the unit, and in `shard_range`.",
                "`reduce` keeps the books, too: nothing has `arrived` any more, and who is next `to_reduce`?",
                "A shard may begin and end within a parameter.",
            ),
            options="--zero 1 --micro-batch-size 2",
        ),
        Lab(
            "06b",
            "Sequence parallelism: gather and sum",
            (
                "tensor.token_layout.Sharded.gather",
                "tensor.token_layout.Sharded.sum",
                "tensor.sequence_parallel.sum_partial_gradients",
            ),
            "Between split matrices each rank has its part of the tokens: all of them before a matrix, the sum's part "
            "after it. The norms have seen a part only: what of their gradients?",
            ("step06_4d/tensor/README.md", "Two functions"),
            (
                "Flatten b and s: the parts are contiguous, so the collective needs no copy.",
                "Put all norms' gradients into one tensor: one call.",
            ),
            options="--tp 2 --sequence-parallel --micro-batch-size 8",
        ),
        Lab(
            "06c",
            "Zero bubble",
            ("pipeline.schedules.zero_bubble",),
            "1F1B whose gradients of weights come later, when the stage would wait.",
            ("step06_4d/pipeline/README.md", "Zero bubble"),
            ("Stage r is r forwards less ahead than the first one: it may put off that many weight gradients.",),
            judge="zero_bubble",
        ),
        Lab(
            "06d",
            "Interleaved 1F1B",
            ("pipeline.schedules.interleaved",),
            "Each rank has several chunks of layers, and micro-batches go through them in groups.",
            ("step06_4d/pipeline/README.md", "Virtual stages"),
            ("In groups of as many micro-batches as stages.", "Backwards take the chunks from the last to the first."),
            judge="interleaved",
        ),
        Lab(
            "06e",
            "The boxes of a checkpoint",
            ("survive.boxes.range_boxes",),
            "A shard of ZeRO is a range of a matrix's numbers, row by row. Cut it into boxes, as few as possible.",
            ("step06_4d/survive/README.md", "Checkpoints"),
            ("The end of a row, whole rows, the beginning of a row.", "A range may end in the row in which it begins."),
            judge="boxes",
        ),
    )
}
