"""Wide residual networks as in the method's published code.

As in Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146), but post-activation:
each block is relu(bn2(conv2(dropout(relu(bn1(conv1 x))))) + shortcut x). The depth is 6 n + 4 with
n blocks in each of three stages; the width multiplies the stages' 16, 32 and 64 channels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from dynarank.train.init import glorot_init_

__all__ = ["WideResNet"]


class WideResNet(nn.Module):
    """WRN-depth-width for 3 x 32 x 32 images; WRN-28-10 has 36,539,124 parameters for 100 classes.

    The glob ``*conv*`` selects the convolutions that the published code factorizes, 24 of the 25
    3x3 convolutions of WRN-28-10. The other one, from the stem to the channels of the first stage,
    is called ``widen``: at half its output channels its factors would be larger than the kernel.

    Args:
        depth: the number of layers in the main path, 6 n + 4: 16, 22, 28, 40.
        width: the multiplier of the channels of a plain residual network.
        classes: the number of outputs.
        dropout: the dropout probability between the two convolutions of a block.

    Raises:
        ValueError: the depth is not 6 n + 4.

    Example:
        >>> from dynarank.train.wide_resnet import WideResNet
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in WideResNet(28, 10, classes=100).parameters())
        36539124
    """

    def __init__(
        self, depth: int = 28, width: int = 10, classes: int = 10, dropout: float = 0.3
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(
                f"a wide residual network has 6 n + 4 layers (10, 16, 22, 28, ...), got {depth}"
            )
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv = _conv(3, 16, 3)
        self.bn = _batch_norm(16)
        self.stages = nn.Sequential(
            *(
                _stage(channels[i], channels[i + 1], depth // 6, dropout, strided=i > 0)
                for i in range(3)
            )
        )
        self.head = nn.Linear(channels[-1], classes)
        glorot_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class _WideBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; ``entry`` names the first of them."""

    def __init__(
        self, inputs: int, outputs: int, dropout: float, stride: int = 1, entry: str = "conv1"
    ) -> None:
        super().__init__()
        self.entry = entry
        self.add_module(entry, _conv(inputs, outputs, 3, stride))
        self.bn1 = _batch_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = _batch_norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), _batch_norm(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = cast(nn.Module, getattr(self, self.entry))
        y = self.dropout(F.relu(self.bn1(first(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _stage(inputs: int, outputs: int, blocks: int, dropout: float, strided: bool) -> nn.Sequential:
    if strided:
        first = _WideBlock(inputs, outputs, dropout, stride=2)
    else:
        first = _WideBlock(inputs, outputs, dropout, entry="widen")
    return nn.Sequential(first, *(_WideBlock(outputs, outputs, dropout) for _ in range(blocks - 1)))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.01)  # Keras calls this momentum 0.99
