"""A training process of a job: train.py, with an exit code that torchrun understands.

torchrun knows success and failure only: whatever code a process fails with, it kills the others and exits with 1. So a
process that stopped because it was told to, and has saved, leaves a mark in the run's directory and exits with 0.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    code = Path(os.environ["CODE"])
    sys.path[0] = str(code)
    from survive.stopping import REQUEUE

    try:
        runpy.run_path(str(code / "train.py"), run_name="__main__")
    except SystemExit as exit:
        if exit.code != REQUEUE:
            raise
        # By every process, so that the job's script sees it on its node at once, even if the directory is NFS's.
        (Path(os.environ["RUN"]) / "requeue").touch()
