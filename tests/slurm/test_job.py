"""What a job's script does, whatever becomes of its steps. No Slurm is needed."""

import os
import subprocess
import sys

import pytest
import scripts
from conftest import ROOT
from scripts import STEP

CPU = ["--gpus-per-node", "0", "--tasks-per-node"]
submit, config, slurm = scripts.submit, scripts.config, scripts.slurm


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
    # Slurm tells of all tasks, since the number of one is also that of the array.
    squeue = 'if [[ $* = *--jobs* ]]; then printf "2 100_1\\n3 100_2\\n"; else printf "100_1\\n100_2\\n"; fi'
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
