"""The labs judge rightly: stubs as stubs, the project's own code as right, and wrong code by what is wrong with it."""

import re
from argparse import Namespace

import pytest
from conftest import ROOT

from labs import judge, write
from labs.attempt import Call
from labs.cut import cut, file_of, located
from labs.table import LABS
from labs.waiting import disagreements

# Lab, what is replaced, by what, and the diagnosis.
WRONG = re.findall(r"(\w+) - (.*)\n    \+ ?(.*)\n    ! (.*)", (ROOT / "tests/wrong_labs.txt").read_text())
labs = pytest.mark.parametrize("lab", LABS.values(), ids=LABS)


def judged(lab, path, code):
    path.write_text(code)
    return judge.judge(lab, path)


@labs
def test_a_stub_is_found_to_be_one(lab, tmp_path):
    path = tmp_path / f"{lab.id}.py"
    function, place = re.fullmatch(r"`(\S+)` is not written yet \((\S+)\)", judged(lab, path, cut(lab))).groups()
    assert function in {".".join(located(lab, name)[1]) for name in lab.names}
    file, _, line = place.rpartition(":")
    assert file == str(path) and path.read_text().splitlines()[int(line) - 1].strip() == "raise NotImplementedError"


@labs
def test_the_projects_own_code_passes(lab, tmp_path):
    assert judged(lab, tmp_path / f"{lab.id}.py", cut(lab, solved=True)) is None


@pytest.mark.parametrize(("name", "old", "new", "diagnosis"), WRONG, ids=[f"{w[0]}-{w[2]}" for w in WRONG])
def test_wrong_code_is_told_what_is_wrong(name, old, new, diagnosis, tmp_path):
    code, path = cut(LABS[name], solved=True), tmp_path / f"{name}.py"
    assert code.count(old) == 1
    found = judged(LABS[name], path, code.replace(old, new)).replace(f"{tmp_path}/", "")
    pattern = re.escape(diagnosis).replace("…", ".*").replace("⏎", "\n")
    assert re.search(pattern, found, re.DOTALL), found


def test_each_lab_has_wrong_code():
    assert all(sum(wrong[0] == name for wrong in WRONG) >= 2 for name in LABS)


@labs
def test_a_student_has_what_he_needs_to_read(lab):
    file, section = lab.read
    _, _, text = (ROOT / file).read_text().partition(f"## {section}\n")
    assert text
    # But not the solution.
    solution = set(cut(lab, solved=True).splitlines()) - set(cut(lab).splitlines())
    assert not [line for line in solution if len(line) > 40 and line.strip() in text.partition("\n## ")[0]]
    assert all(file_of(lab, located(lab, name)[0]).is_file() for name in lab.names)
    assert f"\n| {lab.id} | " in (ROOT / "labs/README.md").read_text()
    # Not even the helper that a solution calls.
    assert "_in_turn" not in cut(lab) and all(hint.strip() for hint in lab.hints) and lab.hints


def call(rank, kind="all-reduce", nbytes=8, peer=None):
    return Call(rank, "1", "tp", [0, 1], kind, nbytes, peer, False)


def test_who_waits_for_whom():
    both = [call(rank) for rank in (0, 1)]
    assert disagreements(both * 3) == []
    assert disagreements([*both * 2, call(1)]) == ["rank 1 waits in all-reduce 3 of tp, rank 0 never called it"]
    (sentence,) = disagreements([*both, call(0, nbytes=8), call(1, "all-gather")])
    assert "do not agree on all-reduce 2 of tp: rank 0 has 8 bytes, where rank 1 has all-gather of 8 bytes" in sentence
    messages = [call(0, "send", peer=1), call(1, "receive", peer=0)]
    assert disagreements(messages) == []
    assert disagreements([*messages, call(1, "receive", peer=0)]) == [
        "rank 1 waits for message 2 of tp from rank 0, which it never sent"
    ]
    assert disagreements([*messages, call(0, "send", peer=1)]) == [
        "rank 0 waits for rank 1 to take message 2 of tp, which it never does"
    ]


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "MINE", tmp_path / "my")
    monkeypatch.setattr(write, "ROOT", tmp_path)
    args, file = Namespace(id="05a"), tmp_path / "my/05a.py"

    def says(command):
        return command(args), capsys.readouterr().out

    assert says(write.check_lab) == (1, "There is no my/05a.py yet: python -m labs open 05a\n")
    assert says(write.open_lab)[0] == 0 and file.read_text() == cut(LABS["05a"])
    file.write_text(cut(LABS["05a"], solved=True))
    code, said = says(write.open_lab)
    assert code == 1 and "is yours" in said and "pieces" in file.read_text()
    assert "05a  Zigzag positions                        open: my/05a.py\n" in says(write.list_labs)[1]
    assert says(write.check_lab)[0] == 0
    assert "05a  Zigzag positions                        passed\n" in says(write.list_labs)[1]
    file.write_text(cut(LABS["05a"]))
    code, said = says(write.check_lab)
    assert code == 1 and said.startswith("05a: `local_positions` is not written yet")
    code, said = says(write.list_labs)
    assert "passed, changed since" in said and f"1 of {len(LABS)} passed" in said
    assert says(write.hint) == (0, f"1/1  {LABS['05a'].hints[0]}\n")
    file.write_text("def local_positions(:")
    assert "SyntaxError" in says(write.check_lab)[1]
    file.write_text("")
    assert says(write.check_lab)[1] == "05a: `local_positions` is missing: it must keep its name\n"
