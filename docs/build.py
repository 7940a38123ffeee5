"""Build the site: `python docs/build.py`, then open docs/_build/site/index.html.

Its pages are the READMEs, differences between steps and tables that the project's functions give now. Nothing of it is
kept: it is computed anew each time.
"""

import argparse
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import changes
import cut
import diffs
import glossary
import options
import readmes
import table_collectives
import table_costs
import table_memory
import tables
from sphinx.cmd.build import build_main

# Pages in their order: for each part, the READMEs and the diffs that belong to it.
PARTS = {
    "The steps": [
        "step00_collectives/README.md",
        "step01_single_gpu/README.md",
        "step02_data_parallel/README.md",
        "step03_tensor_parallel/README.md",
        "step04_pipeline_parallel/README.md",
        "step05_context_parallel/README.md",
        "step06_4d/README.md",
    ],
    "Rooms of step06": [
        "step06_4d/zero/README.md",
        "step06_4d/zero/HYBRID.md",
        "step06_4d/tensor/README.md",
        "step06_4d/pipeline/README.md",
        "step06_4d/context/README.md",
        "step06_4d/observe/README.md",
    ],
    "Running for real": [
        "USING.md",
        "GPUS.md",
        "shared/corpus/README.md",
        "step06_4d/planning/README.md",
        "step06_4d/slurm/README.md",
        "step06_4d/survive/README.md",
        "step06_4d/survive/CHECKPOINTS.md",
        "step06_4d/survive/EXPORTS.md",
    ],
    "How it is proved": ["tests/README.md", "tests/benchmarks/README.md"],
    "Labs": ["labs/README.md", "labs/BREAK.md", "labs/HANGS.md", "labs/QUESTIONS.md", "labs/TEACHING.md"],
    "Reference": ["README.md", "GLOSSARY.md", "CONTRIBUTING.md"],
}

# And the table of each picture.
PICTURES = {
    "collectives": table_collectives.collectives,
    "memory": table_memory.steps,
    "costs": table_costs.costs,
    "schedules": tables.schedules,
    "mesh": tables.meshes,
    "ring": lambda: tables.rings() | tables.document_rings(),
}


def write_sources(source: Path) -> None:
    """All that Sphinx reads: pages, pictures and the files that pages link to. Replaces those of an earlier build."""
    if source.exists() and any(source.iterdir()) and not (source / "rosetta.md").exists():
        raise SystemExit(f"error: {source} was not made by this script: choose another directory")
    shutil.rmtree(source, ignore_errors=True)
    for directory in ("pictures", "docs/static"):
        shutil.copytree(ROOT / directory, source / Path(directory).name)
    for page in (DOCS / "pages").iterdir():
        (source / page.name).write_text(cut.filled(page.read_text()))
        glossary.explain(source, page.name)
    (source / "options.md").write_text(options.page())
    for name in (name for part in PARTS.values() for name in part):
        readmes.write_page(ROOT, name, source)
        glossary.explain(source, name)
    linked = readmes.write_linked_files(ROOT, source)
    for before, after in diffs.PAIRS:
        changes.write_page(before, after, source / "diffs" / f"{after}.md")
    for name, table in PICTURES.items():
        tables.write_page(source / f"{name}.md", name, table())
    chapters = {
        "The steps": [page for name in PARTS["The steps"] for page in _with_diff(name)],
        "Pictures": list(PICTURES),
        **{caption: [name[:-3] for name in names] for caption, names in PARTS.items() if caption != "The steps"},
    }
    chapters["Reference"] = ["rosetta", "options", *chapters["Reference"]]
    index = source / "index.md"
    trees = [_toctree(f":caption: {caption}\n", pages) for caption, pages in {**chapters, "Files": linked}.items()]
    index.write_text("\n".join([index.read_text(), *trees]))


def _with_diff(name: str) -> list[str]:
    """The page of a step, and that of what it changes."""
    step = Path(name).parent.name
    return [name[:-3], *(f"diffs/{after}" for _, after in diffs.PAIRS if after == step)]


def _toctree(options: str, pages: list[str]) -> str:
    return f"```{{toctree}}\n:hidden:\n{options}\n" + "\n".join(pages) + "\n```\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=DOCS / "_build")
    output = parser.parse_args().output
    write_sources(output / "source")
    arguments = ["-q", "-W", "--keep-going", "-c", str(DOCS), "-d", str(output / "doctrees")]
    return build_main([*arguments, str(output / "source"), str(output / "site")])


if __name__ == "__main__":
    raise SystemExit(main())
