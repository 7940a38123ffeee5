"""When a rank is lost or hangs, the others wait for it, each somewhere else. Here they say in one line which rank it is
and which collective misses it, and end, so that whoever started the run can start it again.

Every rank has a thread that writes a beat once per second to the store in which the ranks have met: that it lives, and
what its training waits for. The thread lives on while training computes, compiles, or waits for a disk.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shared.config import UserError

# Name in torch.distributed -> in a message. Those that checkpoints call are not among them.
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather_single": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "isend": "send",
    "irecv": "receive",
    "batch_isend_irecv": "exchange",
}
# Seconds between two beats, and after which a rank that was heard of no more is lost, if a connection has broken.
INTERVAL, BROKEN = 1, 3
SOURCES = (Path(__file__).parent, Path(__file__).parent.parent / "shared")


@dataclass
class HeartbeatConfig:
    """The options of watching over each other."""

    # Seconds without a sign of life from a rank after which the others give up, and say which it is, such as 60. 0:
    # they do not watch, and wait for --timeout.
    heartbeat_timeout: int = 0

    def validate(self) -> None:
        super().validate()
        if self.heartbeat_timeout < 0 or 0 < self.heartbeat_timeout < BROKEN:
            raise UserError(f"--heartbeat-timeout must be 0 or at least {BROKEN}, but is {self.heartbeat_timeout}")


class Heartbeat:
    """Context of a training loop, which sets `step`. Rank 0 watches over all, the others over rank 0: per second, the
    store is asked for one value by every rank, and for those of all by one."""

    def __init__(self, config: HeartbeatConfig, mesh: DeviceMesh) -> None:
        self.config, self.rank, self.step = config, dist.get_rank(), 0
        self.names = {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names}
        self.calls: Counter[str] = Counter()
        self.works: WeakKeyDictionary = WeakKeyDictionary()
        # What this rank waits for.
        self.waits: dict | None = None
        self.beats = 0
        self.done, self.replaced = threading.Event(), ExitStack()

    def __enter__(self) -> "Heartbeat":
        if self.config.heartbeat_timeout:
            # A connection of its own: on the other one, training may wait.
            self.store = dist.distributed_c10d._get_default_store().clone()
            for name in COLLECTIVES:
                self._observe(name)
            self._observe_wait()
            self._beat()
            self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.replaced.close()
        if self.config.heartbeat_timeout:
            if kind and not issubclass(kind, UserError):
                try:
                    self._explain(error)
                except dist.DistError:
                    text = "lost the store of all ranks, so the process that has it, torchrun or rank 0"
                    print(f"[rank {self.rank}] error: {text}", file=sys.stderr, flush=True)
                    os._exit(1)
            self.done.set()
            self.thread.join()
            self._beat(left=True)

    # What training does, observed from outside

    def _observe(self, name: str) -> None:
        function = getattr(dist, name)

        def observed(*args: object, **kwargs: object) -> object:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            given = [op.group for op in args[0]] if name == "batch_isend_irecv" else [*args, *kwargs.values()]
            group = next((value for value in given if isinstance(value, ProcessGroup)), dist.group.WORLD)
            self.calls[group.group_name] += 1
            call = {
                "kind": COLLECTIVES[name],
                "number": self.calls[group.group_name],
                "group": self.names.get(group.group_name, group.group_desc),
                "ranks": dist.get_process_group_ranks(group),
            }
            self.waits = call
            works = function(*args, **kwargs)
            self.waits = None
            for work in works if isinstance(works, list) else [works] if works else []:
                self.works[work] = call
            return works

        self._replace(dist, name, observed)

    def _observe_wait(self) -> None:
        wait = dist.Work.wait

        def observed(work: dist.Work, *args: object) -> bool:
            call = self.works.get(work)
            if not call:
                # Of another thread, or of a collective that has been noted itself.
                return wait(work, *args)
            self.waits = call
            result = wait(work, *args)
            self.waits = None
            return result

        self._replace(dist.Work, "wait", observed)

    def _replace(self, owner: object, name: str, function: object) -> None:
        self.replaced.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)

    # What ranks tell each other

    def _beat(self, left: bool = False) -> None:
        self.beats += 1
        beat = {"beat": self.beats, "step": self.step, "waits": self.waits, "at": place(), "left": left}
        self.store.set(f"beat {self.rank}", json.dumps(beat))

    def _read(self, ranks: list[int]) -> dict[int, dict]:
        """The last beats of these ranks, or nothing before all have one."""
        keys = [f"beat {rank}" for rank in ranks]
        beats = map(json.loads, self.store.multi_get(keys)) if self.store.check(keys) else []
        return {rank: beat for rank, beat in zip(ranks, beats, strict=False) if not beat["left"]}

    def _watch(self) -> None:
        """In a thread. Counts its own rounds, not seconds: a machine may be suspended, and its clock go on."""
        everyone = list(range(dist.get_world_size()))
        last: dict[int, dict] = {}
        silent: Counter[int] = Counter()
        while not self.done.wait(INTERVAL):
            try:
                self._beat()
                if self.store.check(["verdict"]):
                    os._exit(1)
                beats = self._read(everyone if self.rank == 0 else [0])
                for rank, beat in beats.items():
                    silent[rank] = silent[rank] + 1 if last.get(rank) == beat else 0
                last = beats
                seconds = max(silent.values(), default=0) * INTERVAL
                if seconds >= self.config.heartbeat_timeout:
                    lost = [rank for rank in beats if silent[rank] * INTERVAL >= self.config.heartbeat_timeout]
                    self._give_up(sentence(lost, self._read(everyone), f"silent for {seconds} s"))
            except dist.DistError:
                # The store is gone, and its machine with it: connections to the ranks there break as well.
                return

    def _explain(self, error: BaseException) -> None:
        """End the process if a collective failed because of another rank. Returns if the error is this one's own."""
        reason, everyone = " ".join(str(error).split()), list(range(dist.get_world_size()))
        late, state = [], ""
        if isinstance(error, dist.DistError) or "gloo" in reason:
            before = self._read(everyone)
            time.sleep(BROKEN)
            beats = self._read(everyone)
            late, state = [rank for rank in beats if before.get(rank) == beats[rank]], f"silent for {BROKEN} s"
            if not late and self.waits:
                late, state = [rank for rank, beat in beats.items() if not beat["waits"]], "alive, but not there"
        # From here on, the verdict ends the others, and must not end this one.
        self.done.set()
        self.thread.join()
        if late:
            self._give_up(sentence(late, beats, state))
        elif self.store.add("verdict", 1) > 1:
            os._exit(1)

    def _give_up(self, message: str) -> None:
        """End the process. Of all ranks, the first one says why."""
        if self.store.add("verdict", 1) == 1:
            print(f"[rank {self.rank}] error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def sentence(lost: list[int], beats: dict[int, dict], state: str) -> str:
    """Who is missing, and where."""
    names = ("rank " if len(lost) == 1 else "ranks ") + ", ".join(map(str, lost))
    last = beats[lost[0]]
    text = f"lost {names} ({state}; last heard of in step {last['step']}, at {last['at']})"
    for rank, beat in beats.items():
        waits = beat["waits"]
        if rank not in lost and waits and set(lost) & set(waits["ranks"]):
            ranks = ", ".join(map(str, waits["ranks"]))
            what = f"{waits['kind']} {waits['number']} of {waits['group']} (ranks {ranks})"
            return f"{text}; rank {rank} waits for it in step {beat['step']}, in {what}"
    return text


def place() -> str:
    """Where the main thread is in the code of this project, but for this file."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame and (Path(frame.f_code.co_filename).parent not in SOURCES or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "its start"
