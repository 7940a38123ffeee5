"""Submit a run of this step to Slurm: checked before it waits in the queue, with a copy of all it needs.

    python step06_4d/slurm/submit.py CONFIG [options] [-- options of train.py]

Everything lies in the run's directory, so that no later edit changes a job that waits, runs or is requeued:

    code/  config.yaml  job.sbatch    what it runs
    run.json  jobs                    what status.py needs
    slurm-JOB.out                     the output of the job, and of the first process
    logs/  metrics/  checkpoints/     by attempt: JOB.RESTARTS
    requeue  finished                 marks: told to stop and saved; nothing left to do

A sweep has a directory for each of its runs in that of the array, with the last four lines in it.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro

HERE = Path(__file__).resolve().parent
STEP, ROOT = HERE.parent, HERE.parent.parent
# As for train.py, which imports its siblings by plain name.
sys.path.insert(0, str(STEP))

import torch
from context_parallel import SplitBatches
from dry_run import fake_rank, fake_sequences
from train import Config, build_model

from shared.config import UserError, parse, yaml_arguments
from shared.llama_configs import load_model_config

CONFIG_FIELDS = {field.name for field in dataclasses.fields(Config)}


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
        # Slurm would read a bare number as minutes, YAML an unquoted 24:00:00 as 86400.
        if self.time and not re.fullmatch(r"(\d+-)?\d+:\d\d(:\d\d)?|\d+-\d+", self.time):
            raise UserError(f"--time {self.time} must be like 24:00:00 or 1-00:00:00, and in YAML in quotes")
        if self.after and not re.fullmatch(r"\d+|after\w+:\d+|singleton", self.after):
            raise UserError(f"--after {self.after} must be a job's id, afterany:ID or singleton")
        if self.chain > 1 and self.sweep:
            raise UserError("--chain and --sweep do not go together: chain the runs of a sweep one by one")
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


def run_directory(job: Job, combination: str) -> Path:
    """That of one run of a sweep, or of the only run, whose combination is empty."""
    return job.run_dir / combination.replace(" ", ",")


def check(job: Job, options: list[str]) -> Config:
    """Parse train.py's options, and build a rank of its model without memory: all that could fail after hours in the
    queue, for want of a factor."""
    config = parse(Config, options)
    processes, fixed = job.nodes * job.processes, config.tp * config.pp * config.cp
    if config.dp is None and processes % fixed == 0:
        config.dp = processes // fixed
    if (config.dp or 0) * fixed != processes:
        needed = (config.dp or 1) * fixed
        layout = " · ".join(
            f"{axis} {getattr(config, axis)}" for axis in ("dp", "tp", "pp", "cp") if getattr(config, axis)
        )
        remedy = f"--nodes {needed // job.processes}" if needed % job.processes == 0 else "other sizes"
        raise UserError(
            f"{layout} makes {needed} processes{'' if config.dp else ' or a multiple'}, but --nodes {job.nodes} with "
            f"{job.processes} processes each makes {processes}: give {remedy}"
        )
    if job.processes % config.tp:
        print(
            f"warning: tp {config.tp} does not fit into nodes of {job.processes} processes: its messages, several per "
            "layer, will leave the node",
            file=sys.stderr,
        )
    with fake_rank(0, pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp) as mesh:
        build_model(dataclasses.replace(config, compile=False), load_model_config(config), torch.device("cpu"), mesh)
        SplitBatches(fake_sequences(config), config, 0, config.dp, mesh.get_group("cp"))
    return config


def script(job: Job, options: list[str]) -> str:
    """The job's script: what Slurm is to know, what the run is, and the part that is the same for all."""
    output = "slurm-%A_%a.out" if job.sweep else "slurm-%j.out"
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        # torchrun; it starts the node's processes.
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus_per_task * job.processes,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "array": f"0-{len(combinations(job.sweep)) - 1}" if job.sweep else None,
        "output": job.run_dir / output,
        "open-mode": "append",
        "signal": f"B:USR1@{job.grace}",
    }
    lines = [f"{name}={value}" for name, value in directives.items() if value is not None] + ["requeue", *job.sbatch]
    settings = {
        "ROOT": job.run_dir,
        "PYTHON": job.python,
        "PROCESSES": job.processes,
        "GPUS": job.gpus_per_node,
        "GRACE": job.grace,
        "PREFLIGHT": job.preflight,
        "CHECKPOINTS": "checkpoints" if "checkpoint_dir" in CONFIG_FIELDS else "",
    }
    arrays = {"SRUN": [f"--{option}" for option in job.srun], "SWEEP": combinations(job.sweep), "OPTIONS": options}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{line}" for line in lines),
            "",
            *(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()),
            *(f"{name}=({shlex.join(values)})" for name, values in arrays.items()),
            *job.setup,
            "",
            (HERE / "job.sh").read_text(),
        ]
    )


def prepare(job: Job, text: str, configs: dict[str, Config]) -> None:
    """Make the run's directory: its script, its configuration, and the code as it is now, committed or not."""
    job.run_dir.mkdir(parents=True)
    for source in (ROOT / "shared", STEP):
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(source, job.run_dir / "code" / source.name, ignore=ignore)
    shutil.copy(job.config, job.run_dir / "config.yaml")
    (job.run_dir / "job.sbatch").write_text(text)
    for combination, config in configs.items():
        run = run_directory(job, combination)
        run.mkdir(exist_ok=True)
        (run / "run.json").write_text(json.dumps({"name": f"{job.name} {combination}".strip(), "steps": config.steps}))


def sbatch(job: Job) -> list[str]:
    """Submit, once or as a chain. Returns the ids of the jobs."""
    after = f"afterok:{job.after}" if job.after and job.after.isdigit() else job.after
    ids: list[str] = []
    for _ in range(job.chain):
        dependency = f"afterany:{ids[-1]}" if ids else after
        command = ["sbatch", "--parsable", *([f"--dependency={dependency}"] if dependency else [])]
        try:
            result = subprocess.run([*command, str(job.run_dir / "job.sbatch")], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("there is no sbatch here: submit from a login node, or look with --dry-run") from error
        if result.returncode:
            if ids:
                subprocess.run(["scancel", *ids])
            raise UserError(f"sbatch refused: {result.stderr.strip()}")
        # "ID", or "ID;CLUSTER".
        ids.append(result.stdout.strip().split(";")[0])
    return ids


def submit(args: list[str]) -> None:
    split = args.index("--") if "--" in args else len(args)
    job, extra = read_job(args[:split]), args[split + 1 :]
    device = ["--device", "cuda" if job.gpus_per_node else "cpu"]
    configs = {}
    for combination in combinations(job.sweep) or [""]:
        values = [f"--{pair}" for pair in combination.split()]
        configs[combination] = check(job, ["--config", str(job.config), *device, *extra, *values])
        if job.sweep and configs[combination].export_dir:
            raise UserError("--export-dir: the runs of a sweep would write to the same directory: leave it out")
    options = ["--config", str(job.run_dir / "config.yaml"), *device, *extra]
    text = script(job, options)
    if job.dry_run:
        print(text, end="")
        return
    prepare(job, text, configs)
    try:
        ids = sbatch(job)
    except UserError:
        shutil.rmtree(job.run_dir)
        raise
    for task, combination in enumerate(configs):
        with (run_directory(job, combination) / "jobs").open("a") as file:
            file.writelines(f"{id}_{task}\n" if combination else f"{id}\n" for id in ids)
    processes = f"{job.nodes} × {job.processes} processes"
    print(f"submitted {' '.join(ids)}: {job.name}, {len(configs)} runs of {processes}, in {job.run_dir}")
    print(f"  follow  tail -F {job.run_dir}/slurm-*.out")
    print(f"  state   python {STEP.name}/slurm/status.py {job.run_dir}")
    print(f"  cancel  scancel {' '.join(ids)}")


def main() -> None:
    try:
        submit(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
