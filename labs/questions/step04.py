"""Questions on step04: schedules in time, what stages hold, and what they send."""

from bisect import bisect_left
from random import Random

from labs.questions import Question
from labs.questions.project import Batches, Model, draw_batches, draw_model, pipeline_parallel, step
from shared.flops import flops_per_token
from shared.llama_configs import PRESETS
from shared.timeline import Event, bubble, simulate

make_schedule = pipeline_parallel.make_schedule


def simulated(name: str, stages: int, micro_batches: int, chunks: int = 1) -> list[Event]:
    return simulate([make_schedule(name, stage, stages, micro_batches, chunks) for stage in range(stages)])


def _drawn(draw: Random) -> tuple[Model, Batches, int, int]:
    """A model of a layer or two per stage, what a rank sees, the stages, and one of them."""
    stages = draw.choice((2, 3, 4))
    return draw_model(draw, (stages,)), draw_batches(draw), stages, draw.randrange(stages)


def _step(model: Model, batches: Batches, stages: int, stage: int, schedule: str = "1f1b") -> object:
    return step(stage, **model.options, **batches.options(), pp=stages, pp_schedule=schedule)


def idle(draw: Random) -> Question:
    name, stages, m = draw.choice(("afab", "1f1b")), draw.choice((2, 4, 8)), draw.randint(2, 32)
    result = 100 * (stages - 1) / (m + stages - 1)
    return Question(
        f"{stages} stages, {m} micro-batches, --pp-schedule {name}. What share of the time is a stage idle, in "
        "percent?",
        f"(P − 1)/(M + P − 1) = {stages - 1}/{m + stages - 1} = {result:.1f} %, under both schedules.",
        result,
        lambda: 100 * bubble(simulated(name, stages, m)),
    )


def enough(draw: Random) -> Question:
    stages, percent = draw.choice((2, 4, 8)), draw.choice((5, 8, 10, 20, 25))
    result = -((stages - 1) * (percent - 100) // percent)
    return Question(
        f"{stages} stages under 1F1B. How many micro-batches per step does it take at least for a bubble of at most "
        f"{percent} %?",
        f"{stages - 1}/(M + {stages - 1}) ≤ {percent / 100}, so M ≥ {stages - 1} · (1/{percent / 100} − 1): {result}.",
        result,
        # Of more micro-batches, it is smaller.
        lambda: (
            1
            + bisect_left(
                range(1, 200), True, key=lambda m: bubble(simulated("1f1b", stages, m)) <= percent / 100 + 1e-12
            )
        ),
        0,
    )


def in_flight(draw: Random) -> Question:
    name, stages, m = draw.choice(("afab", "1f1b", "1f1b")), draw.choice((2, 4, 8)), draw.randint(2, 12)
    stage = draw.randrange(stages)
    result = m if name == "afab" else min(stages - stage, m)

    def answer() -> int:
        held = most = 0
        for kind, *_ in make_schedule(name, stage, stages, m):
            held += 1 if kind == "forward" else -1
            most = max(most, held)
        return most

    return Question(
        f"{stages} stages, {m} micro-batches, --pp-schedule {name}. Of how many micro-batches does stage {stage}, "
        "counted from 0, hold activations at most?",
        f"afab: all {m}. 1f1b: P − stage = {stages - stage}, but not more than {m}. Here: {result}.",
        result,
        answer,
        0,
    )


def order(draw: Random) -> Question:
    stages = draw.choice((3, 4, 6))
    stage, m = draw.randrange(stages - 1), draw.randint(stages, 12)
    warmup = stages - stage - 1
    micro = draw.randrange(m - warmup)
    result = warmup + 2 * micro + 2

    def answer() -> int:
        actions = make_schedule("1f1b", stage, stages, m)
        return 1 + next(i for i, a in enumerate(actions) if (a.kind, a.micro_batch) == ("backward", micro))

    return Question(
        f"{stages} stages under 1F1B, {m} micro-batches. Stage {stage} follows its list of actions. At which place, "
        f"counted from 1, is the backward of micro-batch {micro}? Stages and micro-batches are counted from 0.",
        f"{warmup} forwards warm up. Then a forward and a backward in turn: {micro} pairs precede, then a forward, "
        f"then this backward. {warmup} + 2 · {micro} + 2 = {result}.",
        result,
        answer,
        0,
    )


def head(draw: Random) -> Question:
    name, s = (
        draw.choice(("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-2-7b")),
        draw.choice((1024, 2048, 4096)),
    )
    c = PRESETS[name]
    h, heads, kv_heads, d = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer = 6 * (2 * h * (heads + kv_heads) * d + 3 * h * c.intermediate_size) + 6 * heads * d * s
    result = 6 * h * c.vocab_size / layer

    def answer() -> float:
        larger = type(c)(**c.to_dict() | {"vocab_size": 2 * c.vocab_size})
        deeper = type(c)(**c.to_dict() | {"num_hidden_layers": c.num_hidden_layers + 1})
        now = flops_per_token(c, s, causal=True)
        return (flops_per_token(larger, s, True) - now) / (flops_per_token(deeper, s, True) - now)

    return Question(
        f"{name} has h = {h}, f = {c.intermediate_size}, H = {heads}, K = {kv_heads}, d = {d}, V = {c.vocab_size}. On "
        f"sequences of {s} tokens, how many layers does the head cost, in FLOPs? Leave out what the causal mask hides.",
        f"6hV over 6 · (2h(H + K)d + 3hf) + 6Hds: {result:.2f}. So many layers less should the last stage have.",
        result,
        answer,
    )


def payload(draw: Random) -> Question:
    model, batches, stages, stage = drawn = _drawn(draw)
    m, b, s = batches
    neighbours = 2 - (stage == 0) - (stage == stages - 1)
    result = neighbours * m * 4 * b * s * model.h / 2**10
    return Question(
        f"{model} It runs in {stages} stages, each with {batches}. How many KiB does stage {stage}, counted from 0, "
        "send to other stages per step, in float32?",
        f"b · s · h numbers to each of {neighbours} neighbours for each micro-batch: {neighbours} · {m} · 4 · {b} · "
        f"{s} · {model.h} bytes = {result:,.1f} KiB. Forward goes to the next, backward to the one before.",
        result,
        lambda: _step(*drawn).sent("pp", "send").bytes / 2**10,
    )


def span(draw: Random) -> Question:
    stages, m, forward = draw.choice((2, 4, 8)), draw.randint(4, 24), draw.choice((10, 20, 50))
    result = (m + stages - 1) * 3 * forward / 1000
    return Question(
        f"{stages} stages under 1F1B, {m} micro-batches. A forward takes {forward} ms, a backward twice as long, a "
        "message nothing. How many seconds does the step take?",
        f"(M + P − 1)(F + B) = {m + stages - 1} · {3 * forward} ms = {result:g} s.",
        result,
        lambda: max(event.end for event in simulated("1f1b", stages, m)) * forward / 1000,
    )


QUESTIONS = [idle, in_flight, enough, span, order, payload, head]
