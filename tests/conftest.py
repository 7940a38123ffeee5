"""What all tests share: no network, a cache of their own, one thread, and the trainers as modules."""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

# Before the libraries are imported, which is when they read it. The corpus is tokenized once per session.
if multiprocessing.parent_process() is None:
    CACHE = tempfile.TemporaryDirectory(prefix="parallel-steps-tests-")
    os.environ |= {
        "XDG_CACHE_HOME": CACHE.name,
        "HF_HOME": f"{CACHE.name}/huggingface",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        # Servers of tests are no proxy's business.
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    # Ranks are forked, which a process that could use a GPU must not be: only tests/gpu and benchmarks/gpu.py see one.
    here = Path(__file__).parent
    paths = [Path(arg.partition("::")[0]).resolve() for arg in sys.argv]
    with_gpu = any(path.is_relative_to(here / "gpu") or path == here / "benchmarks" / "gpu.py" for path in paths)
    if "PYTEST_XDIST_WORKER" not in os.environ and not with_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig

from shared import metrics
from shared.config import BaseConfig, parse
from shared.corpus import Corpus, prepare_corpus
from shared.llama_configs import load_model_config
from shared.weights import full_weights

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
# The first backward starts a thread per GPU, after which nothing may fork. FakeTensorMode makes it find one that is not
# there, so this comes before.
torch.ones(1, requires_grad=True).sum().backward()
# A thread of this policy, when woken, pushes no other from its core. gloo's would, and would then spin for a lock that
# the other holds: small messages take three times as long.
if hasattr(os, "SCHED_BATCH"):
    # Some containers forbid it.
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
# What tyro loads at its first use, forked ranks find loaded.
parse(BaseConfig, [])
# Measuring it takes a second of each run: here once, for forked ranks as well.
metrics.peak_flops = cache(metrics.peak_flops)
if multiprocessing.parent_process() is None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        metrics.peak_flops(torch.device("cpu"), dtype)
# No example has to be found within a time.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


# Files that wait most, or take longest.
FIRST = ("test_slurm", "test_torchrun", "test_docs")
FIRST += ("test_step06_dry_run", "test_step06_planner_memory", "test_step06_missing_rank")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These before all others, so that workers end together."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


# Those that train: step00 has no train.py.
STEPS = sorted(path.parent.name for path in ROOT.glob("step*/train.py"))
SIBLINGS = {path.stem for path in ROOT.glob("step*/*")}
# What forked ranks find loaded already: a step, and its train.py.
handed_down: dict[str, ModuleType] = {}
# The modules of each step that was handed down.
_loaded: dict[str, dict[str, ModuleType]] = {}
_custom_op = torch.library.custom_op


def _define(*args: object, **options: object) -> object:
    """Torch has one operator of a name. Modules that were loaded before would call the one that is defined now."""
    _loaded.clear()
    return _custom_op(*args, **options)


torch.library.custom_op = _define


def hand_down(step: str) -> None:
    """Load a step for ranks that are forked next: once, for only they change what is loaded here."""
    if step in _loaded:
        _forget()
        sys.modules.update(_loaded[step])
    else:
        load_step(step)
        _loaded[step] = {name: module for name, module in sys.modules.items() if _is_of_a_step(name)}
    handed_down[step] = sys.modules["train"]


def _is_of_a_step(name: str) -> bool:
    # A room's modules as well: survive, survive.heartbeat.
    return name.partition(".")[0] in SIBLINGS


def _forget() -> None:
    """Steps have files of the same names: another step's must not be taken for this one's."""
    for name in filter(_is_of_a_step, list(sys.modules)):
        del sys.modules[name]


def load_step(step: str) -> ModuleType:
    """The train.py of a step, with its siblings importable by plain name, as when it is run as a script."""
    if step in handed_down and handed_down[step] is sys.modules.get("train"):
        return handed_down.pop(step)
    _forget()
    sys.path.insert(0, str(ROOT / step))
    try:
        spec = importlib.util.spec_from_file_location("train", ROOT / step / "train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["train"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / step))


def make_trainer(module: ModuleType, args: list, tokens: np.ndarray | None = None):
    """The Trainer of a step with these options, on its corpus or on other tokens."""
    config = parse(module.Config, [str(arg) for arg in args])
    model_config = load_model_config(config)
    corpus = prepare_corpus(config, model_config.vocab_size) if tokens is None else Corpus.from_array(tokens)
    return module.Trainer(config, model_config, corpus, full_weights(config, model_config))


def tiny_config(**overrides) -> LlamaConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**values | overrides)


def write_text(directory: Path) -> Path:
    """A small corpus: 400 lines that a model can learn."""
    path = directory / "corpus.txt"
    path.write_text("".join(f"{i} plus {i % 7} makes {i + i % 7}, and that is all.\n" for i in range(400)))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


def small_options(text_file: Path) -> list[str]:
    """Arguments of a run that takes a second."""
    sizes = {
        "dataset": text_file,
        "num-hidden-layers": 2,
        "hidden-size": 32,
        "intermediate-size": 48,
        "num-attention-heads": 4,
        "num-key-value-heads": 2,
        "vocab-size": 300,
        "seq-len": 16,
        "global-batch-size": 8,
        "micro-batch-size": 4,
        "steps": 4,
        "warmup-steps": 1,
        "device": "cpu",
    }
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def small_run(text_file) -> list[str]:
    return small_options(text_file)


@pytest.fixture(scope="session")
def compiler() -> None:
    """What torch loads when it compiles: forked ranks, each of which would take 3 s, find it loaded."""
    torch.compile(lambda x: (x.sin() @ x).sum(), backend="aot_eager")(torch.ones(2, 2, requires_grad=True)).backward()
    torch._dynamo.reset()
