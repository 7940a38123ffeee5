"""step00: its page shows what its files print, and its ring is an all-reduce."""

import contextlib
import importlib.util
import io
import re

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import run_ranks

from shared.ledger import Ledger

STEP = ROOT / "step00_collectives"
SHOWN = re.compile(r"<!-- output of (\S+) -->\n```\n(.*?)```", re.DOTALL)


def load(name):
    """A file of step00 as a module, which no step's modules can be taken for."""
    spec = importlib.util.spec_from_file_location(f"step00_{name}", STEP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(file):
    """What the page shows of its output."""
    return "".join(text for name, text in SHOWN.findall((STEP / "README.md").read_text()) if name == file)


def _printed(name):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        load(name).main()
    return out.getvalue()


def test_the_page_shows_what_collectives_prints():
    assert run_ranks(4, _printed, "collectives")[0] == shown("collectives.py")


def test_the_page_shows_what_the_ring_prints():
    printed, _, measured = run_ranks(4, _printed, "ring")[0].partition("on this machine:\n")
    assert printed == shown("ring.py")
    # A line per size, and α and β, of which no value is asserted.
    assert len(measured.splitlines()) == 6


def _ring(numbers):
    """What the ring makes of this rank's numbers, and torch's all-reduce; bytes it says it sent, and did."""
    dist.init_process_group("gloo")
    x = torch.randn(numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    expected = x.clone()
    dist.all_reduce(expected)
    with Ledger() as ledger:
        sent = load("ring").ring_all_reduce(x)
    return x, expected, sent, ledger.counts


@pytest.mark.quick
@pytest.mark.parametrize(("ranks", "numbers"), [(2, 6), (3, 6), (4, 8), (4, 7), (4, 2)])
def test_the_ring_is_an_all_reduce(ranks, numbers):
    everyone = run_ranks(ranks, _ring, numbers)
    for x, expected, sent, counts in everyone:
        assert torch.allclose(x, expected, rtol=1e-14) and torch.equal(x, everyone[0][0])
        ((calls, nbytes),) = (counts["world", kind] for kind in ("send",))
        assert calls == 2 * (ranks - 1) and nbytes == sent
        if numbers % ranks == 0:
            assert sent == 2 * (ranks - 1) * numbers * 8 // ranks
