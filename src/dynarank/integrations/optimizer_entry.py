"""A run's state within the state of its optimizer, where a host saves no more than that.

It lies in the first parameter group: what is beside the groups torch drops when it loads, and a
host may load an optimizer before anybody can register a hook on it. Plain data and tensors, so
``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.surgery.optimizer_signature import KEY
from dynarank.surgery.own_references import inner_optimizer

__all__ = ["OptimizerEntry", "load_by_name", "write_with"]


@dataclass(frozen=True)
class OptimizerEntry:
    """What lies in an optimizer's state beside the states of parameters.

    Args:
        step: the host's count of optimizer steps.
        ranks: the rank scheduler's state.
        names: the names of the optimizer's parameters, by group.
    """

    step: int
    ranks: Mapping[str, Any]
    names: list[list[str]]

    @classmethod
    def taken_from(cls, optimizer: Any) -> OptimizerEntry | None:
        """Take the entry out of an optimizer that has been loaded; None if there is none.

        Raises:
            ValueError: it is something else.
        """
        found = inner_optimizer(optimizer).param_groups[0].pop(KEY, None)
        if found is None:
            return None
        if not isinstance(found, Mapping) or {*found} != {field.name for field in fields(cls)}:
            raise ValueError(
                f"the entry {KEY!r} of the optimizer's first group is not the state of a run: "
                f"{found!r}; the checkpoint is damaged, use another"
            )
        return cls(**found)


def write_with(optimizer: Any, ranks: RankScheduler, step: Callable[[], int]) -> Any:
    """From now on ``optimizer.state_dict()`` has the run's entry; returns a removable hook."""

    def write(_: Any, state: dict[str, Any]) -> None:
        names = state[KEY]["names"]  # of the signature
        entry = OptimizerEntry(step(), ranks.state_dict(), names)
        state["param_groups"][0][KEY] = asdict(entry)

    return inner_optimizer(optimizer).register_state_dict_post_hook(write)


def load_by_name(optimizer: Any, names: list[list[str]]) -> None:
    """Give each parameter its own state, after torch has loaded the states by number.

    Args:
        optimizer: it is signed, see :func:`~dynarank.surgery.optimizer_signature.sign_states`.
        names: those of the parameters when the state was saved, by group.

    Raises:
        ValueError: they are other parameters, or in other groups.
    """
    state = (own := inner_optimizer(optimizer)).state_dict()
    if state[KEY]["names"] != names:
        state[KEY]["names"] = names
        own.load_state_dict(state)
