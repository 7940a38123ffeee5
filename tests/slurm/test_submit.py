"""What is submitted, and what is refused before it waits in a queue. No Slurm is needed."""

import json
import os
import re
import subprocess
import sys

import pytest
import scripts
from conftest import ROOT
from planner import sibling
from scripts import STEP, load

from shared.config import UserError

CONFIGS = sorted((ROOT / STEP / "configs").glob("*.yaml"))
CPU = ["--gpus-per-node", "0", "--tasks-per-node"]
submit, config, slurm = scripts.submit, scripts.config, scripts.slurm


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
    # Beyond the positions of the model, which it says.
    with pytest.raises(UserError, match="or pass --max-position-embeddings 8192"):
        plan.plan(plan.PlanConfig(**small | {"seq_len": 8192}))
    small["max_position_embeddings"] = 8192
    plan.plan(plan.PlanConfig(**small, gpus=8, explain=layout, write=tmp_path / "run.yaml"))
    assert "max-position-embeddings: 8192" in (tmp_path / "run.yaml").read_text()
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
        ([*CPU, "2", "--", "--stop-after", "5"], "--stop-after: a job saves and stops when its time is up"),
        (
            [*CPU, "2", "--", "--dataset", ".", "--dataset-config", "small"],
            "is of data sets of the hub, and . is local",
        ),
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
