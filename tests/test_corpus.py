"""From files to tokens: nothing is lost, added or mistaken on the way, and what cannot be right is refused."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from corpora import TEXTS, all_tokens, documents, prepared, with_eos, write, write_rows
from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerFast

from shared.config import UserError
from shared.corpus import readers
from shared.corpus import tokenizers as corpus_tokenizers
from shared.corpus.tokenizers import Encoder

# Kinds of files


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file(tmp_path, kind):
    corpus = prepared(write(tmp_path, kind))
    assert all_tokens(corpus).dtype == np.uint16
    assert sorted(documents(corpus)) == sorted(with_eos(TEXTS))


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("XZ", lzma.compress), ("zst", zstd)]
)
def test_compressed_files(tmp_path, suffix, compress):
    text = write_rows(tmp_path / "a", TEXTS).read_bytes()
    (tmp_path / "a").unlink()
    path = tmp_path / f"a.jsonl.{suffix}"
    # In two pieces, as parallel compressors write.
    path.write_bytes(compress(text[:99]) + compress(text[99:]))
    for dataset in (tmp_path, path):
        assert documents(prepared(dataset)) == with_eos(TEXTS)
    # A line of a text may end anywhere: only the compression tells that there was more.
    (tmp_path / f"cut.txt.{suffix}").write_bytes(compress(text)[:-20])
    with pytest.raises(UserError, match=r"cut\.txt"):
        prepared(tmp_path / f"cut.txt.{suffix}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "found no such file"),
        ({"a.exe": "x"}, "found no such file"),
        ({"a.txt": ""}, "holds no documents"),
        ({"a.jsonl": ""}, "holds no documents"),
        ({"a.txt": "x", "b.jsonl": '{"text": "x"}'}, r"must hold one kind .* found \.jsonl, \.txt"),
        ({"a.jsonl": '{"text": "x"}\n{"text": x'}, r"a\.jsonl, line 2: no JSON"),
        ({"a.jsonl": '{"text": "x"}\n[1]'}, "line 2 must be an object with a 'text', but is "),
        ({"a.jsonl": '{"text": 5}'}, r"must hold text, but holds 5 in .*a\.jsonl, line 1"),
        ({"a.jsonl": '{"body": "x", "id": 1}'}, r"a\.jsonl has no column 'text': choose --text-column from body, id"),
        ({"a.jsonl": '{"id": 1}\n' * 100 + '{"text": "x"}'}, r"a\.jsonl has no column 'text': choose .* from id"),
        ({"a.csv": 'text\n"x'}, r"a\.csv: unexpected end of data"),
        ({"a.csv": "text\nx\nDear sir, I write"}, r"a\.csv, record 2 has more fields than the header: quote"),
        ({"a.parquet": "x"}, r"a\.parquet"),
        ({"a.jsonl.gz": "x"}, r"a\.jsonl\.gz"),
        (
            {"a.jsonl": '{"text": null}\n{"text": ""}'},
            "holds no documents: of 2 rows 1 have no text in --text-column text, 1 an empty",
        ),
    ],
)
def test_unusable_files(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    # The second time as well: nothing that cannot be used is kept.
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            prepared(tmp_path)


def test_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file or directory, and no Hugging Face dataset within reach"):
        prepared("no/such-dataset")
    with pytest.raises(UserError, match=r"--tokenizer no/such-tokenizer: no such directory, and no id"):
        prepared(write(tmp_path, "txt"), tokenizer="no/such-tokenizer")
    with pytest.raises(UserError, match="at least 257"):
        prepared(tmp_path / "00.txt", vocab_size=100)
    with pytest.raises(UserError, match=r"read are only \.txt"):
        (tmp_path / "a.exe").touch()
        prepared(tmp_path / "a.exe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match=r"the cache .* cannot write to /proc"):
        prepared(tmp_path)


def test_only_a_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="pip install sentencepiece"):
        prepared(write(tmp_path, "jsonl"), tokenizer=str(tmp_path))


# Text is data


@pytest.mark.quick
def test_text_that_spells_a_special_token_is_text(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["a <|endoftext|> b", "<|endoftext|>"])
    corpus = prepared(tmp_path)
    assert (all_tokens(corpus) == corpus.tokenizer.eos_token_id).sum() == 2
    assert documents(corpus) == with_eos(["a <|endoftext|> b", "<|endoftext|>"])
    assert corpus.sources[0].tokens.begins(0, 10**6).size == 2


def test_every_character_of_a_text_file_is_kept(tmp_path, monkeypatch):
    """Also when it is cut into several documents, and long ones into pieces."""
    monkeypatch.setattr(readers, "DOCUMENT_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_tokenizers, "PIECE_CHARACTERS", 50)
    text = "\n\n".join(TEXTS) + "\r\nend" + "".join(TEXTS).replace(" ", "")
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = prepared(tmp_path / "a.txt")
    assert corpus.tokenizer.decode(all_tokens(corpus)).replace("<|endoftext|>", "") == text
    assert len(documents(corpus)) == 3


def test_no_blank_is_put_where_a_long_document_is_cut(monkeypatch):
    """By a tokenizer that puts one before what it is given, as Llama 2's."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}, "▁": 258, "a": 259}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blank)
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), add_bos=None)
    monkeypatch.setattr(corpus_tokenizers, "PIECE_CHARACTERS", 10)
    for text in ("a a " * 20, "文字" * 20):
        (ids,) = encoder.encode([text])
        assert backend.decode(ids[:-1].tolist()) == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    assert documents(prepared(tmp_path / "a.txt")) == with_eos(["one"])
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two\\r\\n"}\r\n'.encode())
    assert documents(prepared(tmp_path / "b.jsonl")) == with_eos(["two\r\n"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_invalid_text_is_refused_with_its_place_or_replaced(tmp_path, capsys, name):
    if name == "a.jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in ["fine"] * 1999 + ["bad \ud800 one"]).encode()
        place, replaced = "line 2000", "bad ? one"
    elif name == "a.txt":
        content, place, replaced = b"caf\xe9", "line 1", "caf?"
    else:
        content, place, replaced = b"text\nfine\ncaf\xe9\n", "record 2", "caf?"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, .*{place}: no valid Unicode .*--invalid-text replace"):
        prepared(tmp_path)
    corpus = prepared(tmp_path, invalid_text="replace")
    assert documents(corpus)[-1] == replaced + "<|endoftext|>"
    assert "1 rows with characters replaced" in capsys.readouterr().out


def test_rows_without_text_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"id": 0}, {"text": "one"}, {"text": None}, {"text": "two"}, {"id": 1}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert documents(prepared(tmp_path)) == with_eos(["one", "two"])
    assert "2 documents, 3 rows without text, 1 empty rows" in capsys.readouterr().out


def test_forms_of_one_kind(tmp_path):
    """Arrow's file format beside its streams, and a list after an empty line."""
    table = pyarrow.table({"text": TEXTS})
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table, max_chunksize=7)
        assert documents(prepared(tmp_path / f"{name}.arrow")) == with_eos(TEXTS)
    (tmp_path / "a.json").write_text("\n" + json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert documents(prepared(tmp_path / "a.json")) == with_eos(TEXTS)


def test_a_nested_column(tmp_path):
    rows = [{"meta": None}] + [{"meta": {"text": text}} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert documents(prepared(tmp_path / name, text_column="meta.text")) == with_eos(TEXTS)


def test_text_without_blanks_takes_seconds(tmp_path):
    """Its words have a maximal length. Without one, a megabyte of this takes more minutes than the suite has."""
    letters = np.random.default_rng(0).choice(list("ACGT"), 2**20)
    (tmp_path / "a.txt").write_text("".join(letters))
    corpus = prepared(tmp_path / "a.txt", vocab_size=1000)
    longest = max(len(token) for token in corpus.tokenizer.get_vocab() if token != "<|endoftext|>")
    assert longest <= corpus_tokenizers.WORD_BYTES
