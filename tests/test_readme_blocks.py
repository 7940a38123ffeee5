"""A step differs from the one before by its lesson only."""

import re
import shlex
from itertools import pairwise

import pytest
from conftest import load_step
from readme_blocks import ROOT, STEPS, changed_lines, refreshed

from shared.config import parse

# The files that a step may change or add, besides its README. All others are copies of the previous step's.
LESSON = {
    "step02_data_parallel": {"train.py", "data_parallel.py"},
    "step03_tensor_parallel": {"train.py", "tensor_parallel.py"},
    "step04_pipeline_parallel": {"train.py", "pipeline_parallel.py"},
    "step05_context_parallel": {"train.py", "context_parallel.py"},
}


def files(step):
    return {path.name for path in (ROOT / step).glob("*.py")}


# step06 adds no parallelism: there, all of them grow up.
@pytest.mark.parametrize(("before", "after"), list(pairwise(STEPS[:-1])))
def test_only_the_lesson_changes(before, after):
    assert files(after) - files(before) <= LESSON[after] and files(before) <= files(after)
    for name in files(before) - LESSON[after]:
        assert (ROOT / before / name).read_bytes() == (ROOT / after / name).read_bytes(), name
    assert 0 < changed_lines(ROOT / before / "train.py", ROOT / after / "train.py") <= 30


def test_readmes_are_fresh():
    for readme in [ROOT / "README.md", ROOT / "tests" / "README.md", *ROOT.glob("step*/README.md")]:
        assert readme.read_text() == refreshed(readme.read_text()), f"run python tests/readme_blocks.py ({readme})"


COMMAND = re.compile(r"torchrun [^\n]*?--nproc-per-node (\d+) (step\d\d_\w+)/train\.py((?:\\\n|[^\n`#])*)")
COMMANDS = {
    match.group(0): match.groups()
    for readme in sorted(ROOT.glob("**/README.md"))
    for match in COMMAND.finditer(readme.read_text())
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_readmes_fit_their_ranks(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks, step, args = COMMANDS[command]
    config = parse(load_step(step).Config, shlex.split(args.replace("\\\n", " ")))
    others = [getattr(config, axis, 1) for axis in ("tp", "pp", "cp")]
    dp = int(ranks) / (others[0] * others[1] * others[2])
    assert config.dp in (None, dp)
    assert config.global_batch_size % (dp * config.micro_batch_size) == 0


def test_a_step_imports_only_its_siblings_and_shared():
    for path in ROOT.glob("step*/*.py"):
        assert "import step" not in path.read_text() and "from step" not in path.read_text()
