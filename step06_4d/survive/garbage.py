"""Python collects garbage when it has made enough objects, which each rank has at a moment of its own. The others then
wait for it at the next collective, so that a step waits for the sum of the ranks' pauses. Here all pause together."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.config import UserError


@dataclass
class Config:
    """The options of garbage collection."""

    # Collect Python's garbage after every this many steps, in the same step on all ranks. 0 leaves it to Python.
    gc_every: int = 0

    def validate(self) -> None:
        super().validate()
        if self.gc_every < 0:
            raise UserError(f"--gc-every must not be negative, but is {self.gc_every}")


@contextmanager
def collected(config: Config) -> Iterator[Callable[[int], None]]:
    """Context of a training loop. Yields what to call after each step, with its number."""
    if not config.gc_every:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.disable()
    # What lives by now, the imported modules above all, lives to the end: no collection has to look at it again.
    gc.collect()
    gc.freeze()
    try:
        yield lambda step: None if step % config.gc_every else gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
