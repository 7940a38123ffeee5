"""Pipeline schedules in time: how one would run ideally, how it ran, the idle share of each, a picture and a trace."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.errors import UserError, check_writable

# A backward costs two forwards: gradients of the inputs, and of the weights, which some schedules compute apart.
UNIT_COSTS = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}
COLORS = {"forward": "#7fb2e5", "backward": "#f2b47e", "input": "#f2b47e", "weight": "#9ccc8f"}
# How activations travel from stage to stage, and gradients. Those of weights stay.
DIRECTIONS = {"forward": 1, "backward": -1, "input": -1}
# What the same stage has to have done before.
AFTER = {"backward": "forward", "input": "forward", "weight": "input"}


class Event(NamedTuple):
    """A stage's work on a micro-batch, or on a chunk of its layers, from `start` to `end` in seconds."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float
    chunk: int = 0


def unit_cost(stage: int, kind: str, chunk: int) -> float:
    return UNIT_COSTS[kind]


def simulate(schedules: Sequence[Sequence[tuple]], cost: Callable[[int, str, int], float] = unit_cost) -> list[Event]:
    """Run the schedules, a list of (kind, micro_batch) or (kind, micro_batch, chunk) for each stage, without processes
    and with messages in no time.

    Chunk c of stage r is virtual stage c · stages + r: the last stage sends a chunk's output to the first one's next.
    A stage waits as the executor does on a GPU: for the message that an action needs, and, before it computes the next
    one in a direction, until the one before has been received. A receive is posted when the action that needs it is
    next. Raises ValueError if stages do not agree on the order of messages, if an action precedes what it builds on, or
    if all wait for each other.
    """
    stages = len(schedules)
    actions = [[(*action, 0)[:3] for action in schedule] for schedule in schedules]
    last = stages * (1 + max((chunk for schedule in actions for _, _, chunk in schedule), default=0)) - 1

    def links(stage: int, kind: str, chunk: int) -> tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]:
        """Where an action's message comes from, and where it goes: (stage, stage, direction), None if nowhere."""
        direction, virtual = DIRECTIONS.get(kind, 0), chunk * stages + stage
        incoming = ((stage - direction) % stages, stage, direction)
        outgoing = (stage, (stage + direction) % stages, direction)
        return (
            incoming if direction and 0 <= virtual - direction <= last else None,
            outgoing if direction and 0 <= virtual + direction <= last else None,
        )

    # The messages of each link, as micro-batch and virtual stage they are for.
    sent, received = defaultdict(list), defaultdict(list)
    for stage, schedule in enumerate(actions):
        for kind, m, chunk in schedule:
            incoming, outgoing = links(stage, kind, chunk)
            received[incoming].append((m, chunk * stages + stage))
            sent[outgoing].append((m, chunk * stages + stage + DIRECTIONS.get(kind, 0)))
    for link in (sent.keys() | received.keys()) - {None}:
        if sent[link] != received[link]:
            kind = "forward" if link[2] == 1 else "backward"
            raise ValueError(
                f"stages {link[0]} and {link[1]} do not agree on the order of {kind} messages, as (micro-batch, "
                f"virtual stage): {sent[link]} and {received[link]}"
            )

    events: list[Event] = []
    # When the sends of a link's messages were posted, and their receives.
    sent_at, received_at = defaultdict(list), defaultdict(list)
    position, clock = [0 for _ in schedules], [0.0 for _ in schedules]

    def post_receive(stage: int) -> None:
        """For the action that is next."""
        for kind, _, chunk in actions[stage][position[stage] :][:1]:
            received_at[links(stage, kind, chunk)[0]].append(clock[stage])

    def start_of_next(stage: int) -> float | None:
        """None while what it waits for has not happened."""
        kind, m, chunk = actions[stage][position[stage]]
        before = AFTER.get(kind)
        if before and (before, m, chunk) not in actions[stage][: position[stage]]:
            raise ValueError(f"stage {stage}: {kind} of micro-batch {m} precedes its {before}")
        incoming, outgoing = links(stage, kind, chunk)
        # Its message has been sent, and the one that was sent before its own has been received.
        needs = [(sent_at[incoming], len(received_at[incoming]) - 1)] if incoming else []
        if outgoing and sent_at[outgoing]:
            needs.append((received_at[outgoing], len(sent_at[outgoing]) - 1))
        if any(len(times) <= i for times, i in needs):
            return None
        return max([clock[stage], *(times[i] for times, i in needs)])

    for stage in range(stages):
        post_receive(stage)
    while any(position[stage] < len(schedules[stage]) for stage in range(stages)):
        before = list(position)
        for stage in range(stages):
            while position[stage] < len(schedules[stage]) and (start := start_of_next(stage)) is not None:
                kind, m, chunk = actions[stage][position[stage]]
                clock[stage] = start + cost(stage, kind, chunk)
                events.append(Event(stage, kind, m, start, clock[stage], chunk))
                sent_at[links(stage, kind, chunk)[1]].append(clock[stage])
                position[stage] += 1
                post_receive(stage)
        if position == before:
            waiting = {s: schedules[s][position[s]] for s in range(stages) if position[s] < len(schedules[s])}
            raise ValueError(f"deadlock: the stages wait for each other, at {waiting}")
    return events


def bubble(events: Sequence[Event]) -> float:
    """The share of the stages' time, from the first start to the last end, in which they are idle."""
    span = max(event.end for event in events) - min(event.start for event in events)
    stages = len({event.stage for event in events})
    return 1 - sum(event.end - event.start for event in events) / (stages * span)


def check_timeline(path: Path, metrics_file: Path | None) -> None:
    """Raise UserError for a --timeline that could not be written after training."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--timeline {path} must end in .svg or .png")
    for file in (path, path.with_suffix(".json")):
        if file.exists() or (metrics_file and file.resolve() == metrics_file.resolve()):
            raise UserError(f"--timeline {path}: {file} exists already or is --metrics-file: choose another name")
    check_writable(path.parent, "--timeline")


def write_timeline(path: Path, events: Sequence[Event], ideal: Sequence[Event]) -> None:
    """Draw the events next to the ideal ones, write them as a trace to the same name with .json, print both bubbles."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, rows = pyplot.subplots(2, figsize=(12, 5), layout="constrained")
    for axes, name, shown in ((rows[0], "measured", events), (rows[1], "ideal", ideal)):
        first = min(event.start for event in shown)
        for event in shown:
            width = event.end - event.start
            # Later chunks are paler.
            alpha = 1 - 0.6 * event.chunk / max(1, *(e.chunk for e in shown))
            look = {"color": COLORS[event.kind], "alpha": alpha, "edgecolor": "white"}
            axes.barh(event.stage, width, left=event.start - first, **look)
            axes.text(event.start - first + width / 2, event.stage, event.micro_batch, ha="center", va="center")
        axes.set_title(f"{name}: bubble {bubble(shown):.1%}", loc="left")
        axes.set_yticks(
            sorted({event.stage for event in shown}), [f"stage {s}" for s in sorted({e.stage for e in shown})]
        )
        axes.invert_yaxis()
    rows[0].set_xlabel("seconds")
    kinds = {event.kind for event in ideal}
    rows[1].set_xlabel(", ".join(f"{kind} = {cost:.0f}" for kind, cost in UNIT_COSTS.items() if kind in kinds))
    figure.savefig(path)
    pyplot.close(figure)
    chunked = any(event.chunk for event in events)
    trace = [
        {
            "name": f"{event.kind} {event.micro_batch}" + (f" chunk {event.chunk}" if chunked else ""),
            "ph": "X",
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "pid": 0,
            "tid": event.stage,
        }
        for event in events
    ]
    path.with_suffix(".json").write_text(json.dumps({"traceEvents": trace}))
    print(f"bubble of the last step: {bubble(events):.1%}, in theory {bubble(ideal):.1%}: see {path}", flush=True)
