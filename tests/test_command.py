"""How a command ends when its user, or whoever reads its output, has had enough, and what torchrun says of an error."""

import json
import os
import signal
import time

import pytest
from conftest import ROOT
from launcher import Launch, run_command
from test_torchrun import start

from shared import command
from shared.config import BaseConfig, UserError

INTERRUPTED = 128 + signal.SIGINT


def end(train, *args, **output):
    """The exit code of a command, and what it prints."""

    def main():
        # Which a shell sets to nothing for what runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command.run(train, BaseConfig)

    ended = run_command(main, *args, **output)
    return ended.returncode, ended.stdout + ended.stderr


def press(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_other_commands_end_in_a_line(tmp_path):
    for error, line in ((UserError("too small"), "too small"), (FileNotFoundError(2, "is gone", "a"), "is gone: 'a'")):
        with pytest.raises(SystemExit, match=f"^error: .*{line}$"), command.ending_in_a_line():
            raise error
    # But for a reader that has left, of which other tests are.
    with pytest.raises(BrokenPipeError), command.ending_in_a_line():
        raise BrokenPipeError


def test_an_export_may_take_longer_than_a_collective(small_run, tmp_path):
    def prepare(module):
        from shared import weights

        def slow(*args, write=weights.export_config):
            time.sleep(7)
            return write(*args)

        weights.export_config = slow

    args = [*small_run, "--steps", "1", "--eval-every", "0", "--timeout", "4", "--export-dir", str(tmp_path / "out")]
    run = Launch(2, "step02_data_parallel", args, tmp_path / "logs", prepare)
    assert run.wait() == [0, 0] and (tmp_path / "out" / "config.json").exists(), run.output()


def test_ctrl_c_says_what_is_left(tmp_path):
    code, errors = end(lambda config: press(), "--export-dir", tmp_path / "out", "--metrics-file", tmp_path / "log")
    assert code == INTERRUPTED and errors == (
        f"stopped by Ctrl-C: no weights are saved, and --export-dir {tmp_path}/out is not written: the same command "
        "begins anew, with another --metrics-file (step06 saves in --checkpoint-dir)\n"
    )


def test_torchruns_copy_does_not_disturb_the_way_out():
    def train(config):
        try:
            press()
        finally:
            press(2)
            print("cleaned up")

    code, printed = end(train)
    assert code == INTERRUPTED and printed.startswith("cleaned up\nstopped by Ctrl-C") and printed.count("\n") == 2


def test_the_second_ctrl_c_ends_at_once(monkeypatch):
    """Whatever the process does: here it waits in C, which no handler of Python can leave."""
    monkeypatch.setattr(command, "SAME", 0.001)

    def train(config):
        try:
            press()
        finally:
            time.sleep(0.01)
            press()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            signal.alarm(10)
            signal.sigwait([signal.SIGALRM])

    assert end(train) == (INTERRUPTED, "")


@pytest.mark.parametrize(("flush", "buffered"), [(True, True), (False, True), (False, False)])
def test_a_reader_that_leaves(flush, buffered):
    """As in `train.py | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert end(lambda config: print("step 1", flush=flush), stdout=writer, buffered=buffered) == (141, "")
    finally:
        os.close(writer)


def test_another_pipe_that_breaks_is_an_error():
    def train(config):
        raise BrokenPipeError("to a server")

    code, errors = end(train)
    assert code == 1 and errors.endswith("BrokenPipeError: to a server\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_file(tmp_path, monkeypatch, rank):
    """Rank 1 has nobody to say it in its place."""

    def train(config):
        raise UserError("too large")

    monkeypatch.setattr(command, "PATIENCE", -0.4)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("TORCHELASTIC_ERROR_FILE", tmp_path / "error.json")):
        monkeypatch.setenv(name, str(value))
    assert end(train) == (1, f"[rank {rank}] error: too large\n")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: too large"


def test_torchrun_says_a_users_error_last():
    errors = start(2, ROOT / "step02_data_parallel" / "train.py", "--seq-len", 0).stderr
    said = [line.strip() for line in errors.splitlines() if "must be at least 1" in line]
    message = "error: --seq-len must be at least 1, not 0"
    assert said == [f"[rank 0] {message}", f"traceback : {message}"]
    assert errors.splitlines()[-2].strip() == said[-1]
