"""The site says what the code does, and works in a browser, from a disk, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from filelock import FileLock
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("sphinx", reason="needs pip install -e '.[docs]'")
sys.path.insert(0, str(ROOT / "docs"))

import build
import diffs
import tables

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
AXE = ROOT / ".axe" / "node_modules" / "axe-core" / "axe.min.js"
# One of each kind.
MAIN_PAGES = [
    "index",
    "step02_data_parallel/README",
    "diffs/step02_data_parallel",
    "diffs/step06_4d",
    "collectives",
    "memory",
    "costs",
    "schedules",
    "mesh",
    "ring",
    "rosetta",
    "options",
    "GLOSSARY",
]


def test_a_change_without_a_note_and_a_note_without_a_change_are_refused(monkeypatch):
    before, after = ((ROOT / step / "train.py").read_text().splitlines() for step in diffs.PAIRS[0])
    notes = diffs.notes()
    step = diffs.PAIRS[0][1]
    monkeypatch.setattr(diffs, "notes", lambda: {step: notes[step][1:]})
    with pytest.raises(ValueError, match=r"no note for the change .*import data_parallel"):
        diffs.placed(step, before, after)
    monkeypatch.setattr(diffs, "notes", lambda: {step: [*notes[step], {"at": "import torch", "note": ""}]})
    with pytest.raises(ValueError, match="'import torch' is a changed line of 0 changes"):
        diffs.placed(step, before, after)


def test_rows_of_a_difference_are_both_files():
    before, after = ((ROOT / step / "train.py").read_text().splitlines() for step in diffs.PAIRS[2])
    for hunk in diffs.hunks(before, after):
        pairs = list(diffs.rows(hunk))
        assert [i for i, _ in pairs if i is not None] == list(hunk.old)
        assert [j for _, j in pairs if j is not None] == list(hunk.new)
        assert all(before[i] == after[j] for i, j in pairs if i not in hunk.removed and j not in hunk.added)


@pytest.mark.parametrize("layout", ["2 2 2 2", "1 4 2 2", "4 1 1 4", "1 16 1 1"])
def test_groups_of_the_picture_are_those_of_a_mesh(layout):
    groups = tables.meshes()["layouts"][layout]
    sizes = tuple(map(int, layout.split()))
    for rank in (0, 5, 15):
        dist.init_process_group("fake", rank=rank, world_size=16, store=FakeStore())
        try:
            mesh = init_device_mesh(
                "cpu", sizes, mesh_dim_names=tables.AXES, backend_override=dict.fromkeys(tables.AXES, "fake")
            )
            for axis in tables.AXES:
                ranks = dist.get_process_group_ranks(mesh.get_group(axis))
                assert [rank in group for group in groups[axis]].count(True) == 1 and ranks in groups[axis]
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(("name", "ring"), tables.rings().items())
def test_hops_cover_the_mask_once(name, ring):
    ranks = len(ring["pieces"])
    pairs = [tuple(pair) for hop in ring["hops"] for seen in hop for pair in seen]
    assert sorted(pairs) == [(q, k) for q in range(2 * ranks) for k in range(q + 1)]
    owner = {piece: rank for rank, own in enumerate(ring["pieces"]) for piece in own}
    for hop, of_ranks in enumerate(ring["hops"]):
        for rank, seen in enumerate(of_ranks):
            assert all((owner[q], owner[k]) == (rank, (rank - hop) % ranks) for q, k in seen)


def test_micro_batches_held_are_those_of_the_papers():
    found = tables.schedules()["schedules"]
    for name, entry in found.items():
        schedule, stages, micro_batches, chunks = name.split()
        stages, micro_batches, chunks = int(stages), int(micro_batches), int(chunks)
        expected = {
            "afab": [micro_batches] * stages,
            "1f1b": [min(stages - stage, micro_batches) for stage in range(stages)],
            "interleaved": [
                min(chunks * stages + stages - 2 * stage - 1, chunks * micro_batches) for stage in range(stages)
            ],
        }
        if schedule in expected:
            assert entry["held"] == expected[schedule], name
        if schedule in ("afab", "1f1b"):
            # (P − 1) / (M + P − 1) of all time.
            assert entry["bubble"] == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-4)
        assert len(entry["events"]) == stages and max(entry["held"]) <= chunks * micro_batches


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Built once, whichever workers ask for it."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    output = directory / "docs"
    with FileLock(directory / "docs.lock"):
        if not (output / "site" / "index.html").exists():
            # A warning is an error: a link without a page, a page without a place.
            subprocess.run([sys.executable, ROOT / "docs" / "build.py", output], check=True)
    return output


def test_the_site_is_the_same_each_time(site, tmp_path):
    build.write_sources(tmp_path)
    pages = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source = site / "source"
    assert pages == {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_links_lead_to_pages(site):
    pages = {path: path.read_text() for path in (site / "site").rglob("*.html")}
    for path, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"https?:|data:|#|mailto:", target):
                continue
            target, _, anchor = target.split("?")[0].partition("#")
            found = (path.parent / target).resolve()
            assert found.exists(), f"{path.name} links to {target}"
            if anchor and found in pages:
                assert f'id="{anchor}"' in pages[found], f"{path.name} links to {target}#{anchor}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=180_000)
        yield browser
        browser.close()


@pytest.fixture
def open_page(site, browser):
    """Opens a page from the disk. In the end there must have been no error, and no request to any host."""
    faults, pages = [], []

    def open_page(name: str, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        # A busy machine takes its time.
        page.set_default_timeout(180_000)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        local = ("file:", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else faults.append(request.url))
        page.goto((site / "site" / f"{name}.html").as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not faults


@needs_browser
def test_schedules_in_a_browser(open_page, tmp_path):
    page = open_page("schedules")
    found = tables.schedules()["schedules"]
    for schedule, stages, micro_batches, chunks in (
        ("1f1b", 4, 8, 1),
        ("afab", 2, 16, 1),
        ("zero-bubble", 3, 6, 1),
        ("interleaved", 4, 8, 3),
    ):
        page.select_option("[name=schedule]", schedule)
        page.select_option("[name=stages]", str(stages))
        page.select_option("[name=microBatches]", str(micro_batches))
        page.select_option("[name=chunks]", str(chunks))
        entry = found[f"{schedule} {stages} {micro_batches} {chunks}"]
        said = page.inner_text("#schedules .numbers")
        assert f"bubble {100 * entry['bubble']:.1f} %" in said and ", ".join(map(str, entry["held"])) in said
        assert page.locator("#schedules .event").count() == sum(map(len, entry["events"]))
    page.locator("#schedules .event").first.focus()
    assert page.inner_text("#schedules .hover") == "stage 0: forward of micro-batch 0"
    trace = [{"ph": "X", "name": "forward 3", "tid": 0, "ts": 0, "dur": 1}]
    trace += [{"ph": "X", "name": "backward 3", "tid": 1, "ts": 1, "dur": 3}]
    (tmp_path / "own.json").write_text(json.dumps(trace))
    page.set_input_files("#schedules input[type=file]", tmp_path / "own.json")
    page.wait_for_function("document.querySelector('#schedules .numbers').textContent.includes('own.json')")
    assert page.inner_text("#schedules .numbers") == "bubble 50.0 % of all time, in own.json"


@needs_browser
def test_mesh_in_a_browser(open_page):
    page = open_page("mesh")
    page.locator("#mesh button").nth(5).press("Enter")
    assert page.inner_text("#mesh .numbers") == "rank 5 | pp 5, 13 | dp 1, 5 | cp 5, 7 | tp 4, 5"
    page.select_option("[name=tp]", "8")
    assert page.inner_text("#mesh .numbers").endswith("tp 0, 1, 2, 3, 4, 5, 6, 7")
    sizes = [int(page.input_value(f"[name={axis}]")) for axis in tables.AXES]
    assert torch.tensor(sizes).prod() == 16


@needs_browser
def test_ring_in_a_browser(open_page):
    page = open_page("ring")
    assert "1.00 × the mean" in page.inner_text("#ring .numbers")
    page.select_option("[name=split]", "contiguous")
    page.select_option("[name=cp]", "2")
    # Rank 0 waits for rank 1: 2 + 4 squares of time for 2 · 4 squares of work on two ranks.
    assert "the time of 6 squares, 1.50 × the mean" in page.inner_text("#ring .numbers")
    page.fill("[name=hop]", "1")
    assert page.inner_text("#ring .numbers").startswith("hop 1: squares per rank 0, 4 |")
    assert "rank 1 has the keys of rank 0" in page.inner_text("#ring .hover")


@needs_browser
@pytest.mark.parametrize("name", MAIN_PAGES)
def test_pages_fit_a_phone(open_page, name):
    page = open_page(name, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_browser
@pytest.mark.skipif(not AXE.exists(), reason="needs npm install --no-save --prefix .axe axe-core")
@pytest.mark.parametrize("name", MAIN_PAGES)
def test_contrast_and_labels(open_page, name):
    for scheme in ("light", "dark"):
        page = open_page(name, scheme=scheme)
        page.add_script_tag(path=AXE)
        rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
        # It would read style sheets again, which a page on a disk may not.
        found = page.evaluate("rules => axe.run({ runOnly: rules, preload: false })", rules)["violations"]
        assert not [(fault["id"], node["html"]) for fault in found for node in fault["nodes"]], scheme


@needs_browser
def test_the_switch_between_an_idea_and_everything(open_page):
    page = open_page("diffs/step03_tensor_parallel")
    lines = len((ROOT / "step03_tensor_parallel" / "train.py").read_text().splitlines())
    rows = page.locator(".whole:has([name='train.py']) tr:visible")
    assert 10 < rows.count() < lines / 2
    page.focus("[name='train.py'][value=v0]")
    page.keyboard.press("ArrowRight")
    assert rows.count() == lines


def test_a_first_visit_is_light(site):
    for name in ("index", "schedules"):
        page = site / "site" / f"{name}.html"
        loaded = re.findall(r'(?:href|src)="([^"?]+\.(?:css|js|svg|png))', page.read_text())
        assert len(loaded) > 5
        assert sum(path.stat().st_size for path in [page, *(page.parent / name for name in loaded)]) <= 1.5e6
