"""Who waits for whom: the calls of all ranks, laid side by side."""

from collections import defaultdict

from labs.attempt import Call


def disagreements(calls: list[Call]) -> list[str]:
    """Where the ranks of a group did not call the same, and messages without another end. A sentence for each."""
    collectives: dict[str, dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    messages: dict[tuple[str, int, int], dict[str, int]] = defaultdict(lambda: {"send": 0, "receive": 0})
    axes = {call.group: call.axis for call in calls}
    for call in calls:
        if call.kind == "send":
            messages[call.group, call.rank, call.peer]["send"] += 1
        elif call.kind == "receive":
            messages[call.group, call.peer, call.rank]["receive"] += 1
        else:
            for rank in call.ranks:
                # So that a rank that has called nothing is found as well.
                collectives[call.group][rank] += [call] if rank == call.rank else []
    found = [sentence for by_rank in collectives.values() if (sentence := _first_difference(by_rank))]
    for (group, sender, receiver), count in messages.items():
        message = f"message {min(count.values()) + 1} of {axes[group]}"
        if count["receive"] > count["send"]:
            found.append(f"rank {receiver} waits for {message} from rank {sender}, which it never sent")
        elif count["send"] > count["receive"]:
            found.append(f"rank {sender} waits for rank {receiver} to take {message}, which it never does")
    return found


def _first_difference(by_rank: dict[int, list[Call]]) -> str | None:
    longest = max(by_rank.values(), key=len)
    for i, call in enumerate(longest):
        name = f"{call.kind} {sum(c.kind == call.kind for c in longest[: i + 1])} of {call.axis}"
        absent = [rank for rank, calls in by_rank.items() if len(calls) <= i]
        there = {rank: calls[i] for rank, calls in by_rank.items() if len(calls) > i}
        for rank, other in there.items():
            if (other.kind, other.bytes) != (call.kind, call.bytes):
                theirs = f"rank {rank} has {other.kind} of {other.bytes:,} bytes"
                return f"the ranks do not agree on {name}: rank {call.rank} has {call.bytes:,} bytes, where {theirs}"
        if absent:
            return f"{_of(sorted(there))} wait{'s' * (len(there) == 1)} in {name}, {_of(absent)} never called it"
    return None


def _of(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
