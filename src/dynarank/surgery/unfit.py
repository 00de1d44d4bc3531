"""Which layers are unfit for a change: all of them are found before the change is refused."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from dynarank.decompositions import LinAlgError, UnfitWeightError

__all__ = ["UnfitLayers"]


class UnfitLayers:
    """Collects the layers whose weights or optimizer states are not finite or not decomposable.

    Example:
        >>> unfit = UnfitLayers()
        >>> with unfit.layer("fc1"):
        ...     raise UnfitWeightError("it holds NaN")
        >>> unfit.reasons
        {'fc1': "layer 'fc1': it holds NaN"}
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def layer(self, path: str) -> Generator[None]:
        """A context in which the layer at this path is worked on."""
        try:
            yield
        except (UnfitWeightError, LinAlgError) as error:
            named = repr(path) in str(error)
            self.reasons[path] = str(error) if named else f"layer {path!r}: {error}"

    def check(self) -> None:
        """Raise UnfitWeightError, which names them all, if there are any."""
        if self.reasons:
            raise UnfitWeightError("; ".join(self.reasons.values()), self.reasons)
