"""The networks of the problems that are not in :mod:`dynarank.train`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynarank.train.transformer import Block, transformer_init_


class MLP(nn.Module):
    """Three hidden layers of one width, ReLU, and a classifier."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        sides = [inputs, width, width, width]
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sides)]
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images."""
        return self.head(self.body(x.flatten(1)))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of ``blocks`` residual blocks with w, 2 w and 4 w channels (He et al., 2016)."""

    def __init__(self, width: int, blocks: int, classes: int = 10, inputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        sides, stages = [width, width, 2 * width, 4 * width], []
        for stage in range(3):
            stages.append(_ResidualBlock(sides[stage], sides[stage + 1], 2 if stage else 1))
            for _ in range(blocks - 1):
                stages.append(_ResidualBlock(sides[stage + 1], sides[stage + 1], 1))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images."""
        x = self.stages(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """A vision transformer on patches of 4 x 4 pixels; the tokens' mean is classified."""

    def __init__(self, size: int, width: int, depth: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        transformer_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images."""
        tokens = self.patches(x).flatten(2).mT + self.position
        # Flash attention of 16 tokens takes longer than the rest of the network in bf16:
        # 180 ms a step instead of 60 (AMD EPYC, one core, 2026-11-29).
        with sdpa_kernel(SDPBackend.MATH):
            tokens = self.blocks(tokens)
        return self.head(self.norm(tokens).mean(1))
