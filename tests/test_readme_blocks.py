"""A step differs from the one before by its lesson only."""

import re
import shlex
from itertools import pairwise

import pytest
from conftest import load_step
from diff_classes import classify, shares
from readme_blocks import ROOT, STEPS, refreshed

from shared.config import parse

pytestmark = pytest.mark.quick
# The files that a step may change or add, besides its README. All others are copies of the previous step's.
LESSON = {
    "step02_data_parallel": {"train.py", "data_parallel.py"},
    "step03_tensor_parallel": {
        "train.py",
        "tensor_parallel.py",
        "conjugates.py",
        "vocab_parallel.py",
        "weight_gradients.py",
    },
    "step04_pipeline_parallel": {"train.py", "pipeline_parallel.py", "schedules.py", "stages.py", "channels.py"},
    "step05_context_parallel": {"train.py", "context_parallel.py", "fused_attention.py", "all_to_all.py"},
}


def files(step):
    return {path.name for path in (ROOT / step).glob("*.py")}


# step06 adds no parallelism: there, most files grow. These move to a room, and that is all.
MOVED = {
    "channels.py": "pipeline",
    "stages.py": "pipeline",
    "fused_attention.py": "context",
    "all_to_all.py": "context",
}


@pytest.mark.parametrize(("before", "after"), list(pairwise(STEPS[:-1])))
def test_only_the_lesson_changes(before, after):
    assert files(after) - files(before) <= LESSON[after] and files(before) <= files(after)
    for name in files(before) - LESSON[after]:
        assert (ROOT / before / name).read_bytes() == (ROOT / after / name).read_bytes(), name


def test_files_that_only_move_to_a_room():
    for name, room in MOVED.items():
        assert (ROOT / STEPS[-2] / name).read_bytes() == (ROOT / STEPS[-1] / room / name).read_bytes(), name


def test_three_quarters_of_a_difference_are_the_idea():
    """Of what is added to train.py, in steps 02 to 05, which together add at most 55 lines."""
    lines = 0
    for before, after in pairwise(STEPS[:-1]):
        idea, counted = shares(before, after)
        assert idea >= 0.75 * counted > 0, after
        lines += len(classify(*((ROOT / step / "train.py").read_text() for step in (before, after))))
    assert lines <= 55


CLASSES = [
    ("x = f(a)", "x = f(a, b)", ["handed down"]),
    ("x = f(a)", "x = f(a, key=b)", ["handed down"]),
    ("x = f(a)", "x = f(g(a))", ["idea"]),
    ("x = f(a)", "x = f(b)", ["idea"]),
    ("x = f(a)", "x = f(a, b)\ny = f(a, b)", ["handed down", "idea"]),
    ("", "x = f(a, b)", ["idea"]),
    ("def f(a):\n    pass", "def f(a, b):\n    pass", ["handed down"]),
    ("def f(a):\n    pass", "def f(a):\n    g()\n    pass", ["idea"]),
    ("class Config(\n    A,\n):\n    pass", "class Config(\n    A,\n    B,\n):\n    pass", ["option"]),
    ("", "import a\n# Why.\nwith metrics, ledger:\n    run()", ["import", "text", "bookkeeping", "idea"]),
]


@pytest.mark.parametrize(("before", "after", "expected"), CLASSES)
def test_classes_of_added_lines(before, after, expected):
    assert list(classify(before, after).values()) == expected


def test_readmes_are_fresh():
    for readme in [ROOT / "README.md", ROOT / "tests" / "README.md", *ROOT.glob("step*/**/README.md")]:
        assert readme.read_text() == refreshed(readme.read_text()), f"run python tests/readme_blocks.py ({readme})"


COMMAND = re.compile(r"(?:torchrun [^\n]*?--nproc-per-node (\d+)|python) (step\d\d_\w+)/train\.py((?:\\\n|[^\n`#])*)")
COMMANDS = {
    match.group(0): match.groups()
    for readme in sorted([*ROOT.glob("*.md"), *ROOT.glob("s*/**/*.md")])
    for match in COMMAND.finditer(readme.read_text())
    # Of configurations are other tests.
    if "--config" not in match.group(3)
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_readmes_fit_their_ranks(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks, step, args = COMMANDS[command]
    config = parse(load_step(step).Config, shlex.split(args.replace("\\\n", " ")))
    if not ranks:
        return
    others = [getattr(config, axis, 1) for axis in ("tp", "pp", "cp")]
    dp = int(ranks) / (others[0] * others[1] * others[2])
    assert config.dp in (None, dp)
    assert config.global_batch_size % (dp * config.micro_batch_size) == 0


def test_a_step_imports_only_its_siblings_and_shared():
    for path in ROOT.glob("step*/**/*.py"):
        assert "import step" not in path.read_text() and "from step" not in path.read_text()
