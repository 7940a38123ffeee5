"""Labs: write it, break it, predict it. What judges is what proves the steps: the tests' own harness."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
# parity, ranks and the rest of the harness are modules of this directory.
sys.path.insert(0, str(ROOT / "tests"))
if not (find_spec("pytest") and find_spec("hypothesis")):
    raise SystemExit("the labs are judged by the tests' own harness, which is not installed: pip install -e '.[test]'")
