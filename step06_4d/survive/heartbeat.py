"""When a rank is lost or hangs, the others wait for it, each at another line. Here they say in one line which rank it
is and where each of them stands. Then they end, so that whoever started the run can start it again.

Every rank has a thread that writes a beat once per second to the store in which the ranks have met: the step, and the
line of this project's code at which training is. The thread goes on while training computes, compiles or waits.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from traceback import walk_stack, walk_tb
from types import TracebackType

import torch.distributed as dist
from survive.whereabouts import lost_ranks, not_with_the_others, place, places

from shared.config import UserError

# Seconds between two beats. Seconds of silence after which a rank is lost, once a collective has failed.
INTERVAL, BROKEN = 1, 3


@dataclass
class Config:
    """The options of watching over each other."""

    # Seconds without a sign of life from a rank after which the others end, and name it. 60 is a good value. With 0
    # nobody watches: ranks wait for --timeout.
    heartbeat_timeout: int = 0

    def validate(self) -> None:
        super().validate()
        if self.heartbeat_timeout < 0 or 0 < self.heartbeat_timeout < BROKEN:
            raise UserError(f"--heartbeat-timeout must be 0 or at least {BROKEN}, but is {self.heartbeat_timeout}")


class Heartbeat:
    """Context of a training loop, which sets `step`. Rank 0 watches all ranks, and the others watch rank 0: per second,
    the store is asked for one value by every rank, and by rank 0 for those of all."""

    def __init__(self, config: Config) -> None:
        self.timeout, self.step, self.beats = config.heartbeat_timeout, 0, 0
        # Where the collective was called that has failed.
        self.failure: TracebackType | None = None
        self.done = threading.Event()

    def __enter__(self) -> "Heartbeat":
        if self.timeout:
            self.rank, self.everyone = dist.get_rank(), list(range(dist.get_world_size()))
            # A connection of its own: training may wait on the other one.
            self.store = dist.distributed_c10d._get_default_store().clone()
            self._beat()
            self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.timeout:
            if kind and not issubclass(kind, (UserError, KeyboardInterrupt)):
                try:
                    self._explain(error)
                except dist.DistError:
                    self._say("lost the store of all ranks, and so the process that has it: torchrun or rank 0")
                    os._exit(1)
            self.done.set()
            self.thread.join()
            self._beat(left=True)

    def _beat(self, left: bool = False) -> None:
        self.beats += 1
        frame = sys._current_frames().get(threading.main_thread().ident)
        at, waits = place(reversed(list(walk_tb(self.failure))) if self.failure else walk_stack(frame))
        waits = waits or self.failure is not None
        beat = {"beat": self.beats, "step": self.step, "at": at, "waits": waits, "left": left}
        self.store.set(f"beat {self.rank}", json.dumps(beat))

    def _read(self, ranks: list[int]) -> dict[int, dict]:
        """The last beats of these ranks, or nothing before all have one."""
        keys = [f"beat {rank}" for rank in ranks]
        beats = map(json.loads, self.store.multi_get(keys)) if self.store.check(keys) else []
        return {rank: beat for rank, beat in zip(ranks, beats, strict=False) if not beat["left"]}

    def _watch(self) -> None:
        """In a thread. Counts its own rounds, not seconds: a machine may be suspended, and its clock go on."""
        last: dict[int, dict] = {}
        silent: Counter[int] = Counter()
        while not self.done.wait(INTERVAL):
            try:
                self._beat()
                if self.store.check(["verdict"]):
                    os._exit(1)
                beats = self._read(self.everyone if self.rank == 0 else [0])
                for rank, beat in beats.items():
                    silent[rank] = silent[rank] + 1 if last.get(rank) == beat else 0
                last = beats
                lost = [rank for rank in beats if silent[rank] * INTERVAL >= self.timeout]
                if lost:
                    seconds = max(silent[rank] for rank in lost) * INTERVAL
                    self._give_up(lost_ranks(lost, self._read(self.everyone), f"silent for {seconds} s"))
            except dist.DistError:
                # The store is gone, and its machine with it: connections to the ranks there break as well.
                return

    def _explain(self, error: BaseException) -> None:
        """End the process if a collective failed because of another rank. Returns if the error is this one's own."""
        message, collective_failed = "", isinstance(error, dist.DistError) or "gloo" in str(error)
        if collective_failed:
            self.failure, before = error.__traceback__, self._read(self.everyone)
            time.sleep(BROKEN)
            beats = self._read(self.everyone)
            silent = [rank for rank in beats if before.get(rank) == beats[rank]]
            if silent:
                message = lost_ranks(silent, beats, f"silent for {BROKEN} s")
            elif elsewhere := not_with_the_others(beats):
                message = lost_ranks(elsewhere, beats, "alive, but not where the others are")
        # From here on, the verdict ends the others, and must not end this one.
        self.done.set()
        self.thread.join()
        if message:
            self._give_up(message)
        if self.store.add("verdict", 1) > 1:
            os._exit(1)
        if collective_failed and beats:
            self._say(f"a collective failed, though every rank lives: {places(beats)}")

    def _give_up(self, message: str) -> None:
        """End the process. Of all ranks, the first one says why."""
        if self.store.add("verdict", 1) == 1:
            self._say(message)
        os._exit(1)

    def _say(self, message: str) -> None:
        # Whatever the disk behind it says, the process is to end.
        with suppress(OSError):
            print(f"[rank {self.rank}] error: {message}", file=sys.stderr, flush=True)
