"""``nn.Conv2d`` in the three forms: any stride, padding, dilation and padding mode; groups = 1."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.decompositions import Geometry
from dynarank.layers.ranked import RankedLayer

__all__ = ["RankedConv2d"]


class RankedConv2d(RankedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A two-dimensional convolution in one of the three forms."""

    plain = nn.Conv2d

    @property
    def geometry(self) -> Geometry:
        """The convolution's own."""
        return Geometry(self.stride, self.padding, self.dilation)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, height, width)."""
        return self.out_channels, self.in_channels, *self.kernel_size

    def pad(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Pad by the layer's mode, unless the convolution itself pads, with zeros."""
        if self.padding_mode == "zeros":
            return x, self.geometry
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return padded, Geometry(self.stride, (0,) * len(self.stride), self.dilation)
