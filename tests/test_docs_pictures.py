"""What the pictures show is what the code does: their tables, and each control in a browser."""

import ast
import json
import re
import sys

import pytest
from conftest import ROOT
from test_docs import browser, needs_browser, open_page, site  # noqa: F401 (fixtures)

sys.path.insert(0, str(ROOT / "docs"))

import animations
import table_collectives
import table_costs
import table_memory
import tables
from planning.flops import flops
from planning.layout import Layout, Model, Place, Sizes
from planning.machines import Machine
from planning.memory import memory
from planning.traffic import traffic

from shared.llama_configs import load_model_config


def table_of(site, name):  # noqa: F811
    text = (site / "source" / f"{name}.md").read_text()
    return json.loads(re.search(rf'id="{name}-data">(.*?)</script>', text)[1])


def bars(page, selector):
    """The values of a picture's bars, by their labels."""
    rows = page.locator(f"{selector} .bar").all()
    return {row.locator("span").first.inner_text(): float(row.get_attribute("data-value")) for row in rows}


def responds(page, picture, controls):
    """Each control changes what is said. Leaves it as it was."""
    for name, value in controls.items():
        control, said = page.locator(f"{picture} [name='{name}']"), page.inner_text(f"{picture} .numbers")
        before = control.input_value()
        choose = control.fill if control.evaluate("control => control.tagName") == "INPUT" else control.select_option
        choose(value)
        assert page.inner_text(f"{picture} .numbers") != said, name
        choose(before)
        assert page.inner_text(f"{picture} .numbers") == said, name


# Of layouts on all axes, links inside nodes and between them.
LAYOUTS = [
    "llama-3.1-8b 64 8 1 1 1 none",
    "llama-3.1-8b 512 1 1 1 3 full",
    "llama-3.1-70b 512 4 8 4 1 full",
    "smollm-1.7b 8 2 2 1 0 none",
]


@needs_browser
def test_costs_in_a_browser(open_page):  # noqa: F811
    page = open_page("costs")
    responds(page, "#costs", {"model": "llama-3.1-70b", "gpus": "512", "tp": "8", "pp": "2", "cp": "4", "zero": "0"})
    responds(page, "#costs", {"recompute": "full", "flops": "100", "between": "1"})
    page.select_option("#costs [name=machine]", "a100")
    page.fill("[name=flops]", "100")
    page.fill("[name=inside]", "50")
    page.fill("[name=between]", "5")
    # Without latencies, which the picture leaves out.
    machine = Machine(1e14, 80e9, 1, 1, 1, 0, 50e9, 0, 5e9, 0, reduce_scatter=1, interference=0, float32=1)
    for row in LAYOUTS:
        for name, value in zip(("model", "gpus", "tp", "pp", "cp", "zero", "recompute"), row.split(), strict=True):
            page.select_option(f"#costs [name={name}]", value)
        name, gpus, tp, pp, cp, zero, recompute = row.split()
        layout = table_costs.layout_of(int(gpus), int(tp), int(pp), int(cp), int(zero), recompute)
        model, split = table_costs.model_of(name), table_costs.split(name, layout.pp)
        stages = [(Place(stage), [split[stage]]) for stage in range(layout.pp)]
        fullest = max((memory(model, layout, *stage) for stage in stages), key=lambda held: held.total)
        assert list(bars(page, "#costs .memory").values()) == list(fullest)
        compute = max(flops(model, layout, place, *layers) for place, layers in stages) / 1e14
        expected = {
            axis: max(seconds(machine, layout, model, stage)[axis] for stage in stages)
            for axis in ("dp", "tp", "cp", "pp")
        }
        found = bars(page, "#costs .time")
        assert found.pop("bubble") == pytest.approx(
            compute * (layout.pp - 1) * layout.dp / layout.global_batch_size, rel=1e-5
        )
        assert found == pytest.approx({"compute": compute} | expected, rel=1e-6)
    page.select_option("#costs [name=zero]", "3")
    page.select_option("#costs [name=pp]", "2")
    assert page.inner_text("#costs .numbers").startswith("No such layout: ZeRO 3")


def seconds(machine, layout, model, stage):
    """The planner's, of all that a rank sends."""
    found = dict.fromkeys(("dp", "tp", "cp", "pp"), 0.0)
    sizes = {"dp": (layout.dp * layout.cp, layout.tp), "tp": (layout.tp, 1)}
    place, (layers,) = stage
    for (axis, kind), nbytes in traffic(Sizes(model, layout, place.tp), place, layers).items():
        if kind == "send" or (axis == "pp" and kind == "all-reduce" and layout.pp > 1):
            # Of two ends, an all-reduce is a message.
            size, stride = (layout.cp, layout.tp) if axis == "cp" else (layout.pp, layout.dp * layout.cp * layout.tp)
            found[axis] += machine.message(nbytes, (size - 1) * stride)
        elif axis != "pp":
            found[axis] += machine.collective(kind, nbytes, *sizes[axis])
    return found


def test_memory_is_that_of_the_dry_run_and_of_the_planner(site):  # noqa: F811
    steps = table_of(site, "memory")["steps"]
    for choice, step in steps.items():
        micro_batch, recompute, zero, tensor = choice.split(" ", 3)
        config = table_memory.configuration(int(micro_batch), recompute, int(zero), tensor)
        planned = memory(Model.of(load_model_config(config)), Layout.of(config), Place(), [2])
        start = step["bytes"][0]
        assert start[:2] == [planned.weights, planned.optimizer]
        assert max(map(sum, step["bytes"])) == pytest.approx(planned.total, rel=0.03), choice
    for choice in ("1 none 0 1", "2 full 3 2 and sequence parallel"):
        micro_batch, recompute, zero, tensor = choice.split(" ", 3)
        config = table_memory.configuration(int(micro_batch), recompute, int(zero), tensor)
        audit, trainer = table_memory.audited(config)
        held, step = audit.held(trainer), steps[choice]
        assert step["bytes"][0][:2] == [held["weights"], held["optimizer"]]
        assert max(map(sum, step["bytes"])) == held["peak"]


@needs_browser
def test_memory_in_a_browser(open_page, site):  # noqa: F811
    page, steps = open_page("memory"), table_of(site, "memory")["steps"]
    choices = {"micro-batch": "2", "recompute": "full", "zero": "3", "tensor": "2 and sequence parallel"}
    responds(page, "#memory", choices)
    for name, value in choices.items():
        page.locator(f"#memory [name='{name}']").select_option(value)
    step = steps[" ".join(choices.values())]
    peak = max(step["bytes"], key=sum)
    said = page.inner_text("#memory .numbers")
    assert said.startswith(f"peak {sum(peak):,} bytes") and all(f"{nbytes:,}" in said for nbytes in peak)
    page.locator("#memory .drawing svg").hover(position={"x": 300, "y": 100})
    assert "MiB, weights" in page.inner_text("#memory .hover")


def test_collectives_end_as_on_the_page_of_step00(site):  # noqa: F811
    calls = table_of(site, "collectives")["calls"]
    # Which is what the file prints: test_step00.py.
    lines = (ROOT / "step00_collectives" / "README.md").read_text().splitlines()
    for name, frames in calls.items():
        line = next(line for line in lines if line.startswith(f"{name}  "))
        shown = [[] if text == "-" else ast.literal_eval(text) for text in re.findall(r"\[.*?\]|-(?=\s|$)", line[16:])]
        assert [[number for number, _ in own] for own in frames[-1]["held"]] == shown
    assert len(calls) == 9


def test_a_ring_sends_what_the_formula_says():
    for ranks in table_collectives.SIZES:
        ring = table_collectives.ring_all_reduce(ranks)
        assert ring["sent"][-1] * ranks == 2 * (ranks - 1) * ring["bytes"]
        everyone = list(range(ranks))
        assert ring["held"][-1] == [[everyone] * ranks] * ranks
        # After the reduce-scatter each rank has one sum, and each another.
        complete = [[part for part in range(ranks) if own[part] == everyone] for own in ring["held"][ranks - 1]]
        assert sorted(complete) == [[part] for part in everyone]


@needs_browser
def test_collectives_in_a_browser(open_page):  # noqa: F811
    page = open_page("collectives")
    responds(page, "#collectives", {"call": "reduce", "turn": "2"})
    page.select_option("[name=call]", "all-to-all")
    page.fill("#collectives [name=turn]", "1")
    assert page.inner_text("#collectives .numbers").startswith("all-to-all, turn 1 of 3: 3 → 0: 30, 0 → 1: 1")
    responds(page, "#ring-all-reduce", {"ranks": "8", "turn": "1"})
    page.locator("#ring-all-reduce [name=turn]").press("End")
    assert page.inner_text("#ring-all-reduce .numbers").endswith("10,080 of 6,720 bytes = 2(4 − 1)/4 · 6,720")


@pytest.mark.parametrize(("name", "ring"), tables.document_rings().items())
def test_hops_cover_each_document_once(name, ring):
    ranks, firsts = len(ring["pieces"]), ring["documents"]
    document = [sum(first <= piece for first in firsts) for piece in range(2 * ranks)]
    pairs = [tuple(pair) for hop in ring["hops"] for seen in hop for pair in seen]
    assert sorted(pairs) == [(q, k) for q in range(2 * ranks) for k in range(q + 1) if document[q] == document[k]]


@needs_browser
def test_what_other_pictures_say_besides(open_page, site):  # noqa: F811
    page = open_page("schedules")
    assert (
        "= (P − 1)/(M + P − 1) = 3/(8 + 3), which is 37.5 % of the time at work = (P − 1)/M = 3/8"
        in page.inner_text("#schedules .numbers")
    )
    page.locator("#schedules .event").nth(4).focus()
    assert page.inner_text("#schedules .hover") == (
        "stage 0: backward of micro-batch 0, after waiting 6 for stage 1: backward of micro-batch 0"
    )
    page = open_page("ring")
    responds(page, "#ring", {"documents": "3", "hop": "1", "cp": "8", "split": "contiguous"})
    page = open_page("mesh")
    page.select_option("[name=pp]", "1")
    (layers, *_), held, sent = table_of(site, "mesh")["ranks"]["1 2 2 4"][0]
    assert layers == "0–31" and "layers 0–31, columns 0–3583 of each MLP" in page.inner_text("#mesh .hover")
    assert f"{held / 2**30:.1f} GiB" in page.inner_text("#mesh .hover")
    found = bars(page, "#mesh .sent")
    assert found == {axis: nbytes for axis, nbytes in zip(tables.AXES, sent, strict=True) if axis != "pp"}
    assert "between nodes" in page.inner_text("#mesh .bar >> nth=0") and "inside" in page.inner_text(
        "#mesh .bar >> nth=2"
    )


@pytest.mark.parametrize(("file", "names"), animations.PICTURES.items())
def test_moving_pictures_are_what_the_schedules_are(file, names):
    assert (ROOT / "pictures" / file).read_text() == animations.draw(names), "run python docs/animations.py"


@needs_browser
@pytest.mark.parametrize("name", ["collectives", "memory", "costs"])
def test_pictures_fit_a_phone(open_page, name):  # noqa: F811
    page = open_page(name, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
