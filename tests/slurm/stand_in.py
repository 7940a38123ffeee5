"""Stands in for train.py where a test is about jobs: counts steps, saves when told to stop, and goes on from there.

Ends when there is a file `enough` in the run's directory. Needs no torch, so it starts at once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run, rank = Path(os.environ["RUN"]), os.environ["RANK"]
saved, told = run / f"saved-{rank}", []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(number))
options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
step = int(saved.read_text()) if saved.exists() else 0
while not (run / "enough").exists():
    step += 1
    if rank == "0":
        record = {"step": step, "loss": 1.0, "tokens": step, "tokens_per_second": 50.0, "mfu": 0.5}
        with open(options["--metrics-file"], "a") as file:
            file.write(json.dumps(record) + "\n")
    time.sleep(0.02)
    if told:
        # As long as a real one may take: whoever started it must wait.
        time.sleep(2)
        saved.write_text(str(step))
        sys.exit(85)
(run / f"options-{rank}").write_text(" ".join(sys.argv[1:]))
