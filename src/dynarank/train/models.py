"""The networks of the image recipes.

In convolutional networks, the glob ``*conv*`` selects exactly the layers worth factorizing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from dynarank.train.init import glorot_init_
from dynarank.train.wide_resnet import WideResNet

_Norm: TypeAlias = Callable[[int], nn.Module]

__all__ = ["MODELS", "DigitsNet", "MultilayerPerceptron", "ResNet8", "ResNet20"]


class DigitsNet(nn.Module):
    """A small convolutional network for 1 x 8 x 8 digits: 32, 64, 128 and 128 channels.

    The stem is not called ``conv``: a kernel of 32 x 9 does not benefit from low rank.

    Args:
        classes: the number of outputs.

    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv3x3(1, 32)
        self.bn0 = nn.BatchNorm2d(32)
        self.conv1 = _conv3x3(32, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = _conv3x3(64, 128, stride=2)
        self.bn2 = nn.BatchNorm2d(128)
        self.conv3 = _conv3x3(128, 128)
        self.bn3 = nn.BatchNorm2d(128)
        self.head = nn.Linear(128, classes)
        glorot_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(N, classes)`` of images ``(N, 1, 8, 8)``."""
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


class MultilayerPerceptron(nn.Module):
    """An MLP on flattened images; the glob ``hidden*`` selects its hidden layers.

    Args:
        classes: the number of outputs.
        inputs: the number of pixels times channels of an image.
        width: the number of units of each hidden layer.
        depth: the number of hidden layers.
        dropout: the dropout probability after each hidden layer.

    """

    def __init__(
        self,
        classes: int = 10,
        inputs: int = 784,
        width: int = 1024,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(sizes[i], width) for i in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-1], classes)
        glorot_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


class ResNet8(nn.Module):
    """Three stages of one residual block each, 32, 64 and 128 channels, for small images.

    The stem is not called ``conv``: with one or three channels it does not benefit from low rank.

    Args:
        classes: the number of outputs.
        channels: the number of channels of the images.

    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.stem = _conv3x3(channels, 32)
        self.bn = nn.BatchNorm2d(32)
        widths = [(32, 32, 1), (32, 64, 2), (64, 128, 2)]
        self.stages = nn.Sequential(
            *(_stage(i, o, stride, blocks=1, norm=nn.BatchNorm2d) for i, o, stride in widths)
        )
        self.head = nn.Linear(128, classes)
        glorot_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        x = self.stages(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ResNet20(nn.Module):
    """ResNet-20 for 3 x 32 x 32 images as in the method's published code: 272,762 parameters.

    Post-activation blocks (He et al., Deep Residual Learning, arXiv 1512.03385), three stages of
    three blocks with 16, 32 and 64 channels. Unlike the original, the first block of EVERY stage
    has a 1x1 convolution and BatchNorm as its shortcut, even if the shape does not change (16 to
    16), and the second BatchNorm of each block starts at zero, so that every block starts as its
    shortcut.

    Args:
        classes: the number of outputs.

    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = _conv3x3(3, 16)
        self.bn = _keras_batch_norm(16)
        self.stages = nn.Sequential(_stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2))
        for block in (module for module in self.modules() if isinstance(module, _Block)):
            nn.init.zeros_(cast(torch.Tensor, block.bn2.weight))
        self.head = nn.Linear(64, classes)
        glorot_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: nn.Module, norm: _Norm
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride=stride)
        self.bn1 = norm(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = norm(outputs)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _keras_batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # Keras calls this momentum 0.99


def _stage(
    inputs: int, outputs: int, stride: int, blocks: int = 3, norm: _Norm = _keras_batch_norm
) -> nn.Sequential:
    projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    shortcut = nn.Sequential(projection, norm(outputs))
    rest = [_Block(outputs, outputs, 1, nn.Identity(), norm) for _ in range(blocks - 1)]
    return nn.Sequential(_Block(inputs, outputs, stride, shortcut, norm), *rest)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-net": DigitsNet,
    "mlp": MultilayerPerceptron,
    "resnet8": ResNet8,
    "resnet20": ResNet20,
    "wrn-16-4": partial(WideResNet, 16, 4),
    "wrn-28-10": partial(WideResNet, 28, 10),
}
