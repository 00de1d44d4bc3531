"""How large everything is: for a GPU, and as small as it can be to try the code."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "TOY", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts.

    Args:
        widths: of the GPTs that are timed, the first one also compiled.
        depth: of these.
        context: of these.
        batch: sequences in a step of these.
        head: the width of an attention head.
        multiple: ranks are multiples of it, where they are not those of the default.
        repeats: timed steps of a block, of which there are ``rounds``.
        rounds: how often the candidates take turns.
        width: of the GPTs that are trained for equal times.
        layers: the depth of these.
        window: the context of these.
        windows: sequences in a step of these.
        longest: seconds of their training, at most.
        patience: seconds of a cut, at most, relative to those of a training.
        held_out: batches of held-out text.
        points: times at which the loss is measured.
        text: bytes of text at most.
        products: widths of the products.
        tokens: rows of the products.
        channels: channels and pixels of the convolutions, as in WRN-28-10.
        images: images in a batch of the convolutions and of ResNet-20.
        many: images in a large batch of ResNet-20.
        matrix: rows of the matrices that are decomposed.
        epoch: images in an epoch.
        backend: of ``torch.compile``.
    """

    widths: tuple[int, ...] = (1024, 1536, 2048)
    depth: int = 12
    context: int = 1024
    batch: int = 16
    head: int = 64
    multiple: int = 64
    repeats: int = 2
    rounds: int = 5
    width: int = 1024
    layers: int = 4
    window: int = 512
    windows: int = 32
    longest: float = 90.0
    patience: float = 1.0
    held_out: int = 8
    points: int = 8
    text: int = 64_000_000
    products: tuple[int, ...] = (512, 1024, 2048, 4096)
    tokens: tuple[int, ...] = (8192, 16384, 32768)
    channels: tuple[tuple[int, int], ...] = ((160, 32), (320, 16), (640, 8))
    images: int = 128
    many: int = 1024
    matrix: int = 1024
    epoch: int = 50_000
    backend: str = "inductor"


FULL = Sizes()
TOY = Sizes(
    widths=(64,), depth=1, context=16, batch=2, head=16, multiple=4, repeats=1, rounds=2,
    width=64, layers=1, window=16, windows=4, longest=0.5, patience=100.0, held_out=1, points=3,
    text=60_000,
    products=(32,), tokens=(64,), channels=((16, 8),), images=2, many=4, matrix=16,
    epoch=4, backend="eager",
)  # fmt: skip
