"""What the site and the READMEs say of the code is so: options, files, links, and code that is cut out of files."""

import ast
import inspect
import pkgutil
import re
import sys

import pytest
from conftest import ROOT
from diff_classes import classify

sys.path.insert(0, str(ROOT / "docs"))

import cut
import glossary
import options

# Each page, but for those that are not ours, such as a virtual environment's.
TEXTS = [path for path in ROOT.rglob("*.md") if not re.search(r"/[._]|node_modules", f"/{path.relative_to(ROOT)}")]
# Pages of docs/ link to pages of the site, and name other projects' files: test_docs.py and the test of Rosetta.
PROSE = [path for path in TEXTS if path.parent.name != "pages"]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# Their options are none of this project's.
OTHERS = re.compile(r"\b(apptainer|git|lm-eval|pip|pytest|ruff|sbatch)\b|--rdzv-backend|--shutdown-timeout|fr_trace")


def of_readers(path):
    """A text without its fences, and the code that it has within lines and in fences of commands."""
    text = path.read_text()
    prose = FENCE.sub("", text)
    fences = [line for language, code in FENCE.findall(text) if language == "bash" for line in code.splitlines()]
    return prose, re.findall(r"`([^`\n]+)`", prose) + fences


def test_the_top_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_files_and_options_of_texts_exist(path):
    prose, code = of_readers(path)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        assert "://" in target or (path.parent / target).exists(), target
    for name in re.findall(r"[\w./-]+\.(?:py|md|sh|csv)\b", " ".join(code)):
        here = "/" in name and ((ROOT / name).exists() or (path.parent / name).exists())
        assert here or "NN" in name or name in NAMES or name.startswith("my/"), name
    for line in code:
        if not OTHERS.search(line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", line)) <= OPTIONS, line


# Names of files, and what any command of the project takes.
NAMES = {path.name for path in ROOT.rglob("*.*")}
# Tests try options that do not exist.
NOT_OURS = re.compile("/[._]|/test_")
SOURCES = [path.read_text() for path in ROOT.rglob("*.py") if not NOT_OURS.search(f"/{path.relative_to(ROOT)}")]
FIELDS = {
    f"--{no}{field.target.id.replace('_', '-')}"
    for source in SOURCES
    for cls in ast.walk(ast.parse(source))
    if isinstance(cls, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in cls.decorator_list)
    for field in cls.body
    if isinstance(field, ast.AnnAssign)
    for no in ("", "no-")
}
TORCHRUN = {"--max-restarts", "--nproc-per-node", "--standalone"}
OPTIONS = FIELDS | TORCHRUN | {option for source in SOURCES for option in re.findall(r'"(--[a-z][a-z-]+)"', source)}


def test_every_option_has_a_help_and_stands_where_it_is_born():
    page = options.page()
    steps = dict(re.findall(r"^\| `--([a-z-]+)`.* \| (\S+) \|$", page, re.MULTILINE))
    assert (steps["dp"], steps["cp"], steps["zero"], steps["lr"]) == ("02–06", "05–06", "06", "01–06")
    # Of those that a later step changes, each with its own choices.
    schedules = re.findall(r"^\| `--pp-schedule`<br>(.*?) \|.* \| (\S+) \|$", page, re.MULTILINE)
    assert schedules == [("`1f1b`, `afab`", "04–05"), ("`1f1b`, `afab`, `zero-bubble`", "06")]
    for step in options.STEPS:
        with options.loaded(step) as train:
            found = options.options(train.Config)
        for option in found:
            assert option.text.endswith("."), f"{step}: --{option.name} has no comment above it"


def test_code_is_cut_out_by_name():
    assert cut.cut("docs/cut.py", "cut") == inspect.getsource(cut.cut).rstrip()
    with pytest.raises(ValueError, match=r"has 0 definitions of filled\.nothing"):
        cut.cut("docs/cut.py", "filled.nothing")


def has(name):
    try:
        return bool(pkgutil.resolve_name(name))
    except (AttributeError, ImportError):
        return False


def test_rosetta_names_what_exists():
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*)\|", (ROOT / "docs/pages/rosetta.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for ours, of_torch in rows:
        assert set(re.findall(r"--[a-z][a-z0-9-]+", ours)) <= OPTIONS
        for name in re.findall(r"`(\w+\.[\w.]+)`", of_torch):
            assert has(f"torch.{name}") or has(f"torch.distributed.{name}"), name


def test_views_of_a_file():
    pytest.importorskip("sphinx", reason="needs pip install -e '.[docs]'")
    import diffs
    import whole

    for before, after in diffs.PAIRS:
        old, new = ((ROOT / step / "train.py").read_text() for step in (before, after))
        classes, last = classify(old, new), after == diffs.STEPS[-1]
        own = (whole.of_lessons if last else whole.ideas)(old, new)
        shown = set().union(*(whole.around(new, lines) for lines in own.values()))
        # A lesson is imports too. The idea is not.
        assert {line for line, kind in classes.items() if kind == "idea" or (last and kind != "text")} <= shown
        assert last or len(shown) < len(new.splitlines()) / 2
    source = (
        "import a\n\n\nclass Config:\n    b: int = 1\n\n\ndef traffic():\n    return 1\n\n\ndef idea():\n    return 2\n"
    )
    assert whole.bookkeeping(source) == {1, 4, 5, 8, 9}


def test_words_are_explained_where_they_first_stand(tmp_path):
    found = glossary.terms()
    assert found.keys() > glossary.EVERYDAY
    text = "# A rank\n\nIn `rank`, [a rank](x.md), ranks of a **mesh**. A rank.\n\n```\nmesh\n```\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(text)
    glossary.explain(tmp_path, "docs/page.md")
    page = (tmp_path / "docs" / "page.md").read_text()
    assert re.findall(r'<a class="term" href="([^"]+)" title="[^"]+">([^<]+)</a>(..)', page) == [
        ("../GLOSSARY.html#processes", "rank", "s "),
        ("../GLOSSARY.html#processes", "mesh", "**"),
    ]
    assert re.sub(r"</?a[^>]*>", "", page) == text
