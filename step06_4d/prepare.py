"""Tokenize the dataset of a run, with the options of train.py, on a machine without GPUs: no job waits for it then."""

from train import Config

from shared.config import run
from shared.corpus import prepare_corpus
from shared.llama_configs import load_model_config


def prepare(config: Config) -> None:
    tokens = prepare_corpus(config, load_model_config(config).vocab_size).tokens
    print(f"{len(tokens):,} tokens in {tokens.filename}")


if __name__ == "__main__":
    run(prepare, Config)
