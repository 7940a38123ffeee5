"""Optimizer and learning-rate schedule."""

import math

import torch
from torch import nn

from shared.config import BaseConfig


def make_optimizer(config: BaseConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD. Matrices are decayed, norms are not."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    # Fused: one pass over parameters, gradients and moments, with no temporaries, on CUDA and on CPUs.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: BaseConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # 0 at the end of warm-up, 1 at the last step.
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "wsd": min(1.0, (1 - progress) / 0.2),
    }[config.schedule]
    return config.final_lr + (config.lr - config.final_lr) * remaining


def set_learning_rate(config: BaseConfig, optimizer: torch.optim.Optimizer, step: int) -> float:
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
