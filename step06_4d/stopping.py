"""Stops a run that is told to stop, so that it can go on later: by SIGTERM or SIGUSR1, which a cluster sends before it
takes its machines away, and perhaps to one rank only. All ranks finish the step, save, and end."""

import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist
from agreement import agreement_traffic
from checkpoint import CheckpointConfig
from torch.distributed.device_mesh import DeviceMesh

from shared.config import UserError
from shared.ledger import Traffic

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The exit code of a run that has stopped and saved: start the same command again.
REQUEUE = 85


class Stopping:
    """Context of a training loop: notes these signals, or leaves them their meaning if nothing is saved anyway."""

    def __init__(self, config: CheckpointConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.received, self.told, self.stops = 0, 0, False

    def __enter__(self) -> "Stopping":
        numbers = SIGNALS if self.config.checkpoint_dir else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        # A second signal must not disturb the way out: torchrun passes on what Slurm has sent to every process already.
        if not self.stops:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step: all-reduces 4 bytes over all of them, and waits for it.

        The last step needs no stop: what is left to do is less than starting again.
        """
        if self.config.checkpoint_dir:
            told = torch.tensor(self.received, dtype=torch.int32, device=self.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            # Not into `received`, or a signal that has come meanwhile would be lost.
            self.told = int(told)
            self.stops = self.told > 0 and step < self.config.steps
        return self.stops

    def leave(self, saved: bool) -> None:
        """End the process, once all ranks have saved. Raises UserError if they could not: started again, the run would
        only come back to where it is."""
        if not saved:
            raise UserError("told to stop, but the last step could not be saved: make room, then the same command")
        if dist.get_rank() == 0:
            name = signal.Signals(self.told).name
            print(f"told to stop ({name}), and saved: the same command goes on from there (exit {REQUEUE})", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(REQUEUE)


def stopping_traffic(
    config: CheckpointConfig, mesh: DeviceMesh, others: dict[tuple[str, str], Traffic]
) -> dict[tuple[str, str], Traffic]:
    """Payload per step of a rank, with that of the same group among the `others`."""
    return agreement_traffic(mesh, others, torch.int32.itemsize) if config.checkpoint_dir else {}
