"""Every token is seen once per epoch, in an order that depends on nothing but the seed, whatever the layout."""

import json
import multiprocessing
from functools import partial

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from shared import corpus as corpus_module
from shared.config import BaseConfig, UserError
from shared.corpus import prepare_corpus
from shared.data import GlobalBatches, Sequences, split_corpus

TEXTS = [f"document {i} of many, with {i * i} in it" for i in range(60)]


def make_config(**overrides):
    return BaseConfig(**{"seq_len": 8, "global_batch_size": 6, "micro_batch_size": 3} | overrides)


def rows(batches, steps):
    """Input tokens of the next steps, (steps, sequences of this rank, s)."""
    return np.stack([torch.cat([batch.input_ids for batch in batches.next()]).numpy() for _ in range(steps)])


def test_sequences_predict_every_token_once():
    sequences = Sequences(np.arange(8 * 5 + 4), 8)
    labels = np.concatenate([sequence[1:] for sequence in (sequences[i] for i in range(len(sequences)))])
    assert len(sequences) == 5 and np.array_equal(labels, np.arange(1, 41))


def test_batch_holds_shifted_labels_and_positions():
    batch = GlobalBatches(Sequences(np.arange(1000), 8), make_config(), 0, 1).next()[1]
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 8)
    assert torch.equal(batch.input_ids + 1, batch.labels)
    assert torch.equal(batch.position_ids, torch.arange(8).expand(3, -1))
    assert batch.input_ids.dtype == torch.int64


def test_an_epoch_is_a_permutation_and_the_next_another():
    # 25 sequences and batches of 6: an epoch ends within a batch, and no sequence is dropped there.
    first = rows(GlobalBatches(Sequences(np.arange(25 * 8 + 1), 8), make_config(), 0, 1), 25)[:, :, 0].flatten() // 8
    epochs = first.reshape(6, 25)
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_share_the_same_global_batches(size):
    sequences = Sequences(np.arange(1000), 8)
    whole = rows(GlobalBatches(sequences, make_config(), 0, 1), 5)
    shares = [rows(GlobalBatches(sequences, make_config(micro_batch_size=1), r, size), 5) for r in range(size)]
    assert np.array_equal(np.concatenate(shares, axis=1), whole)


def test_state_is_the_number_of_sequences_consumed():
    sequences = Sequences(np.arange(300), 8)
    uninterrupted = GlobalBatches(sequences, make_config(), 0, 1)
    rows(uninterrupted, 9)
    resumed = GlobalBatches(sequences, make_config(micro_batch_size=2), 0, 1, consumed=uninterrupted.consumed)
    assert uninterrupted.consumed == 54
    assert np.array_equal(rows(resumed, 4), rows(uninterrupted, 4))


def test_global_batch_must_divide():
    with pytest.raises(UserError, match="6 is not a multiple of 4 data-parallel ranks times --micro-batch-size 3"):
        GlobalBatches(Sequences(np.arange(1000), 8), make_config(), 0, 4)


def test_seed_changes_the_order():
    sequences = Sequences(np.arange(1000), 8)
    assert not np.array_equal(*(rows(GlobalBatches(sequences, make_config(seed=seed), 0, 1), 1) for seed in (0, 1)))


def test_order_never_changes():
    """A promise across versions of numpy, which a resumed run relies on."""
    first = rows(GlobalBatches(Sequences(np.arange(1000), 8), make_config(), 0, 1), 1)[0, :, 0] // 8
    assert first.tolist() == [42, 55, 31, 78, 50, 86]


def test_held_out_sequences_are_not_trained_on():
    train, validation = split_corpus(np.arange(8 * 1000 + 5), make_config())
    assert (len(train), len(validation)) == (990, 10)
    assert train[989][-1] == validation[0][0]


def test_too_small_a_dataset_names_the_numbers():
    with pytest.raises(UserError, match="89 tokens make 11 sequences of 8, but a global batch takes 6"):
        split_corpus(np.arange(89), make_config())


def write(directory, kind):
    """TEXTS as a dataset of each kind."""
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (directory / f"{i:02}.txt").write_text(text)
    elif kind == "jsonl":
        (directory / "data.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    elif kind == "json":
        (directory / "data.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "parquet":
        for part in (0, 1):
            table = pyarrow.table({"text": TEXTS[part::2], "id": list(range(30))})
            pyarrow.parquet.write_table(table, directory / f"{part}.parquet")
    return directory


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_kind_of_file(tmp_path, kind):
    corpus = prepare_corpus(make_config(dataset=str(write(tmp_path, kind))), vocab_size=300)
    eos = corpus.tokenizer.eos_token_id
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    documents = np.split(corpus.tokens, np.flatnonzero(corpus.tokens == eos) + 1)
    assert len(documents.pop()) == 0
    assert sorted(corpus.tokenizer.decode(document[:-1]) for document in documents) == sorted(TEXTS)


def test_single_text_file_keeps_every_character(tmp_path, monkeypatch):
    """Also when it is cut into several documents."""
    monkeypatch.setattr(corpus_module, "DOCUMENT_CHARACTERS", 100)
    text = "\n\n".join(TEXTS) + "\r\nend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = prepare_corpus(make_config(dataset=str(tmp_path / "a.txt")), vocab_size=300)
    assert corpus.tokenizer.decode(corpus.tokens).replace("<|endoftext|>", "") == text
    assert (corpus.tokens == corpus.tokenizer.eos_token_id).sum() > 10


def test_second_run_reads_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    config = make_config(dataset=str(write(tmp_path, "txt")))
    first = prepare_corpus(config, vocab_size=300)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_write_tokens", lambda *_: pytest.fail("tokenized again"))
        second = prepare_corpus(config, vocab_size=300)
    assert np.array_equal(first.tokens, second.tokens) and second.tokenizer.eos_token_id == 0
    (tmp_path / "00.txt").write_text("something longer and entirely different")
    assert "entirely different" in (changed := prepare_corpus(config, vocab_size=300)).tokenizer.decode(changed.tokens)


def test_an_interrupted_preparation_is_done_again(tmp_path, monkeypatch):
    config = make_config(dataset=str(write(tmp_path, "txt")))
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "tqdm", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_corpus(config, vocab_size=300)
    assert not list(corpus_module.cache_directory().glob("*.partial"))
    assert len(prepare_corpus(config, vocab_size=300).tokens) > 500


def _prepare(config, barrier, queue):
    barrier.wait()
    trained = []
    train_bpe = corpus_module._train_bpe
    corpus_module._train_bpe = lambda *args: trained.append(1) or train_bpe(*args)
    queue.put((len(prepare_corpus(config, vocab_size=300).tokens), len(trained)))


def test_processes_share_the_preparation(tmp_path):
    config = make_config(dataset=str(write(tmp_path, "txt")))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare, args=(config, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({length for length, _ in results}) == 1
    assert sorted(trained for _, trained in results) == [0, 0, 1]


def test_tokenizer_by_directory(tmp_path):
    (tmp_path / "data").mkdir()
    config = make_config(dataset=str(write(tmp_path / "data", "txt")))
    prepare_corpus(config, vocab_size=300).tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = prepare_corpus(make_config(dataset=config.dataset, tokenizer=str(tmp_path / "tokenizer")), vocab_size=5000)
    assert len(named.tokenizer) == 300
    with pytest.raises(UserError, match="300 tokens, but the model's vocabulary only 280"):
        prepare_corpus(make_config(dataset=config.dataset, tokenizer=str(tmp_path / "tokenizer")), vocab_size=280)


def hub(monkeypatch, tmp_path):
    """A dataset of the hub, as far as load_dataset can tell: a directory that it is given the name of."""
    write(tmp_path, "jsonl")
    for name in ("load_dataset", "load_dataset_builder"):
        local = partial(getattr(datasets, name), "json", data_dir=str(tmp_path))
        monkeypatch.setattr(
            corpus_module, name, lambda hub_id, config, local=local, **kwargs: local(name=config, **kwargs)
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(monkeypatch, tmp_path, streaming):
    hub(monkeypatch, tmp_path)
    config = make_config(dataset="someone/something", streaming=streaming, steps=2)
    corpus = prepare_corpus(config, vocab_size=300)
    eos = corpus.tokenizer.eos_token_id
    if streaming:
        # 2 steps of 6 sequences of 8 tokens, as many as a step takes held out, and the last label.
        train, validation = split_corpus(corpus.tokens, config)
        assert (len(corpus.tokens), len(train), len(validation)) == ((12 + 6) * 8 + 1, 12, 6)
    else:
        assert (corpus.tokens == eos).sum() == len(TEXTS)
    assert corpus.tokenizer.decode(corpus.tokens[: list(corpus.tokens).index(eos)]) == TEXTS[0]


def test_missing_column_names_those_there_are(tmp_path):
    config = make_config(dataset=str(write(tmp_path, "jsonl")), text_column="body")
    with pytest.raises(UserError, match="no column 'body': choose --text-column from text, id"):
        prepare_corpus(config, vocab_size=300)


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "no such file"), ({"a.csv": "x"}, "no such file"), ({"a.txt": ""}, "holds no documents")],
)
def test_unusable_directory(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        prepare_corpus(make_config(dataset=str(tmp_path)), vocab_size=300)


def test_mixed_directory(tmp_path):
    write(tmp_path, "txt"), write(tmp_path, "jsonl")
    with pytest.raises(UserError, match=r"must be one kind .* found \.jsonl, \.txt"):
        prepare_corpus(make_config(dataset=str(tmp_path)), vocab_size=300)


def test_broken_json_and_unknown_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(UserError, match=r"a\.jsonl|JSON"):
        prepare_corpus(make_config(dataset=str(tmp_path)), vocab_size=300)
    with pytest.raises(UserError, match="no such file or directory, and no Hugging Face dataset within reach"):
        prepare_corpus(make_config(dataset="no/such-dataset"), vocab_size=300)
    with pytest.raises(UserError, match="no tokenizer in that directory"):
        prepare_corpus(make_config(tokenizer="no/such-tokenizer"), vocab_size=300)
    with pytest.raises(UserError, match="at least 257"):
        prepare_corpus(make_config(dataset=str(write(tmp_path, "txt") / "00.txt")), vocab_size=100)


def test_documents_that_are_none_are_left_out_and_other_types_refused(tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ["one", None, "two", None])
    (tmp_path / "a.jsonl").write_text(rows)
    corpus = prepare_corpus(make_config(dataset=str(tmp_path / "a.jsonl")), vocab_size=300)
    assert corpus.tokenizer.decode(corpus.tokens) == "one<|endoftext|>two<|endoftext|>"
    (tmp_path / "b.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError, match="must hold text, but holds 5"):
        prepare_corpus(make_config(dataset=str(tmp_path / "b.jsonl")), vocab_size=300)


def test_end_of_sequence_token_is_part_of_the_key(tmp_path):
    """Two tokenizers that differ in nothing else, as those of base models and their chat versions."""
    (tmp_path / "data").mkdir()
    path = str(write(tmp_path / "data", "txt"))
    tokenizer = prepare_corpus(make_config(dataset=path), vocab_size=300).tokenizer
    for name, eos in (("first", "<|endoftext|>"), ("second", "a")):
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(tmp_path / name)
        config = make_config(dataset=path, tokenizer=str(tmp_path / name))
        corpus = prepare_corpus(config, vocab_size=300)
        assert corpus.tokens[-1] == corpus.tokenizer.convert_tokens_to_ids(eos)


def test_text_without_line_ends_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "DOCUMENT_CHARACTERS", 100)
    (tmp_path / "a.txt").write_text("word " * 200)
    corpus = prepare_corpus(make_config(dataset=str(tmp_path / "a.txt")), vocab_size=300)
    assert (corpus.tokens == corpus.tokenizer.eos_token_id).sum() == 5


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        prepare_corpus(make_config(dataset=str(tmp_path)), vocab_size=300)


def test_directories_named_like_files(tmp_path):
    (tmp_path / "part.txt").mkdir()
    (tmp_path / "part.txt" / "a.txt").write_text("text")
    assert len(prepare_corpus(make_config(dataset=str(tmp_path)), vocab_size=300).tokens) > 1


def test_unwritable_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match=r"the cache .* cannot write to /proc"):
        prepare_corpus(make_config(), vocab_size=300)


def test_python_source_is_the_default():
    source = corpus_module._source(make_config())
    assert len(source.files) > 300 and not any("/test/" in file or "site-packages" in file for file in source.files)
