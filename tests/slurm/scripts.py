"""The modules of step06_4d/slurm, as tests import them."""

import importlib.util
import os
import sys
from types import ModuleType

import pytest
from conftest import ROOT, load_step

STEP = "step06_4d"


def load(name: str) -> ModuleType:
    """submit, preflight or status: with this step's siblings, whatever another test has loaded."""
    load_step(STEP)
    directory = ROOT / STEP / "slurm"
    sys.path.insert(0, str(directory))
    try:
        spec = importlib.util.spec_from_file_location(f"slurm_{name}", directory / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(directory))


# Fixtures of several files


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
