"""Jobs of a real Slurm, on virtual nodes of this machine: trained, told to stop, preempted, lost, refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, missing
from conftest import ROOT, load_step
from ranks import run_ranks
from safetensors.torch import load_file
from scripts import STEP, load

from shared.config import parse

MISSING = missing()
ON_TWO_NODES = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2", "--cpus-per-task", "1"]
ON_ONE_NODE = ["--nodes", "1", *ON_TWO_NODES[2:]]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no Slurm: {MISSING}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=4) as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, tmp_path_factory):
    """A job of two minutes, told to stop after one. It runs while others are tested: test_time_limit looks at it.

    Slurm looks at its clock every 30 s, and may send a signal as much too early: before a shorter job has begun.
    """
    run = tmp_path_factory.mktemp("limited") / "run"
    [job] = submit_stand_in(
        cluster, run, *ON_ONE_NODE, "--time", "0:02:00", "--grace", "60", "--sbatch", "hold", "exclusive", "nodelist=n4"
    )
    return run, job


@pytest.fixture
def config(small_run, tmp_path):
    """A small run in float64, as a file."""
    options = dict(zip(small_run[::2], small_run[1::2], strict=True)) | {
        "--dtype": "float64",
        "--micro-batch-size": "2",
    }
    (tmp_path / "small.yaml").write_text("".join(f"{name[2:]}: {value}\n" for name, value in options.items()))
    return tmp_path / "small.yaml"


def submit(cluster, config, run, *options):
    """Through submit.py. Returns the jobs' ids."""
    command = [sys.executable, f"{STEP}/slurm/submit.py", str(config), "--run-dir", str(run), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=cluster.environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[0].split(":")[0].split()[1:]


def submit_stand_in(cluster, run, *options):
    """The same, in this process, with another train.py."""
    config = run.parent / "stand-in.yaml"
    config.write_text("micro-batch-size: 1\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        load("submit").submit([str(config), "--run-dir", str(run), "--sbatch", "hold", "--preflight", "0", *options])
    shutil.copy(Path(__file__).parent / "stand_in.py", run / "code" / STEP / "train.py")
    jobs = sorted({job.split("_")[0] for path in run.glob("**/jobs") for job in path.read_text().split()}, key=int)
    cluster.run("scontrol", "release", *jobs)
    return jobs


def output(run):
    return "".join(path.read_text() for path in sorted(run.glob("slurm-*.out")))


def _losses(path):
    """By the numbers of the steps."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def steps(run, attempt):
    """The numbers of the steps that an attempt has made so far."""
    return list(_losses(run / "metrics" / f"{attempt}.jsonl"))


def wait_for_steps(cluster, run, attempt):
    cluster.wait_for(lambda: len(steps(run, attempt)) > 5, 300, f"attempt {attempt}: {output(run)}")


def _trained(args, directory):
    load_step(STEP).train(parse(sys.modules["train"].Config, [*args, "--export-dir", directory]))


def weights_of_torchrun(args, ranks, directory):
    """The weights of the same run on ranks that no Slurm has started."""
    run_ranks(ranks, _trained, args, str(directory))
    return load_file(directory / "model.safetensors")


def assert_equal_weights(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].equal(expected[name]), name


def test_axes_over_two_nodes_are_a_plain_torchrun(cluster, config, tmp_path):
    layout = ["--tp", "2", "--pp", "2", "--cp", "2"]
    run, exported = tmp_path / "run", tmp_path / "exported"
    on_two_nodes = [*ON_TWO_NODES, "--tasks-per-node", "4", "--preflight", "300"]
    [job] = submit(cluster, config, run, *on_two_nodes, "--", *layout, "--export-dir", str(exported))
    expected = weights_of_torchrun(["--config", str(config), "--device", "cpu", *layout], 8, tmp_path / "expected")
    assert cluster.wait_for_job(job, "COMPLETED", "FAILED") == "COMPLETED", output(run)
    assert_equal_weights(load_file(exported / "model.safetensors"), expected)
    # Both nodes, each with four processes, whose output is kept by rank.
    assert "preflight: 2 nodes work" in output(run) and "step 4 | loss" in output(run)
    logs = {path.relative_to(run / "logs").parts for path in run.glob("logs/*/*/*/*/*/stdout.log")}
    assert {(node, rank) for _, node, _, _, rank, _ in logs} == {(n, r) for n in ("n1", "n2") for r in "0123"}


def preempt(cluster):
    """The job that drives others off n1 to n3."""
    urgent = ["-p", "urgent", "-w", "n[1-3]", "-N3", "--exclusive", "-o", "/dev/null", "--wrap=sleep 2"]
    return cluster.run("sbatch", "--parsable", *urgent).strip()


def disturb(cluster, run, job):
    """Tell a job on n1 and n2 to save, preempt it, and cut the power of a node. It goes on each time: a fourth attempt
    runs in the end."""
    wait_for_steps(cluster, run, f"{job}.0")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_steps(cluster, run, f"{job}.1")
    assert "training is to save and stop" in output(run) and output(run).count("back to the queue") == 1
    assert steps(run, f"{job}.1")[0] == steps(run, f"{job}.0")[-1] + 1

    cluster.wait_for_job(preempt(cluster), "COMPLETED")
    wait_for_steps(cluster, run, f"{job}.2")
    assert steps(run, f"{job}.2")[0] == steps(run, f"{job}.1")[-1] + 1

    cluster.kill("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_for_steps(cluster, run, f"{job}.3")
    cluster.start("n2")
    cluster.wait_for_nodes()
    # What it had not saved by then, it makes again.
    assert 1 < steps(run, f"{job}.3")[0] <= steps(run, f"{job}.2")[-1] + 1


def test_preempted_before_it_can_save(cluster, tmp_path):
    """Its processes die of the signal, but the job does not: it starts again."""
    run = tmp_path / "run"
    [job] = submit_stand_in(cluster, run, *ON_ONE_NODE)
    (run / "enough").touch()
    cluster.wait_for_job(job, "RUNNING")
    cluster.wait_for_job(preempt(cluster), "COMPLETED")
    cluster.wait_for_job(job, "COMPLETED")
    assert "preempted, training failed" in output(run) and output(run).count("finished") == 1


def test_one_job_at_a_time_and_cancelled_is_cancelled(cluster, tmp_path):
    """A second job of the run ends at once. The first saves, as it cannot know why it is to stop, but stays away."""
    run = tmp_path / "run"
    [job] = submit_stand_in(cluster, run, *ON_ONE_NODE)
    wait_for_steps(cluster, run, f"{job}.0")
    twin = cluster.run("sbatch", "--parsable", str(run / "job.sbatch")).strip()
    cluster.run("scontrol", "release", twin)
    cluster.wait_for_job(twin, "FAILED")
    assert f"job {job} runs in {run} already" in output(run)
    cluster.run("scancel", job)
    cluster.wait_for(lambda: "saved; JobState=" in output(run), 30, "the job's script")
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED" and (run / "requeue").exists()


def test_sweep_and_chain(cluster, tmp_path):
    sweep = tmp_path / "sweep"
    options = [*ON_ONE_NODE, "--sweep", "lr=1e-4,3e-4", "tp=2"]
    [array] = submit_stand_in(cluster, sweep, *options)
    runs = [sweep / "lr=1e-4,tp=2", sweep / "lr=3e-4,tp=2"]
    for run in runs:
        (run / "enough").touch()
    chained = tmp_path / "chained"
    first, second = submit_stand_in(cluster, chained, *ON_ONE_NODE, "--chain", "2", "--after", array)
    (chained / "enough").touch()
    assert cluster.state(first) == cluster.state(second) == "PENDING"
    cluster.wait_for_job(second, "COMPLETED")
    assert cluster.state(first) == "COMPLETED"
    for run, lr in zip(runs, ("1e-4", "3e-4"), strict=True):
        assert (run / "finished").exists()
        assert f"--lr={lr} --tp=2 --metrics-file {run}/metrics" in (run / "options-0").read_text()
    assert "was finished before" in (chained / f"slurm-{second}.out").read_text()


def test_preflight_names_the_bad_node(cluster, tmp_path):
    run = tmp_path / "run"
    cluster.on_node("n2", "mount", "--bind", "-o", "ro", str(tmp_path), str(tmp_path))
    try:
        [job] = submit_stand_in(cluster, run, *ON_TWO_NODES, "--preflight", "40")
        assert cluster.wait_for_job(job, "COMPLETED", "FAILED") == "FAILED"
    finally:
        cluster.on_node("n2", "umount", str(tmp_path))
    assert "preflight: n2: [Errno 30] Read-only file system" in output(run)
    assert "nothing was trained" in output(run) and not list(run.glob("metrics/*"))


def test_time_limit(cluster, limited):
    """The same as USR1 sent by hand, but by Slurm."""
    run, job = limited
    wait_for_steps(cluster, run, f"{job}.1")
    assert steps(run, f"{job}.1")[0] == steps(run, f"{job}.0")[-1] + 1
    (run / "enough").touch()
    cluster.wait_for_job(job, "COMPLETED")


def test_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(cluster, config, tmp_path):
    """Told to save, preempted, and cut off: every step trains as it would have, and so do the weights."""
    run, exported = tmp_path / "run", tmp_path / "exported"
    options = ["--dp", "2", "--zero", "1", "--steps", "400", "--eval-every", "0"]
    on_two_nodes = [*ON_TWO_NODES, "--tasks-per-node", "1", "--preflight", "0"]
    [job] = submit(
        cluster, config, run, *on_two_nodes, "--", *options, "--save-every", "20", "--export-dir", str(exported)
    )
    disturb(cluster, run, job)
    options = ["--config", str(config), "--device", "cpu", *options]
    expected = weights_of_torchrun([*options, "--metrics-file", str(tmp_path / "metrics")], 2, tmp_path / "expected")
    cluster.wait_for_job(job, "COMPLETED", seconds=300)
    assert_equal_weights(load_file(exported / "model.safetensors"), expected)
    losses = _losses(tmp_path / "metrics")
    assert len(losses) == 400
    for attempt in range(4):
        assert _losses(run / "metrics" / f"{job}.{attempt}.jsonl").items() <= losses.items()
