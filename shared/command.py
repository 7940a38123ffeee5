"""How a command ends: by its result, by an error that its user can put right, by Ctrl-C, or because nobody reads on."""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from shared.config import ConfigT, UserError, parse

# Seconds within which a second SIGINT belongs to the same Ctrl-C: the terminal sends one to all, torchrun another.
SAME = 2
# Seconds that rank 0 is given to say what all ranks have to say, before the first rank of another machine does.
PATIENCE = 5


def run(train: Callable[[ConfigT], None], config_class: type[ConfigT], known_only: bool = False) -> None:
    """Parse the command line and train. A UserError ends the process with its message and exit code 1, Ctrl-C with a
    line that says what is left, and exit code 130.

    After any other exception the process ends at once, without waiting for ranks that may be stuck: torchrun then
    stops those.
    """
    config = None
    with _reader_may_leave(), _ctrl_c():
        try:
            config = parse(config_class, known_only=known_only)
            train(config)
        except UserError as error:
            _fail(f"error: {error}")
        except SystemExit as end:
            if end.code == 2 and dist.is_torchelastic_launched():
                _fail("error: options that do not fit, as said above")
            raise
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                left = config.left_unfinished() if config else "nothing has begun"
                print(f"stopped by Ctrl-C: {left}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
    if dist.is_initialized():
        # No rank leaves while another still talks to it. The first may need longer than --timeout for --export-dir.
        dist.group.WORLD.set_timeout(timedelta(days=1))
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def ending_in_a_line() -> Iterator[None]:
    """For commands that do not train: what goes wrong for want of a file, or by a UserError, ends them in one line."""
    with _reader_may_leave():
        try:
            yield
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            sys.exit(f"error: {error}")


def _fail(message: str) -> NoReturn:
    """End the process. Of ranks that torchrun has started one says why, and torchrun says it again at the end.

    Mostly all ranks find the same error. The first that exits makes torchrun stop the others of its machine: so those
    wait, each a little longer than the one before.
    """
    rank, file = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        if rank != "0":
            time.sleep(PATIENCE + 0.5 * int(os.environ["LOCAL_RANK"]))
        # As torch.distributed.elastic's `record` does, which would write a traceback.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    sys.exit(message if rank is None else f"[rank {rank}] {message}")


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt, once. The second ends the process, whatever it does or waits for."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # The shell has it ignored, for a run in the background.
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Of a signal this hears at once. Python's handlers wait until the main thread comes back from what it calls.
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reader,), name="Ctrl-C", daemon=True).start()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # torchrun's copy must not disturb the way out.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    raise KeyboardInterrupt


def _end_at_the_second(reader: int) -> None:
    first = None
    while received := os.read(reader, 1):
        if received[0] == signal.SIGINT:
            first = first or time.monotonic()
            if time.monotonic() - first > SAME:
                os._exit(128 + signal.SIGINT)
    os.close(reader)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Ends the process without a word when its output is a pipe whose reader has enough, as `head` has."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            # It was another pipe.
            raise
        # What is left would be written once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
