"""Document masks: a packed document trains as it would alone, in every layout, also when layers are recomputed."""

from functools import lru_cache, partial
from unittest.mock import patch

import parity
import pytest
import torch
import torch.nn.functional as F
from conftest import load_step
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import train

from shared.config import UserError, parse

STEP = "step06_4d"


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """400 documents of 2 to 40 tokens or so: sequences of 16 hold some, two, or the middle of one."""
    directory = tmp_path_factory.mktemp("documents")
    for i in range(400):
        (directory / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1 + i % 5 * (i % 4))))
    return directory


@pytest.fixture
def packed_run(small_run, documents):
    """Arguments of a run in float64 on packed documents."""
    options = "--dtype float64 --optimizer sgd --lr 0.5 --eval-every 3 --steps 3 --mask-documents"
    return (*small_run, "--dataset", str(documents), *options.split())


@lru_cache
def one_rank(args):
    return run_ranks(1, parity.record, STEP, args)[0]


def alone(args, ignore_last_labels):
    """Loss and gradients of the first step by the plain model, that sees one document at a time. No step's code."""
    from shared.config import BaseConfig, parse
    from shared.corpus import prepare_corpus
    from shared.data import GlobalBatches, split_corpus
    from shared.llama_configs import load_model_config
    from shared.model import LlamaForCausalLM
    from shared.weights import full_weights, materialize

    config = parse(BaseConfig, [arg for arg in args if arg != "--mask-documents"])
    model_config = load_model_config(config)
    corpus = prepare_corpus(config, model_config.vocab_size)
    eos = corpus.tokenizer.eos_token_id
    model = LlamaForCausalLM(model_config)
    materialize(model, full_weights(config, model_config), torch.float64, torch.device("cpu"))
    lengths, loss, count = [], 0.0, 0
    for batch in GlobalBatches(split_corpus(corpus, config)[0], config, 0, 1).next():
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            ends = [i + 1 for i, token in enumerate(ids.tolist()) if token == eos and i + 1 < len(ids)]
            lengths.append([b - a for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)])
            for document, label in zip(ids.split(lengths[-1]), labels.split(lengths[-1]), strict=True):
                logits = model(document.unsqueeze(0), torch.arange(len(document)).unsqueeze(0))
                if ignore_last_labels and document[-1] == eos:
                    logits, label = logits[:, :-1], label[:-1]
                loss += F.cross_entropy(logits[0], label, reduction="sum")
                count += len(label)
    loss = loss / count
    loss.backward()
    return lengths, loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.quick
@pytest.mark.parametrize("options", [(), ("--ignore-last-labels",)])
def test_packed_documents_train_as_they_would_alone(packed_run, options):
    lengths, loss, gradients = alone(packed_run, bool(options))
    # Or the test would say little.
    assert {1, 2, 3} <= {len(row) for row in lengths} and len({n for row in lengths for n in row}) > 5
    record = one_rank((*packed_run, *options))[0]
    assert record.loss == pytest.approx(loss, rel=parity.TOLERANCE)
    for name, gradient in gradients.items():
        assert (record.gradients[name] - gradient).abs().max() <= parity.TOLERANCE * gradient.abs().max(), name


def test_the_mask_makes_a_difference(packed_run):
    unmasked = one_rank(tuple(arg for arg in packed_run if arg != "--mask-documents"))
    assert abs(unmasked[0].loss - one_rank(packed_run)[0].loss) > 1e-4


LAYOUTS = [
    (1, "--micro-batch-size 2"),
    (2, "--cp 2"),
    (2, "--cp 2 --cp-split contiguous --micro-batch-size 8"),
    (2, "--cp 2 --cp-engine all-to-all --micro-batch-size 1"),
    (4, "--pp 2 --cp 2 --cp-engine all-gather --micro-batch-size 2"),
    (4, "--cp 4 --cp-split contiguous"),
    (4, "--cp 4 --micro-batch-size 2"),
    (4, "--dp 2 --tp 2 --micro-batch-size 2"),
    (4, "--pp 2 --cp 2 --micro-batch-size 1 --cp-engine all-to-all"),
    (16, "--dp 2 --tp 2 --pp 2 --cp 2 --micro-batch-size 1 --sequence-parallel --ignore-last-labels"),
]


def check(ranks, options, args, timeout=120):
    alike = [option for option in options.split() if option == "--ignore-last-labels"]
    for rank, records in enumerate(run_ranks(ranks, parity.record, STEP, (*args, *options.split()), timeout=timeout)):
        error, where = parity.difference(records, one_rank((*args, *alike)))
        assert error <= parity.TOLERANCE, f"rank {rank}: {where} is off by {error:.1e}"


@pytest.mark.parametrize(("ranks", "options"), LAYOUTS)
def test_every_layout_trains_the_same(packed_run, ranks, options):
    check(ranks, options, packed_run)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, "--pp-schedule afab --micro-batch-size 1 --recompute full"),
        (2, "--pp 2 --micro-batch-size 1 --recompute selective"),
        (4, "--pp 2 --cp 2 --micro-batch-size 2 --pp-schedule afab --recompute full"),
        (2, "--cp 2 --cp-engine all-gather --micro-batch-size 1 --recompute full"),
    ],
)
def test_a_layer_recomputed_in_backward_is_handed_its_own_blocks(packed_run, ranks, options):
    check(ranks, options, packed_run)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, "--cp 2 --cp-engine all-to-all"),
        (2, "--cp 2 --cp-engine all-gather"),
        (4, "--cp 2 --tp 2 --micro-batch-size 2"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, documents, ranks, options):
    args = [*small_run, "--dataset", str(documents), "--mask-documents", *options.split()]
    check_ledgers(ranks, args, STEP)


def _graphs(args):
    """How many graphs torch has compiled after each step, without the time of a backend."""
    torch._dynamo.utils.counters.clear()
    compiled = []

    def forward_backward(original):
        def counted(*args):
            loss = original(*args)
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return loss

        return counted

    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        train(args, STEP, forward_backward=forward_backward)
    return compiled


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("options", ["", "--recompute full"])
def test_layers_are_not_compiled_anew_for_other_blocks(packed_run, options):
    args = (*packed_run, "--compile", "--eval-every", "0", "--micro-batch-size", "2", *options.split())
    ((first, *later),) = run_ranks(1, _graphs, args, timeout=240)
    assert later == [first, first] and first > 0


@pytest.mark.usefixtures("compiler")
def test_compiled_layers_train_the_same(packed_run):
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        check(2, "--cp 2 --compile --micro-batch-size 2", packed_run, timeout=300)


@pytest.mark.quick
def test_labels_are_ignored_of_documents_only(small_run):
    with pytest.raises(UserError, match="--ignore-last-labels needs --mask-documents"):
        parse(load_step(STEP).Config, [*small_run, "--ignore-last-labels"])
