"""step06's planner and its train.py, whose siblings are importable by plain name while they are loaded only."""

import importlib
import sys
from functools import cache
from types import ModuleType
from unittest.mock import patch

from conftest import ROOT, load_step

STEP = "step06_4d"


@cache
def train() -> ModuleType:
    return load_step(STEP)


def sibling(name: str) -> ModuleType:
    """A module of the step by its dotted name, next to the loaded train.py."""
    train()
    with patch.object(sys, "path", [str(ROOT / STEP), *sys.path]):
        return importlib.import_module(name)
