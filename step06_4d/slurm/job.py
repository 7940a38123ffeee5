"""The options of a job: what is the site's, what is the run's, and what can be seen to be wrong with them."""

import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro

from shared.config import UserError, yaml_arguments


@dataclass
class Job:
    """Submit a run of this step to Slurm. Options of train.py follow after `--`."""

    # YAML file of train.py's options.
    config: Annotated[Path, tyro.conf.Positional]

    # YAML file of the options below (`partition: gpu`), read before the command line, which overrides it: what is the
    # same for all jobs of a cluster.
    site: Path | None = None
    # Nodes of the job.
    nodes: int = 1
    # GPUs of each node, one process each. 0 trains on CPUs.
    gpus_per_node: int = 8
    # Processes on each node. Default: one per GPU.
    tasks_per_node: int | None = None
    # CPU cores of a process.
    cpus_per_task: int = 4
    # Time limit, such as 24:00:00 or 1-00:00:00 (in YAML in quotes). Default: the partition's.
    time: str | None = None
    # Seconds before the time limit at which training is told to save, and the job goes back to the queue.
    grace: int = 300
    partition: str | None = None
    account: str | None = None
    qos: str | None = None

    # Name of the job. Default: that of the configuration.
    name: str | None = None
    # Must not exist; on a file system of all nodes. Default: runs/NAME.
    run_dir: Path | None = None
    # An array of runs, one for each combination: `--sweep lr=1e-4,3e-4 tp=1,2`.
    sweep: tuple[str, ...] = ()
    # Wait for a job: its id (to end well), afterany:ID (to end), or singleton (no other job of that name runs).
    after: str | None = None
    # Jobs in a row, each to go on where the one before ended, whatever ended it: where requeueing is forbidden.
    chain: int = 1

    # Seconds that the check of all nodes before training may take; 0 checks nothing.
    preflight: int = 120
    # What runs Python on a node, such as "apptainer exec --nv torch.sif python". Default: this Python.
    python: str = sys.executable
    # Shell lines for the script, such as "module load cuda" "export NCCL_SOCKET_IFNAME=ib0".
    setup: tuple[str, ...] = ()
    # More options of srun, without dashes, such as container-image=torch.sqsh (pyxis).
    srun: tuple[str, ...] = ()
    # More options of sbatch, without dashes, such as exclusive mem=0 exclude=n17.
    sbatch: tuple[str, ...] = ()
    # Print the script, and do nothing.
    dry_run: bool = False

    @property
    def processes(self) -> int:
        """Of a node."""
        return self.gpus_per_node if self.tasks_per_node is None else self.tasks_per_node

    def validate(self) -> None:
        """Complete the names. Raise UserError for what sbatch would not notice."""
        self.name = self.name or self.config.stem
        self.run_dir = (self.run_dir or Path("runs") / self.name).absolute()
        for name in ("nodes", "processes", "cpus_per_task", "grace", "chain"):
            if getattr(self, name) < 1:
                option = "tasks-per-node" if name == "processes" else name.replace("_", "-")
                raise UserError(f"--{option} must be at least 1, not {getattr(self, name)}")
        if self.gpus_per_node and self.processes != self.gpus_per_node:
            raise UserError(
                f"--tasks-per-node {self.processes} must be --gpus-per-node {self.gpus_per_node}: a process has one GPU"
            )
        # Slurm would read 24:00 and 1440 as minutes, YAML an unquoted 24:00:00 as 86400.
        if self.time and not (match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", self.time)):
            raise UserError(f"--time {self.time} must be like 24:00:00 or 1-00:00:00, and in YAML in quotes")
        if self.time:
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            if limit <= self.grace + self.preflight:
                raise UserError(
                    f"--time {self.time}, {limit} s, leaves nothing between --preflight {self.preflight} and "
                    f"--grace {self.grace} to train: raise it"
                )
        if self.after and not re.fullmatch(r"\d+|after\w+:\d+|singleton", self.after):
            raise UserError(f"--after {self.after} must be a job's id, afterany:ID or singleton")
        if self.chain > 1 and self.sweep:
            raise UserError("--chain and --sweep do not go together: chain the runs of a sweep one by one")
        if self.python == sys.executable and " " in self.python:
            raise UserError(f"the path of this Python, {self.python}, has a blank: name one without by --python")
        if self.run_dir.exists():
            raise UserError(
                f"{self.run_dir} exists: choose another --name or --run-dir; to go on with that run: "
                f"sbatch {self.run_dir / 'job.sbatch'}"
            )
        for option, value in {"name": self.name, "run-dir": str(self.run_dir)}.items():
            # Slurm would put a job's number there.
            if re.search(r"[\s%]", value):
                raise UserError(f"--{option} {value} must have no blanks and no %")


def read_job(args: list[str]) -> Job:
    job = tyro.cli(Job, args=args)
    if job.site:
        site = tyro.cli(Job, args=[str(job.config), *yaml_arguments(job.site, Job)])
        job = tyro.cli(Job, args=args, default=site)
    job.validate()
    return job


def combinations(sweep: tuple[str, ...]) -> list[str]:
    """`("lr=1e-4,3e-4", "tp=1,2")` to `["lr=1e-4 tp=1", "lr=1e-4 tp=2", ...]`."""
    axes = []
    for axis in sweep:
        if not re.fullmatch(r"[\w-]+=[^\s=/,]+(,[^\s=/,]+)*", axis):
            raise UserError(f"--sweep {axis} must be like lr=1e-4,3e-4, and values without blanks and slashes")
        name, values = axis.split("=")
        axes.append([f"{name}={value}" for value in values.split(",")])
    names = [axis[0].split("=")[0] for axis in axes]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep {' '.join(sweep)} has an option twice")
    return [" ".join(combination) for combination in product(*axes)] if axes else []
