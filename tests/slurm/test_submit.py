"""What is submitted, and what is refused before it waits in a queue. No Slurm is needed."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from planner import sibling
from scripts import STEP, load

from shared.config import UserError

CONFIGS = sorted((ROOT / STEP / "configs").glob("*.yaml"))
CPU = ["--gpus-per-node", "0", "--tasks-per-node"]


@pytest.fixture(scope="module")
def submit():
    return load("submit")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text("tp: 2\nmicro-batch-size: 2\nsteps: 30\n")
    return str(tmp_path / "run.yaml")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stands in for Slurm's commands: notes how they are called, in `calls`. What each does is a line of shell."""
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")

    def install(**commands):
        for name, body in commands.items():
            (bin / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{tmp_path}/calls\n{body}\n')
            (bin / name).chmod(0o755)
        return tmp_path / "calls"

    return install


def rendered(submit, capsys, *args):
    submit.submit(["--dry-run", *args])
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    return text


@pytest.mark.quick
def test_script_says_what_was_asked_and_nothing_of_a_site(submit, config, capsys, tmp_path):
    text = rendered(submit, capsys, config, "--nodes", "2", "--run-dir", str(tmp_path / "new"))
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert directives == [
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node"),
        *("chdir", "output", "open-mode", "signal", "requeue"),
    ]
    assert "#SBATCH --gpus-per-node=8\n" in text and "#SBATCH --cpus-per-task=32\n" in text
    assert f"OPTIONS=(--config {tmp_path}/new/config.yaml --device cuda)\n" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.quick
def test_takes_what_the_planner_writes(tmp_path, capsys):
    plan = sibling("plan")
    small = {"model": "tiny", "seq_len": 256, "global_batch_size": 32}
    layout = "dp=1 tp=2 pp=2 cp=2 sequence-parallel virtual-stages=2"
    plan.plan(plan.PlanConfig(**small, gpus=8, explain=layout, write=tmp_path / "run.yaml"))
    capsys.readouterr()
    text = rendered(load("submit"), capsys, str(tmp_path / "run.yaml"), "--nodes", "2", "--gpus-per-node", "4")
    assert "#SBATCH --nodes=2\n" in text
    with pytest.raises(UserError, match="makes 8 processes, but --nodes 1"):
        load("submit").submit([str(tmp_path / "run.yaml"), "--nodes", "1", "--gpus-per-node", "4"])


def test_site_file_then_command_line(submit, config, capsys, tmp_path):
    (tmp_path / "site.yaml").write_text(
        "partition: gpu\naccount: physics\ntime: '24:00:00'\nqos: long\ngpus-per-node: 4\nsetup: [module load cuda]\n"
        "srun: [container-image=a.sqsh]\nsbatch: [exclusive, mem=0]\npython: apptainer exec --nv a.sif python\n"
    )
    site = ["--site", str(tmp_path / "site.yaml")]
    text = rendered(submit, capsys, config, *site, "--qos", "short", "--", "--lr", "1e-3", "--run-name", "it's a")
    lines = text.splitlines()
    for line in (
        "partition=gpu",
        "account=physics",
        "time=24:00:00",
        "qos=short",
        "gpus-per-node=4",
        "exclusive",
        "mem=0",
    ):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --qos=long" not in lines and "module load cuda" in lines
    assert "SRUN=(--container-image=a.sqsh)" in lines and "PYTHON='apptainer exec --nv a.sif python'" in lines
    options = subprocess.run(
        ["bash"], input="\n".join([*lines[: lines.index("module load cuda")], 'printf "%s|" "${OPTIONS[@]}"']),
        capture_output=True, text=True,
    )  # fmt: skip
    assert options.stdout.endswith("--device|cuda|--lr|1e-3|--run-name|it's a|")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_the_gpus_of_their_names(submit, capsys, path):
    gpus = int(re.search(r"(\d+)gpu", path.stem).group(1))
    assert f"#SBATCH --nodes={gpus // 8}\n" in rendered(submit, capsys, str(path), "--nodes", str(gpus // 8))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--nodes", "2", *CPU, "2", "--", "--dp", "4"],
            "dp 4 · tp 2 · pp 1 · cp 1 makes 8 .* makes 4: give --nodes 4",
        ),
        ([*CPU, "3"], "tp 2 · pp 1 · cp 1 makes 2 processes or a multiple, but .* makes 3: give other sizes"),
        ([*CPU, "32"], "--global-batch-size 16 is not a multiple of 16 data-parallel ranks times --micro-batch-size 2"),
        ([*CPU, "6", "--", "--pp", "3", "--num-hidden-layers", "2"], "3 pipeline stages need a layer each"),
        (["--", "--lr", "-1"], "--lr must be a number"),
        (["--gpus-per-node", "8", "--tasks-per-node", "4"], "--tasks-per-node 4 must be --gpus-per-node 8"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (CPU[:2], "--tasks-per-node must be at least 1"),
        (["--time", "86400"], "--time 86400 must be like 24:00:00"),
        (["--time", "24:00"], "--time 24:00 must be like"),
        (["--time", "0:07:00"], "--time 0:07:00, 420 s, leaves nothing between --preflight 120 and --grace 300"),
        (["--after", "yesterday"], "--after yesterday must be"),
        (["--name", "a b"], "--name a b must have no blanks"),
        (["--sweep", "lr"], "--sweep lr must be like"),
        (["--sweep", "dataset=a/b"], "without blanks and slashes"),
        (["--sweep", "lr=1", "lr=2"], "has an option twice"),
        ([*CPU, "2", "--sweep", "tp=1,2,3"], "tp 3 .* makes 3 processes"),
        (["--sweep", "lr=1,2", "--chain", "2"], "--chain and --sweep do not go together"),
        ([*CPU, "2", "--", "--tp", "0"], "--dp, --tp, --pp and --cp must be at least 1"),
        ([*CPU, "2", "--", "--dp", "0"], "--dp, --tp, --pp and --cp must be at least 1"),
        ([*CPU, "2", "--", "--metrics-file", "m.jsonl"], "lie in the run's directory: leave them out"),
        ([*CPU, "2", "--sweep", "seed=1,2", "--", "--export-dir", "out"], "would write to the same place"),
        ([*CPU, "2", "--sweep", "seed=1,2", "--", "--timeline", "a.png"], "--timeline: .* to the same place"),
        ([*CPU, "2", "--", "--dry-run", "--dp", "1"], "trains nothing"),
        ([*CPU, "2", "--run-dir", str(ROOT / STEP / "configs" / "x")], "lies in the code, of which it gets a copy"),
    ],
)
def test_refused_before_it_is_submitted(submit, config, slurm, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    calls = slurm(sbatch="echo 1")
    with pytest.raises(UserError, match=message):
        submit.submit([config, *args])
    assert not calls.exists() and not (tmp_path / "runs").exists()


def test_tp_that_leaves_the_node_is_warned_of(submit, config, capsys):
    submit.submit([config, "--nodes", "2", *CPU, "1", "--dry-run"])
    assert "warning: tp 2 does not fit into nodes of 1 processes" in capsys.readouterr().err
    submit.submit([config, "--nodes", "2", *CPU, "2", "--dry-run"])
    assert not capsys.readouterr().err


def test_run_directory_has_all_that_runs(submit, config, slurm, tmp_path, capsys):
    run = tmp_path / "runs" / "a"
    calls = slurm(sbatch="echo '17;cluster'")
    submit.submit([config, *CPU, "2", "--run-dir", str(run), "--after", "12", "--", "--steps", "40"])
    assert calls.read_text() == f"sbatch --parsable --dependency=afterok:12 {run}/job.sbatch\n"
    assert f"submitted 17: run, 1 runs of 1 × 2 processes, in {run}" in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == "tp: 2\nmicro-batch-size: 2\nsteps: 30\n"
    assert json.loads((run / "run.json").read_text()) == {"name": "run", "steps": 40}
    assert (run / "jobs").read_text() == "17\n"
    # The code as it is in the working tree, and what runs is the copy.
    for name in ("shared/model.py", f"{STEP}/train.py", f"{STEP}/slurm/node.sh"):
        assert (run / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(run.glob("**/__pycache__"))
    command = [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('shared.model').origin)"]
    environment = os.environ | {"PYTHONPATH": str(run / "code")}
    where = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    assert where == f"{run}/code/shared/model.py\n"

    with pytest.raises(UserError, match=rf"exists: choose another --name .* sbatch {run}/job.sbatch"):
        submit.submit([config, *CPU, "2", "--run-dir", str(run)])
    assert calls.read_text().count("\n") == 1


def test_sweep_is_an_array_of_runs(submit, config, slurm, tmp_path):
    run = tmp_path / "sweep"
    slurm(sbatch="echo 5")
    submit.submit([config, *CPU, "2", "--run-dir", str(run), "--sweep", "lr=1e-4,3e-4", "tp=1,2"])
    text = (run / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3\n" in text and f"#SBATCH --output={run}/slurm-%A_%a.out\n" in text
    assert "SWEEP=('lr=1e-4 tp=1' 'lr=1e-4 tp=2' 'lr=3e-4 tp=1' 'lr=3e-4 tp=2')\n" in text
    names = ["lr=1e-4,tp=1", "lr=1e-4,tp=2", "lr=3e-4,tp=1", "lr=3e-4,tp=2"]
    assert [(run / name / "jobs").read_text() for name in names] == ["5_0\n", "5_1\n", "5_2\n", "5_3\n"]
    assert json.loads((run / names[1] / "run.json").read_text())["name"] == "run lr=1e-4 tp=2"


def test_chain_waits_for_the_job_before(submit, config, slurm, tmp_path):
    calls = slurm(sbatch=f"wc -l <{tmp_path}/calls")
    run = tmp_path / "chain"
    submit.submit([config, *CPU, "2", "--run-dir", str(run), "--after", "singleton", "--chain", "3"])
    dependencies = re.findall(r"--dependency=(\S+)", calls.read_text())
    assert dependencies == ["singleton", "afterany:1", "afterany:2"]
    assert (run / "jobs").read_text() == "1\n2\n3\n"


@pytest.mark.quick
def test_nothing_remains_of_what_slurm_refuses(submit, config, slurm, tmp_path):
    calls = slurm(sbatch=f'echo "no such partition" >&2; [ $(wc -l <{tmp_path}/calls) = 1 ] && echo 8', scancel="")
    run = tmp_path / "refused"
    with pytest.raises(UserError, match="sbatch refused: no such partition"):
        submit.submit([config, *CPU, "2", "--run-dir", str(run), "--chain", "2"])
    assert calls.read_text().endswith("scancel 8\n") and not run.exists()


SCONTROL = '[ "$1" = show ] && printf "n7\\nn8\\nJobState=RUNNING"'


def job_script(submit, config, slurm, tmp_path, step, scontrol=SCONTROL, **commands):
    """Run a job's script, with a shell line in the place of each step, and return its output and exit code."""
    run = tmp_path / "job"
    slurm(**{"sbatch": "echo 3", "srun": step, "scontrol": scontrol, "squeue": "", **commands})
    if not run.exists():
        submit.submit([config, *CPU, "2", "--run-dir", str(run)])
    environment = os.environ | {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_CPUS_PER_TASK": "8"}
    # Of a job in which this one was submitted by hand.
    environment |= {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1"}
    result = subprocess.run(["bash", run / "job.sbatch"], capture_output=True, text=True, env=environment, timeout=60)
    return result.stdout, result.returncode, run


def test_job_that_slurm_does_not_requeue(submit, config, slurm, tmp_path):
    """Its exit code is no success, and it says how to go on."""
    said, code, run = job_script(submit, config, slurm, tmp_path, "touch $RUN/requeue")
    assert code == 85 and f"To go on: sbatch {run}/job.sbatch" in said and not (run / "finished").exists()
    assert "scontrol requeue 3" in (tmp_path / "calls").read_text() and "rendezvous at n7:20006" in said
    # The mark is of that attempt only.
    said, code, run = job_script(submit, config, slurm, tmp_path, "true")
    assert code == 0 and (run / "finished").exists()
    said, code, run = job_script(submit, config, slurm, tmp_path, "exit 9")
    assert code == 0 and "was finished before" in said


def test_job_asks_a_controller_that_starts_anew_again(submit, config, slurm, tmp_path):
    deaf = f'if [ "$2" = job ] && mkdir {tmp_path}/deaf; then exit 1; fi; {SCONTROL}'
    said, code, _run = job_script(submit, config, slurm, tmp_path, "touch $RUN/requeue", deaf, sleep="")
    assert code == 85 and "saved; JobState=RUNNING" in said and "scontrol requeue 3" in (tmp_path / "calls").read_text()


def test_step_gets_the_environment_of_the_job_alone(submit, config, slurm, tmp_path):
    slurm(sbatch='[ -z "$SLURM_JOB_ID" ] && [ "$SLURM_CONF" = c ] && echo 3')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "1")
        patch.setenv("SLURM_CONF", "c")
        submit.submit([config, *CPU, "2", "--run-dir", str(tmp_path / "job")])
    step = 'echo "$SLURM_EXPORT_ENV, $SLURM_CPU_BIND, $SLURM_ARRAY_TASK_ID, $HEAD"'
    said, code, run = job_script(submit, config, slurm, tmp_path, step)
    assert code == 0 and "ALL, , , n7" in said and (run / "jobs").read_text().split()[-1] == "3"


def test_a_task_of_an_array_is_known_by_its_number(submit, config, slurm, tmp_path):
    """As squeue lists it: two of them in one run would not know each other by another one."""
    squeue = 'if [[ $* = *--jobs* ]]; then echo 100_2; else printf "100_1\\n100_2\\n"; fi'
    said, code, run = job_script(submit, config, slurm, tmp_path, "true", squeue=squeue)
    assert code == 0 and (run / "jobs").read_text() == "3\n100_2\n"
    (run / "finished").unlink()
    (run / "jobs").write_text("100_1\n")
    said, code, run = job_script(submit, config, slurm, tmp_path, "true", squeue=squeue)
    assert code == 1 and "job 100_1 runs in" in said


def test_job_that_fails(submit, config, slurm, tmp_path):
    said, code, run = job_script(submit, config, slurm, tmp_path, '[[ "$*" = *preflight* ]] || exit 9')
    assert code == 9 and "training failed with exit code 9" in said and not (run / "finished").exists()
    said, code, run = job_script(submit, config, slurm, tmp_path, "exit 9")
    assert code == 1 and "preflight failed, nothing was trained" in said


def test_job_told_to_stop_before_it_trains(submit, config, slurm, tmp_path):
    """srun dies of a signal that comes as soon as it is started."""
    listens = "sleep 0.5; trap 'touch $RUN/requeue; exit 0' USR1; for i in {1..200}; do sleep 0.1; done"
    step = f'if [[ "$*" = *preflight* ]]; then kill -USR1 $PPID; sleep 1; else {listens}; fi'
    said, code, _run = job_script(submit, config, slurm, tmp_path, step)
    assert code == 85 and "time is nearly up" in said and "saved; JobState" in said, said


DUMPS = """
import os, pickle
group = {"7": {"name": "7", "desc": "mesh_dp", "ranks": "[0, 1]"}}
frame = {"name": "finish", "filename": "data_parallel.py", "line": 153}
for rank, called in enumerate((3, 2)):
    entries = [
        {
            "record_id": i,
            "pg_id": 1,
            "process_group": ("7", "mesh_dp"),
            "collective_seq_id": i + 1,
            "p2p_seq_id": 0,
            "op_id": i + 1,
            "profiling_name": "nccl:all_reduce",
            "time_created_ns": i,
            "input_sizes": [[64]],
            "input_dtypes": ["Float"],
            "output_sizes": [[64]],
            "output_dtypes": ["Float"],
            "state": "completed" if i < 2 else "scheduled",
            "is_p2p": False,
            "frames": [frame],
        }
        for i in range(called)
    ]
    with open(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + str(rank), "wb") as file:
        pickle.dump({"version": "2.10", "pg_config": group, "pg_status": {}, "entries": entries}, file)
"""


def test_job_that_hangs_says_who_is_missing_where(submit, config, slurm, tmp_path):
    """By what torch's flight recorder has written, in the form that torch 2.13 writes it with NCCL."""
    (tmp_path / "dumps.py").write_text(DUMPS)
    hangs = f"if ! [[ $* = *preflight* ]]; then {sys.executable} {tmp_path}/dumps.py; exit 1; fi"
    said, code, run = job_script(submit, config, slurm, tmp_path, hangs)
    assert code == 1 and sorted(path.name for path in (run / "flight" / "3.0").iterdir()) == ["rank_0", "rank_1"]
    assert "what the flight recorder of 2 ranks says" in said and "sequence number: 3" in said, said
    assert "missing ranks: {1}" in said and "finish at data_parallel.py:153" in said and "training failed" in said


@pytest.mark.parametrize(("body", "code", "marked"), [("", 0, False), ("sys.exit(85)", 0, True), ("1 / 0", 1, False)])
def test_worker_marks_what_is_to_be_requeued(tmp_path, body, code, marked):
    (tmp_path / "sibling.py").write_text("import sys\n")
    (tmp_path / "survive").mkdir()
    (tmp_path / "survive" / "stopping.py").write_text("REQUEUE = 85\n")
    (tmp_path / "train.py").write_text(f"from sibling import sys\nassert sys.argv[1:] == ['--lr', '1']\n{body}\n")
    environment = os.environ | {"CODE": str(tmp_path), "RUN": str(tmp_path)}
    command = [sys.executable, str(ROOT / STEP / "slurm" / "worker.py"), "--lr", "1"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == code
    assert (tmp_path / "requeue").exists() == marked
