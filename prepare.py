"""Prepare a corpus: `python prepare.py --dataset my_texts --output my_corpus`, then train with `--dataset my_corpus`.

It needs no GPU. On several machines that share a disk, each does a part: `--shard 0/4`, `--shard 1/4`, and so on.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shared.command import run
from shared.config import BaseConfig, UserError
from shared.corpus import open_others, prepare_all
from shared.corpus.corpus import MANIFEST, open_source, read_manifest, verify_shard
from shared.llama_configs import load_model_config


# The field of --shard has another name: the file of a training run may have a `shard`, that of --zero.
@dataclass
class Config(BaseConfig):
    """Prepare a corpus with the options of a run: its data, tokenizer and model. All others are left unread."""

    # Directory for the corpus. The default is where train.py looks for it: the cache.
    output: Path | None = None
    # Prepare only part I of N, as I/N with I from 0. The last one to end completes the corpus.
    part: Annotated[str, tyro.conf.arg(name="shard")] = "0/1"
    # Read the prepared corpus once more, and compare all checksums.
    verify: bool = False

    def left_unfinished(self) -> str:
        return "the same command goes on after the last part that is done"

    def validate(self) -> None:
        # What a run writes may be there.
        self.metrics_file = self.tensorboard = self.export_dir = None
        super().validate()
        numbers = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not numbers or not int(numbers[1]) < int(numbers[2]):
            raise UserError(f"--shard {self.part} must be I/N with I from 0 to N - 1, as in 0/4")
        if self.output and len(self.dataset) + len(self.validation_dataset) > 1:
            raise UserError("--output holds one dataset: prepare those of a mixture one by one")
        if self.streaming and self.part != "0/1":
            raise UserError("--streaming reads from the beginning on: it has no parts")


def main(config: Config) -> None:
    vocab_size = load_model_config(config).vocab_size
    part, parts = map(int, config.part.split("/"))
    for _, dataset, share, directory in prepare_all(config, vocab_size, config.output, part, parts):
        if not directory:
            print(f"{len(open_others(dataset, share, vocab_size).tokens):,} tokens in {dataset}, made by others")
            continue
        if parts > 1 and not (directory / MANIFEST).exists():
            print(f"{config.part} is done, others are not yet, in {directory}")
            continue
        if config.verify:
            for shard in read_manifest(directory)["shards"]:
                verify_shard(directory, shard)
        print(f"{len(open_source(directory, dataset, share).tokens):,} tokens in {directory}")


if __name__ == "__main__":
    # A run's file names options of train.py, too.
    run(main, Config, known_only=True)
