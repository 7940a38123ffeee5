"""Who may import whom in step06, and which lesson each of its changes to train.py belongs to."""

import ast

import pytest
from diff_classes import classify
from lessons import LESSONS, claims
from readme_blocks import ROOT

pytestmark = pytest.mark.quick
STEP = ROOT / "step06_4d"
# Each axis has a room for what it grew: they import each other and nothing else of the step.
AXES = {
    "data_parallel": "zero",
    "tensor_parallel": "tensor",
    "pipeline_parallel": "pipeline",
    "context_parallel": "context",
}
# What else a file may import, by its place; all may import their own room and shared.
MORE = {
    **{axis: {room} for axis, room in AXES.items()},
    **{room: {axis} for axis, room in AXES.items()},
    # Only the boxes of a checkpoint know an axis.
    "survive/boxes": {"data_parallel", "tensor_parallel"},
    "observe": {"pipeline.schedules"},
    # The planner splits layers and runs schedules as the pipeline does.
    "planning": {"pipeline"},
    "plan": {"planning", "observe.dry_run", "train"},
    "export": {"survive"},
    "generate": {"survive"},
}


def imports(path):
    """The modules that a file imports, by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_between_rooms():
    paths = [path.relative_to(STEP).with_suffix("") for path in STEP.rglob("*.py") if "slurm" not in path.parts]
    places = {path.parts[0] for path in paths}
    assert places >= {*AXES, *AXES.values(), "survive", "observe", "train"}
    for path in paths:
        place = path.parts[0]
        allowed = {place} | MORE.get(place, set()) | MORE.get(path.as_posix(), set())
        for name in imports(STEP / path.with_suffix(".py")):
            known = name.split(".")[0] in places and place != "train"
            assert not known or any(f"{name}.".startswith(f"{other}.") for other in allowed), f"{path}: {name}"


def test_every_change_of_train_belongs_to_one_lesson():
    before, after = ((ROOT / step / "train.py").read_text() for step in ("step05_context_parallel", "step06_4d"))
    classes, lines = classify(before, after), after.splitlines()
    assert len(lines) <= 200 and len(classes) <= 70
    for number, kind in classes.items():
        lessons = [lesson for lesson in LESSONS if claims(lesson, lines[number - 1])]
        assert len(lessons) == 1 or kind == "text", f"{lessons} claim: {lines[number - 1]}"


def test_each_room_has_a_readme_of_a_few_screens():
    for room in {path.parent for path in STEP.glob("*/*.py")}:
        lines = len((room / "README.md").read_text().splitlines())
        assert 60 <= lines <= 120, f"{room}/README.md has {lines} lines"


def test_large_packages_are_imported_where_they_are_used():
    """Not at the start of every process: tests/benchmarks/start.py."""
    for path in [*ROOT.glob("shared/**/*.py"), *ROOT.glob("step*/**/*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            early = {name.split(".")[0] for name in names} & {"datasets", "matplotlib", "wandb", "tensorboard"}
            # torch's compiler, which these load.
            early |= set(names) & {"torch._dynamo", "torch.nn.attention.varlen"}
            early |= {ast.unparse(each) for each in getattr(node, "decorator_list", ())} & {"torch.compiler.disable"}
            assert not early, f"{path}: {early}"
