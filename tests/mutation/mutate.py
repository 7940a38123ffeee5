"""Change one place of the parallel code at random, and see whether a test of that file fails. What survives is a test
that is missing, or a change that changes nothing.

    python tests/mutation/mutate.py 40            # the 40 changes of seed 0, in some files of every step
    python tests/mutation/mutate.py 40 --seed 1 --only step03

The tests run in a copy of the repository. A run that hangs counts as a failed one.
"""

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (what takes long)
import transformers  # noqa: F401

ROOT = Path(__file__).parents[2]
LIMIT = 240
# A step | files that it brings | their tests, the quick ones first | which of these are about them (pytest's -k).
TESTS = """
step02_data_parallel | data_parallel | checkers step02 parity | step02
step03_tensor_parallel | tensor_parallel conjugates vocab_parallel weight_gradients | checkers step03 parity | step03
step04_pipeline_parallel | schedules stages channels | schedules channels checkers step04 | not step05 and not step06
step04_pipeline_parallel | pipeline_parallel | checkers step04 parity | step04
step05_context_parallel | context_parallel fused_attention all_to_all | checkers step05 parity | step05
shared | attention | kernels_of_gpus attention checkers step06_document_blocks | gpus or attention or scores or one_call
step06_4d | zero/unit zero/sharded_optimizer | checkers step06_sharding step06_bfloat16 | step06
step06_4d | tensor/sequence_parallel tensor/token_layout | checkers step06_sequence_parallel | step06
step06_4d | tensor/weight_gradients pipeline_parallel | checkers step06_pipeline parity | step06 and (pp or pipeline)
step06_4d | pipeline/schedules pipeline/chunks | step06_schedules checkers step06_pipeline | step06
step06_4d | context/documents | checkers step06_document_blocks step06_documents | document
"""
# Methods that return much the same tensor, and functions of which the first argument may do as well.
SAME = {"to", "contiguous", "clone", "detach"}
FIRST = {"promote_types", "min", "max", "at_least_float32", "masked_fill_"}
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult},
}


def changed(node: ast.AST) -> ast.AST | None:
    """What may stand in the place of a piece of code, or None."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        new.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        new.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp):
        new = new.operand
    elif isinstance(node, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        # A wait, a hook, a collective: left out.
        new = ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SAME:
        new = new.func.value
    elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in FIRST:
        new = new.args[0]
    else:
        return None
    return new


def places(node: ast.AST) -> Iterator[ast.AST]:
    """The pieces that can be changed. Not in types, errors and invariants."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            if changed(child) is not None:
                yield child
            yield from places(child)


def mutants(seed: int, only: str) -> Iterator[tuple[Path, ast.AST, list[str]]]:
    """For ever: a file, a place in it, and what pytest is to run. Each file is as likely as another."""
    generator = random.Random(seed)
    files = []
    for line in TESTS.strip().splitlines():
        step, names, tests, expression = (part.strip() for part in line.split("|"))
        paths = [f"tests/{test}" if test == "checkers" else f"tests/test_{test}.py" for test in tests.split()]
        options = [*paths, "-k", f"({expression}) and not torchrun"]
        files += [(path, options) for name in names.split() if only in (path := f"{step}/{name}.py")]
    while True:
        path, tests = generator.choice(files)
        if found := list(places(ast.parse((ROOT / path).read_text()))):
            yield Path(path), generator.choice(found), tests


def apply(path: Path, place: ast.AST) -> str:
    """Change the file. Returns what is changed."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    # Columns of a syntax tree count bytes.
    start, end = (
        len("".join(lines[: line - 1]).encode()) + column
        for line, column in ((place.lineno, place.col_offset), (place.end_lineno, place.end_col_offset))
    )
    new = ast.unparse(changed(place))
    new = new if isinstance(place, ast.stmt) else f"({new})"
    data = source.encode()
    path.write_bytes(data[:start] + new.encode() + data[end:])
    return f"{' '.join(data[start:end].decode().split())}  ->  {new}"


def run_tests(directory: Path, tests: list[str]) -> None:
    """In a process forked from this one, which has imported what takes long."""
    os.setpgid(0, 0)
    os.chdir(directory)
    os.environ["PYTHONPATH"] = tempfile.tempdir = str(directory)
    sys.path[:0] = [str(directory), str(directory / "tests")]
    # conftest.py sets the environment of the first process only.
    multiprocessing.process._parent_process = None
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os._exit(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider"]))


def survives(directory: Path, tests: list[str]) -> bool:
    """Whether all tests pass."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(directory, tests))
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        # With the ranks that it has forked.
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    # A failure, an error at import, a hang. Anything else is a fault of this script.
    assert process.exitcode in (0, 1, 2, -signal.SIGKILL), (directory / "output").read_text()
    return process.exitcode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="changes at the beginning that were tried before")
    parser.add_argument("--only", default="", help="files whose path has this in it")
    args = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "repository"
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        for path, place, tests in islice(mutants(args.seed, args.only), args.skip, args.count):
            original = (copied / path).read_text()
            what = apply(copied / path, place)
            survived = survives(copied, tests)
            survivors += survived
            print(f"{'SURVIVED' if survived else 'killed':<9} {path}:{place.lineno}: {what}", flush=True)
            (copied / path).write_text(original)
    print(f"{survivors} of {args.count - args.skip} survived")


if __name__ == "__main__":
    main()
