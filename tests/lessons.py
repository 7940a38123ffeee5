"""Which lesson of step06 each added line of its train.py belongs to."""

from diff_classes import ROOT, classify

# The lesson, and what its lines contain.
LESSONS = {
    "sharding": [
        "sharded_optimizer",
        "self.reducer.gradient",
        "if self.config.zero:",
        "self.reducer.shard_group)",
        "clip_grads_with_norm_",
        "wait_for_weights",
        "weights_changed",
        # The reducer gives the model its weights.
        "from shared.weights import",
    ],
    "bfloat16 masters": ["make_optimizer"],
    "sequence parallelism": ["sequence_parallel"],
    "recompute and compile": ["layers"],
    "zero bubble": ["WeightGradients", "self.reducer.add)"],
    "document masks": ["documents", "make_batches("],
    "dry run": ["dry_run"],
    "survival": [
        "survival",
        "with running",
        "running.steps",
        "running.accepts",
        "running.log",
        "running.export",
        "state.initial_weights",
        "optimizer.step()",
    ],
    "observation": ["observation", "observed."],
}


def claims(lesson: str, line: str) -> bool:
    return any(text in line for text in LESSONS[lesson])


def lines_of(lesson: str) -> str:
    """The lesson's lines in train.py, each under the function that it is in, as the body of a diff."""
    before, after = ((ROOT / step / "train.py").read_text() for step in ("step05_context_parallel", "step06_4d"))
    shown, lines, last = [], after.splitlines(), ""
    for number in classify(before, after):
        line = lines[number - 1]
        if claims(lesson, line):
            heads = [head.strip() for head in lines[:number] if head.lstrip().startswith(("def ", "class "))]
            name = heads[-1].split("(")[0].rstrip(":") if heads else "imports"
            shown += [f"@@ {name} @@"] * (name != last) + [f"+{line}"]
            last = name
    return "\n".join(shown)
