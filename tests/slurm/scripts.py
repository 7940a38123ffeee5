"""The modules of step06_4d/slurm, as tests import them."""

import importlib.util
import sys
from types import ModuleType

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
