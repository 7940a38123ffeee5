"""What a machine's GPUs and links can do, and how long an operator or a collective takes there, in seconds."""

from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path

import yaml

from shared.errors import UserError

TABLE = Path(__file__).with_name("machines.yaml")
# A matmul is computed in tiles of so many rows and columns: a smaller or a ragged one takes as long.
TILE = 128


@dataclass(frozen=True)
class Machine:
    """See machines.yaml for the meaning and unit of each number."""

    flops: float
    memory: float
    bandwidth: float
    efficiency: float
    attention: float
    launch: float
    inside: float
    inside_latency: float
    between: float
    between_latency: float
    reduce_scatter: float
    interference: float
    float32: float
    # GPUs of a node.
    node: int = 8

    def rate(self, itemsize: int) -> float:
        """FLOP/s of numbers of so many bytes."""
        return self.flops * (self.float32 if itemsize > 2 else 1)

    def matmul(self, m: int, n: int, k: int, itemsize: int) -> float:
        """(m, k) times (k, n): limited by computing in whole tiles, or by reading and writing memory."""
        tiles = ceil(m / TILE) * ceil(n / TILE) * TILE**2
        compute = 2 * tiles * k / (self.rate(itemsize) * self.efficiency)
        return self.launch + max(compute, (m * k + k * n + m * n) * itemsize / self.bandwidth)

    def moved(self, nbytes: float, operators: int = 1) -> float:
        """Operators that compute little and read or write so many bytes."""
        return operators * self.launch + nbytes / self.bandwidth

    def collective(self, kind: str, nbytes: float, size: int, stride: int) -> float:
        """Of `size` ranks, each `stride` apart: a ring. `nbytes` is the whole payload, as the ledger counts it.

        Ring steps of an all-reduce are 2(n − 1), and of the others n − 1, with 1/n of the payload each. Where several
        ranks of a node are in the ring, as many rings share the node's links to others.
        """
        if size == 1:
            return 0.0
        in_node = max(1, min(size, self.node // stride))
        crosses = size > in_node
        bandwidth = min(self.inside, self.between * in_node) if crosses else self.inside
        steps = (size - 1) * (2 if kind == "all-reduce" else 1)
        # Between nodes only one step in `in_node` has to wait for the slower link.
        between = steps / in_node if crosses else 0
        latency = between * self.between_latency + (steps - between) * self.inside_latency
        seconds = latency + steps / size * nbytes / bandwidth
        return seconds * self.reduce_scatter if kind == "reduce-scatter" else seconds

    def message(self, nbytes: float, distance: int) -> float:
        """From a rank to the one so many ranks further."""
        if distance < self.node:
            return self.inside_latency + nbytes / self.inside
        return self.between_latency + nbytes / self.between


def load_machine(name: str, node: int) -> Machine:
    """Of the table, or of a file in its format with one entry. Raises UserError for neither."""
    table = yaml.safe_load(TABLE.read_text())
    if Path(name).suffix in (".yaml", ".yml"):
        try:
            table = {name: yaml.safe_load(Path(name).read_text())}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--gpu {name}: {' '.join(str(error).split())}") from error
    if name not in table:
        raise UserError(f"--gpu {name} is not known: take one of {', '.join(table)}, or a .yaml file (--calibrate)")
    known = {field.name for field in fields(Machine)} - {"node"}
    if not isinstance(table[name], dict) or table[name].keys() != known:
        raise UserError(f"--gpu {name}: needs exactly {', '.join(sorted(known))}")
    return Machine(**{key: float(value) for key, value in table[name].items()}, node=node)
