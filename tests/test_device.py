"""What is decided by the GPU that a process has, here by one that torch is made to believe in."""

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from test_kernels_of_gpus import on_gpu

from shared import distributed
from shared.config import BaseConfig, UserError, parse
from shared.flops import data_sheet_flops
from shared.ops import rms_norm


@pytest.fixture
def gpus(monkeypatch):
    """Call it with what the machine has. Returns the devices that are set."""

    def make(count, bfloat16=True):
        devices = []
        found = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "set_device": devices.append,
            "current_device": lambda: devices[-1],
            "is_bf16_supported": lambda including_emulation: bfloat16,
            "get_device_name": lambda: "Tesla V100",
            "get_device_capability": lambda: (9, 0),
        }
        for name, function in found.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return devices

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_float32_matmul_precision()
    yield make
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("count", "local_rank", "torchrun", "device"),
    [
        (8, 3, True, 3),
        (8, 3, False, 3),
        # Slurm's binding: the third process of the machine, which sees its own GPU.
        (1, 3, False, 0),
        (1, 0, True, 0),
    ],
)
def test_which_gpu_a_process_takes(gpus, monkeypatch, count, local_rank, torchrun, device):
    devices = gpus(count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert distributed.pick_device(parse(BaseConfig, [])) == torch.device("cuda", device) and devices == [device]
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_more_processes_than_gpus(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="process 2 of this machine finds only 1 GPUs: lower --nproc-per-node"):
        distributed.pick_device(parse(BaseConfig, []))


@pytest.mark.parametrize(
    ("count", "bfloat16", "options", "dtype"),
    [
        (1, True, "", "bfloat16"),
        (1, False, "", "float32"),
        (1, True, "--device cpu", "float32"),
        (1, True, "--dtype float32", "float32"),
        (0, False, "", "float32"),
        # A login node plans for the GPUs of others.
        (0, False, "--device cuda", "bfloat16"),
    ],
)
def test_bfloat16_is_the_default_where_a_gpu_multiplies_in_it(gpus, count, bfloat16, options, dtype):
    gpus(count, bfloat16)
    assert parse(BaseConfig, options.split()).dtype == dtype


def test_bfloat16_is_refused_before_anything_starts_where_a_gpu_has_none(gpus):
    gpus(1, bfloat16=False)
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16: leave --dtype bfloat16 out"):
        distributed.pick_device(parse(BaseConfig, ["--dtype", "bfloat16"]))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("installed", [True, False])
def test_flash_attention_3_is_for_hopper_and_where_it_is_installed(gpus, monkeypatch, capability, installed):
    gpus(1)
    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(distributed, "find_spec", lambda name: name == "flash_attn_interface" and installed)
    monkeypatch.setattr(distributed, "activate_flash_attention_impl", activated.append)
    distributed.pick_device(parse(BaseConfig, []))
    assert activated == (["FA3"] if installed and capability == (9, 0) else [])


def test_deterministic_before_anything_is_computed(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Ring"})
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        distributed.pick_device(parse(BaseConfig, ["--deterministic"]))
        assert torch.are_deterministic_algorithms_enabled()
        # What is set is kept.
        assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA H800", 989),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307),
        # A part of a GPU, and one of which no data sheet is known.
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID A100-20C", None),
        ("NVIDIA H300", None),
    ],
)
def test_peak_by_name(name, tflops):
    assert data_sheet_flops(name) == (tflops and tflops * 1e12)


def test_what_is_hidden_behind_a_matmul_has_a_stream_of_high_priority(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=MagicMock()), raising=False)
    for axis in distributed.AXES:
        distributed._group_options(axis, torch.device("cuda"), None)
    asked = [call.kwargs["is_high_priority_stream"] for call in dist.ProcessGroupNCCL.Options.call_args_list]
    assert dict(zip(distributed.AXES, asked, strict=True)) == {"pp": False, "dp": False, "cp": True, "tp": True}


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_a_norm_on_a_gpu_is_one_kernel_that_is_handed_no_copy_in_float32(monkeypatch, trained):
    """Autocast, which is off for the kernel alone, would make one, and so does torch for a weight of another dtype."""
    given = []

    def kernel(x, shape, weight, eps):
        given.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return real(x, shape, weight, eps)

    real = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", kernel)
    x, weight = torch.randn(2, 8, 16, dtype=torch.bfloat16), torch.randn(16, dtype=trained)
    with torch.autocast("cpu", torch.bfloat16):
        ours = on_gpu(rms_norm)(x, weight, 1e-5)
        assert torch.is_autocast_enabled("cpu")
        torch.testing.assert_close(ours, rms_norm(x, weight, 1e-5))
    assert given == [(torch.bfloat16, torch.bfloat16, False)]


def _sockets():
    files = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum("socket" in os.readlink(file) for file in files if os.path.islink(file))


def _connections():
    """How many a group of gloo next to others has before it is used. And it works."""
    # Another test may have made such a group in the process that this one was forked from.
    os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
    dist.init_process_group("gloo")
    everyone = list(range(dist.get_world_size()))
    # Until all have theirs.
    dist.barrier()
    before = _sockets()
    group = distributed.make_group([everyone], "checkpoint", 60, "gloo")
    made, told = _sockets() - before, [None] * len(everyone)
    dist.all_gather_object(told, dist.get_rank(), group=group)
    assert told == everyone
    return made


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts the files of a process as Linux shows them")
def test_a_group_of_gloo_next_to_nccl_has_no_connection_from_each_rank_to_each():
    """Of 8 ranks, 7. At 1,000 ranks it would be a million in all."""
    assert max(run_ranks(8, _connections)) <= 2
