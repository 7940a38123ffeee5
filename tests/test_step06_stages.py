"""step06: a run that stops early keeps its schedule, and the next stage goes on with weights and moments alone."""

import parity
import pytest
from conftest import load_step, make_trainer
from corpora import write_rows
from ranks import RankFailed, run_ranks

from shared.config import UserError, parse

STEP = "step06_4d"
OPTIONS = ["--dtype", "float64", "--steps", "4", "--warmup-steps", "2"]
# Both stages at one learning rate.
CONSTANT = [
    "--dtype",
    "float64",
    "--schedule",
    "constant",
    "--warmup-steps",
    "0",
    "--eval-every",
    "0",
    "--save-every",
    "0",
]


def losses(*args, ranks=1):
    return [record.loss for record in run_ranks(ranks, parity.record, STEP, tuple(map(str, args)))[0]]


def test_stopped_early_with_the_schedule_of_all_steps(small_run, tmp_path):
    args = (*small_run, *OPTIONS, "--checkpoint-dir", tmp_path)
    expected = [record.loss for record in parity.reference((*small_run, *OPTIONS))]
    assert losses(*args, "--stop-after", 2) == expected[:2]
    assert (tmp_path / "step-000002").is_dir()
    assert losses(*args) == pytest.approx(expected[2:], rel=1e-12)
    # And made longer.
    assert len(losses(*args, "--steps", 6)) == 2
    others = [*map(str, args), "--resume-from", f"{tmp_path}/step-000004", "--checkpoint-dir", f"{tmp_path}-2"]
    with pytest.raises(UserError, match=r"step-000004 has 4 steps, and this run is to have 4: raise --steps"):
        parse(load_step(STEP).Config, others)


def test_what_is_written_in_the_end_is_written_in_the_end(small_run, tmp_path):
    """And a run that is finished may be started once more."""
    ends = ["--export-dir", str(tmp_path / "e"), "--timeline", str(tmp_path / "t.svg")]
    args = (*small_run, *OPTIONS, "--checkpoint-dir", tmp_path / "c", "--pp", "1", *ends)
    losses(*args, "--stop-after", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert len(losses(*args)) == 2 and {path.name for path in tmp_path.iterdir()} == {"c", "e", "t.svg", "t.json"}
    assert losses(*args) == []


def _two_stages(args):
    """The losses of two steps, and of two more on the same data from its beginning."""
    trainer, found = make_trainer(load_step(STEP), args), []
    for _ in range(2):
        trainer.batches.consumed = 0
        for _ in range(2):
            found.append(trainer.forward_backward(trainer.batches.next()).item())
            trainer.clip_grad_norm()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    return found


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["", "--dp 1 --tp 2 --zero 1"])
def test_a_new_stage_keeps_weights_and_moments_and_begins_its_data(small_run, tmp_path, layout):
    args = (*small_run, *CONSTANT)
    expected = run_ranks(1, _two_stages, [*args, "--steps", "4"])[0]
    assert losses(*args, "--steps", 2, "--checkpoint-dir", tmp_path / "a") == expected[:2]
    stage = ("--resume-from", tmp_path / "a", "--new-stage", "--checkpoint-dir", tmp_path / "b", *layout.split())
    args = (*args, "--steps", 2, *stage)
    assert losses(*args, "--stop-after", 1, ranks=2) == pytest.approx(expected[2:3], rel=1e-12)
    # Started again, it goes on from its own checkpoint.
    assert losses(*args, ranks=2) == pytest.approx(expected[3:], rel=1e-12)


def test_a_new_stage_may_have_other_data_and_no_other_model(small_run, tmp_path):
    write_rows(tmp_path / "other.jsonl", [f"another {i} text" for i in range(300)])
    losses(*small_run, *CONSTANT, "--steps", 2, "--checkpoint-dir", tmp_path / "a")
    other = ("--resume-from", tmp_path / "a", "--dataset", tmp_path / "other.jsonl", "--seq-len", 8)
    args = (*small_run, *CONSTANT, "--steps", 2, *other)
    with pytest.raises(RankFailed, match=r"(?s)is of another run: .*seq_len 16 there, 8 here; corpus .*--new-stage"):
        losses(*args, "--steps", 4)
    # What is trained on the other data would give the embeddings other tokens.
    with pytest.raises(
        RankFailed, match=r"step-000002 was trained with another tokenizer: pass --tokenizer .*/tokenizer"
    ):
        losses(*args, "--new-stage", "--checkpoint-dir", tmp_path / "b")
    args = (*args, "--tokenizer", tmp_path / "a" / "step-000002" / "tokenizer")
    assert len(losses(*args, "--new-stage", "--checkpoint-dir", tmp_path / "b")) == 2
    with pytest.raises(RankFailed, match="is of another run: num_hidden_layers 2 there, 1 here"):
        losses(*args, "--new-stage", "--num-hidden-layers", 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--new-stage", "name it by --resume-from"),
        ("--stop-after 2", "needs a --checkpoint-dir"),
        ("--stop-after 0 --checkpoint-dir {here}", "--stop-after 0 must be at least 1"),
    ],
)
def test_impossible_options(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        parse(load_step(STEP).Config, args.format(here=tmp_path).split())
