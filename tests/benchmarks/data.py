"""Tokens/s of preparation, against datasets.map and Megatron-LM's way; and how long a step waits for its batch.

    python tests/benchmarks/data.py [--rounds 3] [--megabytes 20]

The same documents, tokenizer and number of processes, in alternating rounds of one run. Megatron's way: a pool of
processes, to which one line is given at a time. Then the batches of Llama 3.1 405B at 128k tokens, for one of 8
context-parallel ranks: what `next` takes right after another one, and after a step of half a second.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "step05_context_parallel"))
CACHE = tempfile.TemporaryDirectory(prefix="parallel-steps-benchmark-")
os.environ |= {"XDG_CACHE_HOME": CACHE.name, "HF_HOME": f"{CACHE.name}/hf", "HF_HUB_OFFLINE": "1"}

import datasets
import numpy as np
from context_parallel import SplitBatches, local_positions
from train import Config

from shared.config import BaseConfig
from shared.corpus import Tokens, prepare_corpus
from shared.corpus.tokenizers import load_tokenizer
from shared.data import Mixture, Sequences

CORES = len(os.sched_getaffinity(0))
datasets.disable_progress_bars()


def documents(megabytes: int, path: Path) -> None:
    """Python's standard library as JSON lines, once more until there is enough."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    size = 0
    with path.open("w") as file:
        for source in itertools.cycle(files):
            size += file.write(json.dumps({"text": source.read_text(errors="replace")}) + "\n")
            if size >= megabytes * 10**6:
                break


def ours(path: Path, tokenizer: str) -> int:
    shutil.rmtree(Path(CACHE.name) / "parallel-steps", ignore_errors=True)
    corpus = prepare_corpus(BaseConfig(dataset=(str(path),), tokenizer=tokenizer), 2**20)
    return len(corpus.sources[0].tokens)


def datasets_map(path: Path, tokenizer: str) -> int:
    loaded, encoder = load_tokenizer(tokenizer), {"add_special_tokens": False}
    data = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=tempfile.mkdtemp(dir=CACHE.name)
    )

    def tokenize(batch: dict) -> dict:
        return {"ids": [[*ids, loaded.eos_token_id] for ids in loaded(batch["text"], **encoder)["input_ids"]]}

    data = data.map(
        tokenize, batched=True, num_proc=CORES, remove_columns=data.column_names, load_from_cache_file=False
    )
    count = 0
    with open(f"{CACHE.name}/map.bin", "wb") as file:
        for batch in data.iter(batch_size=100):
            tokens = np.concatenate(batch["ids"]).astype(np.uint16)
            tokens.tofile(file)
            count += len(tokens)
    return count


def start_worker(tokenizer: str) -> None:
    global worker_tokenizer
    worker_tokenizer = load_tokenizer(tokenizer)


def encode_line(line: str) -> list[int]:
    ids = worker_tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*ids, worker_tokenizer.eos_token_id]


def megatrons_way(path: Path, tokenizer: str) -> int:
    count = 0
    context = multiprocessing.get_context("fork")
    with (
        context.Pool(CORES, start_worker, (tokenizer,)) as pool,
        path.open() as lines,
        open(f"{CACHE.name}/pool.bin", "wb") as file,
    ):
        for ids in pool.imap(encode_line, lines, 32):
            np.array(ids, np.uint16).tofile(file)
            count += len(ids)
    return count


def preparation(rounds: int, megabytes: int) -> None:
    path = Path(CACHE.name) / "documents.jsonl"
    documents(megabytes, path)
    tokenizer = f"{CACHE.name}/tokenizer"
    prepare_corpus(BaseConfig(), 4096).tokenizer.save_pretrained(tokenizer)
    variants, seconds = (ours, datasets_map, megatrons_way), {}
    # Once before: files, imports.
    for variant in variants * (rounds + 1):
        start = time.perf_counter()
        tokens = variant(path, tokenizer)
        seconds.setdefault(variant, []).append(time.perf_counter() - start)
    print(f"preparation of {megabytes} MB on {CORES} cores, {tokens:,} tokens\n{'':16}{'tokens/s':>10}{'ours ×':>9}")
    for variant, times in seconds.items():
        ratio = median(b / a for a, b in zip(seconds[ours][1:], times[1:], strict=True))
        print(f"{variant.__name__:16}{tokens / median(times[1:]):10,.0f}{ratio:9.2f}")


def waiting() -> None:
    """A sequence of 128k tokens per step and data-parallel rank, as configs/llama-3.1-405b-*.yaml has it."""

    config = Config(seq_len=131072, global_batch_size=4, micro_batch_size=1, cp=8, device="cpu")
    path = Path(CACHE.name) / "tokens.bin"
    np.random.default_rng(0).integers(0, 128256, 64 * 131072 + 1, np.int32).tofile(path)
    tokens = Tokens.from_array(np.memmap(path, np.int32, mode="r"))
    mixture = Mixture([Sequences(tokens, config.seq_len)], [1.0])
    batches = SplitBatches(mixture, config, 0, 1, local_positions(config, 3))
    for pause in (0.0, 0.5):
        waited = []
        for _ in range(8):
            time.sleep(pause)
            start = time.perf_counter()
            batches.next()
            waited.append(time.perf_counter() - start)
        print(f"405B, 4 sequences of 128k, cp 8: next() waits {1e3 * median(waited):.2f} ms after {pause} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=20)
    args = parser.parse_args()
    waiting()
    preparation(args.rounds, args.megabytes)
