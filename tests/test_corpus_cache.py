"""Tokenizers, the cache, streams and mixtures: what is prepared is what was asked for, once, whoever asks."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import (
    TEXTS,
    all_tokens,
    documents,
    make_config,
    prepared,
    save_tokenizer,
    source,
    with_eos,
    write,
    write_rows,
)
from tokenizers import decoders, models, pre_tokenizers, trainers

from shared import corpus as corpus_module
from shared.config import UserError
from shared.corpus import cache_directory, preparation, prepare_all, prepare_corpus, sources
from shared.corpus.encoding import encode_batches
from shared.corpus.tokenizers import Encoder, adds_bos, fingerprint, load_tokenizer, train_bpe
from shared.data import split_corpus

# Tokenizers


def test_an_id_beyond_the_number_of_tokens(tmp_path):
    """258 tokens, of which one has the id 70000."""
    name = save_tokenizer(tmp_path / "tokenizer", eos_id=70000)
    data = write(tmp_path, "jsonl")
    corpus = prepared(data / "data.jsonl", vocab_size=70001, tokenizer=name)
    assert all_tokens(corpus).dtype == np.int32 and (all_tokens(corpus) == 70000).sum() == len(TEXTS)
    with pytest.raises(UserError, match="ids up to 70000, but the model's vocabulary only 70000 rows"):
        prepared(data / "data.jsonl", vocab_size=70000, tokenizer=name)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", None])
def test_a_tokenizer_is_what_its_file_says(tmp_path, kind):
    """Not what a class of transformers makes of its vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["a list:\n\n1. one\n\n2. two"] * 9, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "<eos>"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(str(tmp_path))
    text = "a list:\n\n1. one\n    1"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == backend.encode(text).ids
    assert tokenizer.eos_token == "<eos>"


def test_a_tokenizers_class_may_know_what_ends_a_text(tmp_path):
    """As that of GPT-2 does."""
    tokenizer = train_bpe(["some text"], 300)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(str(tmp_path)).eos_token == "<|endoftext|>"


def test_processes_encode_in_order_and_first_what_was_read_before_a_failure(tmp_path):
    encoder = Encoder(load_tokenizer(save_tokenizer(tmp_path / "tokenizer")), add_bos=None)
    texts = [[f"{i} " * (1 + i % 7), f"more of {i}"] for i in range(20)]

    def batches():
        yield from zip(texts, range(20), strict=True)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for documents, i in encode_batches(encoder, batches()):
            assert [ids.tolist() for ids in documents] == [ids.tolist() for ids in encoder.encode(texts[i])]
            seen.append(i)
    assert seen == [*range(20)]


class Killed:
    def encode(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(UserError, match="was killed, perhaps for want of memory"):
        list(encode_batches(Killed(), iter([(["text"], 0)])))


def test_what_is_large_is_encoded_by_processes(tmp_path, monkeypatch):
    """And becomes the same ids."""
    (tmp_path / "large.txt").write_text("".join(f"{i} lines of text\n" for i in range(200_000)))
    used = []
    monkeypatch.setattr(preparation, "encode_batches", lambda *args: used.append(1) or encode_batches(*args))
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokens = all_tokens(prepared(tmp_path / "large.txt", tokenizer=tokenizer))
    assert used
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 2**22)
    (tmp_path / "copy.txt").write_text((tmp_path / "large.txt").read_text())
    assert np.array_equal(tokens, all_tokens(prepared(tmp_path / "copy.txt", tokenizer=tokenizer))) and len(used) == 1


def test_a_cache_is_of_one_column_and_one_split(tmp_path):
    """What was prepared for others is not taken."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} text", "body": f"{split} body"}] * 9
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "test"):
        for column in ("text", "body"):
            found = documents(prepared(tmp_path, split=split, text_column=column))
            assert found == with_eos([f"{split} {column}"] * 9)


def test_bos_as_the_tokenizer_does_or_as_asked(tmp_path):
    data = write(tmp_path, "jsonl") / "data.jsonl"
    for template in (True, False):
        name = save_tokenizer(tmp_path / str(template), template=template)
        for add_bos in (None, True, False):
            corpus = prepared(data, tokenizer=name, add_bos=add_bos)
            tokens, expected = all_tokens(corpus), template if add_bos is None else add_bos
            # So will prompts of the model begin, and it is the same tokenizer.
            assert adds_bos(corpus.tokenizer) == expected
            same = load_tokenizer(name)
            same.backend_tokenizer.enable_truncation(9)
            assert fingerprint(corpus.tokenizer) == fingerprint(same)
            assert (tokens == 257).sum() == (len(TEXTS) if expected else 0)
            assert (tokens == 256).sum() == len(TEXTS) and tokens[-1] == 256
            assert (tokens[0] == 257) == expected


def test_tokenizer_by_directory_and_its_end_of_sequence_token_is_part_of_the_key(tmp_path):
    """Two tokenizers that differ in nothing else, as those of base models and their chat versions."""
    data = write(tmp_path, "jsonl") / "data.jsonl"
    tokenizer = prepared(data).tokenizer
    for name, eos in (("first", "<|endoftext|>"), ("second", "a")):
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(tmp_path / name)
        corpus = prepared(data, vocab_size=5000, tokenizer=str(tmp_path / name))
        assert len(corpus.tokenizer) == 300
        assert all_tokens(corpus)[-1] == corpus.tokenizer.convert_tokens_to_ids(eos)


# The cache


def test_second_run_reads_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    first = prepared(write(tmp_path, "txt"))
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "Preparation", lambda *_: pytest.fail("prepared again"))
        second = prepared(tmp_path)
    assert np.array_equal(all_tokens(first), all_tokens(second)) and first.fingerprint == second.fingerprint
    (tmp_path / "00.txt").write_text("something longer and entirely different")
    changed = prepared(tmp_path)
    assert with_eos(["something longer and entirely different"])[0] in documents(changed)
    assert changed.fingerprint != first.fingerprint


def prepare_at_once(config, barrier, queue, locks):
    if not locks:
        corpus_module.FileLock = lambda path: (_ for _ in ()).throw(NotImplementedError)
    barrier.wait()
    trained, train_bpe = [], preparation.train_bpe
    preparation.train_bpe = lambda *args: trained.append(1) or train_bpe(*args)
    corpus = prepare_corpus(config, 300)
    queue.put((corpus.fingerprint, len(trained)))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_share_the_preparation(tmp_path, locks):
    """Where a file system knows no locks, they do the same work, and disturb nobody."""
    config = make_config(dataset=write(tmp_path, "txt"))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    args = (config, barrier, queue, locks)
    processes = [context.Process(target=prepare_at_once, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({fingerprint for fingerprint, _ in results}) == 1
    if locks:
        assert sorted(trained for _, trained in results) == [0, 0, 1]
    assert not [path for path in cache_directory().rglob(".*") if path.name != ".lock"]


def test_python_source_is_the_default():
    files = sources.list_files(make_config(), "stdlib").files
    assert len(files) > 300 and not any("/test/" in file.url or "site-packages" in file.url for file in files)


def test_a_mixture_shares_the_tokenizer_of_the_first(tmp_path):
    for name in ("a", "b", "c"):
        write_rows(tmp_path / f"{name}.jsonl", [f"{name}{name} {text}" for text in TEXTS])
    names = tuple(f"{tmp_path / name}.jsonl" for name in ("a", "b", "c"))
    config = make_config(validation_dataset=names[2:])
    config.dataset = (f"{names[0]}:0.7", f"{names[1]}:0.3")
    corpus = prepare_corpus(config, 300)
    assert [s.share for s in corpus.sources] == [0.7, 0.3]
    for prefix, part in zip("abc", (*corpus.sources, *corpus.validation), strict=True):
        assert corpus.tokenizer.decode(part.tokens[0:40]).startswith(f"{prefix}{prefix} document 0 of many")


def test_a_mixture_is_prepared_as_it_is_trained_on(tmp_path, monkeypatch):
    """By the command, with one tokenizer for all: nothing is left to do."""
    names = [write_rows(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "ab"]
    config = make_config(dataset=(f"{names[0]}:1", f"{names[1]}:2"))
    assert all(directory for *_, directory in prepare_all(config, 300))
    monkeypatch.setattr(corpus_module, "Preparation", lambda *_: pytest.fail("prepared again"))
    assert len(prepare_corpus(config, 300).sources) == 2


def test_what_is_evaluated_is_not_trained_on(tmp_path):
    names = [write_rows(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "ab"]
    for dataset in (tmp_path, names[0]):
        config = make_config(dataset=dataset, validation_dataset=(f"{tmp_path}/../{tmp_path.name}/a.jsonl",))
        with pytest.raises(UserError, match=r"both read .*/a\.jsonl: name other data to evaluate on"):
            prepare_corpus(config, 300)
    assert prepare_corpus(make_config(dataset=names[1], validation_dataset=(str(names[0]),)), 300).validation


def test_streams_read_what_is_needed_and_then_on(tmp_path, monkeypatch):
    """20 steps, then 40: the longer run finds the same tokens first."""
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)
    data, tokenizer = tmp_path / "data", save_tokenizer(tmp_path / "tokenizer")
    data.mkdir()
    for i in range(4):
        write_rows(data / f"{i}.jsonl", [f"{i} {text}" for text in TEXTS])
    read, rows = [], preparation.rows

    def counted(*args):
        for row in rows(*args):
            read.append(row.place)
            yield row

    monkeypatch.setattr(preparation, "rows", counted)

    def stream(steps, seed=0):
        return source(data, streaming=True, steps=steps, seed=seed, tokenizer=tokenizer)

    short, long = stream(20), stream(60)
    # 20 steps of 6 sequences of 8 tokens, and as many as a step takes held out.
    assert 21 * 48 < len(short.tokens) < 1500 and len(long.tokens) > 61 * 48 and len(read) < 150
    assert long.fingerprint == short.fingerprint and long.held_out == short.held_out == 48
    assert np.array_equal(long.tokens[0 : len(short.tokens)], short.tokens[0 : len(short.tokens)])
    assert stream(20, seed=1).fingerprint != short.fingerprint


def test_a_stream_is_read_for_its_share(tmp_path, monkeypatch):
    """Of a mixture, and of what is evaluated: 20 steps of 6 sequences of 8 tokens, of which 48 are held out."""
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)
    tokenizer = save_tokenizer(tmp_path / "t")
    for name in "abc":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "1.jsonl", [f"{i} {name} {text}" for i in range(30) for text in TEXTS])
    data = {"dataset": (f"{tmp_path / 'a'}:0.9", f"{tmp_path / 'b'}:0.1"), "validation_dataset": (str(tmp_path / "c"),)}
    corpus = prepared(**data, streaming=True, tokenizer=tokenizer, steps=20, eval_steps=1)
    for stream, sequences in zip((*corpus.sources, *corpus.validation), (108, 12, 6), strict=True):
        assert 0 < len(stream.tokens) - (sequences * 8 + 48) < 100


def test_what_a_stream_holds_out_is_decided_once(tmp_path, monkeypatch):
    """By its first run. Later ones read on as long as they need, and are told if it is too little."""
    tokenizer = save_tokenizer(tmp_path / "t")

    def stream(name, texts, **options):
        (tmp_path / name).mkdir(exist_ok=True)
        write_rows(tmp_path / name / "a.jsonl", texts)
        return prepared(tmp_path / name, streaming=True, tokenizer=tokenizer, **options)

    many = [f"{i} {text}" for i in range(30) for text in TEXTS]
    # Twelve sequences of 16 tokens are held out, where this one would hold out six of eight.
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)
    (tmp_path / "a").mkdir()
    first = stream("a", many, steps=1, global_batch_size=12, seq_len=16).sources[0]
    longer = prepared(tmp_path / "a", streaming=True, tokenizer=tokenizer, steps=20).sources[0]
    assert first.held_out == longer.held_out == 12 * 16
    assert len(longer.tokens) > 20 * 6 * 8 + longer.held_out
    # And a batch of longer sequences is more than that.
    config = make_config(dataset=tmp_path / "a", streaming=True, tokenizer=tokenizer, steps=1, seq_len=64)
    with pytest.raises(UserError, match="its first run has held out 192 tokens, and an evaluation takes 6 · 64"):
        split_corpus(prepare_corpus(config, 300), config)
    # Of a short one, many epochs hold out no more than one does.
    assert stream("b", TEXTS, steps=20_000).sources[0].held_out == 6 * 8


def test_the_seed_draws_the_part_that_is_streamed(tmp_path):
    for i in range(4):
        write_rows(tmp_path / f"{i}.jsonl", TEXTS)
    configs = [make_config(seed=seed, streaming=True) for seed in range(9)]
    assert len({Path(sources.list_files(config, str(tmp_path)).files[0].url).name for config in configs}) > 1
