"""What a rank does that shares a GPU with others, or has it alone. Imported by new processes."""

from unittest.mock import patch

import parity
import torch
import torch.distributed as dist
from conftest import load_step
from torch import Tensor

from shared import distributed
from shared.config import parse


class Staged:
    """A message of a tensor on a GPU by gloo, which takes those of CPUs alone."""

    def __init__(self, operation: dist.P2POp) -> None:
        self.operation, self.staged = operation, operation.tensor.cpu()
        send, receive = dist.isend, dist.irecv
        if operation.op is send:
            self.work = send(self.staged, group=operation.group, group_dst=operation.group_peer)
        else:
            self.work = receive(self.staged, group=operation.group, group_src=operation.group_peer)

    def wait(self) -> None:
        self.work.wait()
        if self.operation.op is dist.irecv:
            self.operation.tensor.copy_(self.staged)


def record(step: str, args: tuple[str, ...]) -> list[parity.StepRecord]:
    """`parity.record` of a rank that shares the first GPU with all others."""
    init = dist.init_process_group

    def by_gloo(backend: str, timeout: object, device_id: object = None) -> None:
        init("gloo", timeout=timeout)

    def options(axis: str, device: torch.device, timeout: object) -> object:
        made = dist.ProcessGroupGloo._Options()
        made._timeout = timeout
        return made

    with (
        patch.object(dist, "init_process_group", by_gloo),
        patch.object(distributed, "_group_options", options),
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(dist, "batch_isend_irecv", lambda operations: [Staged(operation) for operation in operations]),
    ):
        return [on_cpu(step_record) for step_record in parity.record(step, args)]


def on_cpu(step_record: parity.StepRecord) -> parity.StepRecord:
    def cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    return step_record._replace(gradients=cpu(step_record.gradients), weights=cpu(step_record.weights))


def train(step: str, args: list[str]) -> None:
    module = load_step(step)
    module.train(parse(module.Config, args))
