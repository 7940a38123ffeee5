"""Submit a run of this step to Slurm: checked before it waits in the queue, with a copy of all it needs.

    python step06_4d/slurm/submit.py CONFIG [options] [-- options of train.py]

Everything lies in the run's directory, so that no later edit changes a job that waits, runs or is requeued:

    code/  config.yaml  job.sbatch    what it runs
    run.json  jobs                    what status.py needs
    slurm-JOB.out                     the output of the job, and of the first process
    logs/  metrics/                   of each attempt, JOB.RESTARTS: the output of every rank; rank 0's metrics
    flight/                           of each attempt that hung: the last messages of every rank
    checkpoints/                      from which the next attempt goes on
    requeue  finished                 marks: told to stop, and has saved; nothing left to do

A sweep has in that directory one for each of its runs, with what is a run's own.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP, ROOT = HERE.parent, HERE.parent.parent
# As for train.py, which imports its siblings by plain name.
sys.path.insert(0, str(STEP))

from job import Job, combinations, read_job
from observe.dry_run import check_layout
from train import Config, Trainer

from shared.config import UserError, check_writable, parse
from shared.corpus import check_configuration


def run_directory(job: Job, combination: str) -> Path:
    """That of one run of a sweep, or of the only run, whose combination is empty."""
    return job.run_dir / combination.replace(" ", ",")


def check(job: Job, options: list[str]) -> Config:
    """Parse train.py's options, and build a rank's trainer without memory: what fails for want of a factor is not to
    fail after hours in the queue."""
    if any(option.startswith("--stop-after") for option in options):
        raise UserError("--stop-after: a job saves and stops when its time is up, and goes on by itself: leave it out")
    config = parse(Config, options)
    check_configuration(config)
    if config.checkpoint_dir or config.metrics_file:
        raise UserError("--checkpoint-dir and --metrics-file lie in the run's directory: leave them out")
    if config.dry_run:
        raise UserError("--dry-run trains nothing: give it before --, to look at the job, or to train.py")
    if min(size for size in (config.dp, config.tp, config.pp, config.cp) if size is not None) < 1:
        raise UserError("--dp, --tp, --pp and --cp must be at least 1")
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
    check_layout(config, Trainer)
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
        # Of the paths in the options, also when it is submitted again from elsewhere.
        "chdir": Path.cwd(),
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
    }
    arrays = {"SRUN": [f"--{option}" for option in job.srun], "SWEEP": combinations(job.sweep), "OPTIONS": options}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{line}" for line in lines),
            "",
            *(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()),
            *(f"{name}=({shlex.join(values)})" for name, values in arrays.items()),
            "# Not those of a job in which this one may have been submitted.",
            '[ ${#SWEEP[@]} -gt 0 ] || unset "${!SLURM_ARRAY_@}"; unset "${!SLURM_CPU_BIND@}"',
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
    environment = dict(os.environ)
    if "SLURM_JOB_ID" in environment:
        # Called within a job, whose variables are not to be taken for those of the new one.
        kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
        environment = {k: v for k, v in environment.items() if not k.startswith("SLURM_") or k in kept}
    for _ in range(job.chain):
        dependency = f"afterany:{ids[-1]}" if ids else after
        command = ["sbatch", "--parsable", *([f"--dependency={dependency}"] if dependency else [])]
        try:
            command.append(str(job.run_dir / "job.sbatch"))
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
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
        for option in ("export_dir", "tensorboard", "timeline", "trace_steps") if job.sweep else ():
            if getattr(configs[combination], option):
                name = option.replace("_", "-")
                raise UserError(f"--{name}: the runs of a sweep would write to the same place: leave it out")
    options = ["--config", str(job.run_dir / "config.yaml"), *device, *extra]
    text = script(job, options)
    if job.dry_run:
        print(text, end="")
        return
    if any(job.run_dir.resolve().is_relative_to(copied) for copied in (STEP, ROOT / "shared")):
        raise UserError(f"--run-dir {job.run_dir} lies in the code, of which it gets a copy: choose another")
    check_writable(job.run_dir, "--run-dir")
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
