"""Measured times of each layer in each form, on the user's device and shapes.

FLOPs do not say how fast a device is: the factors of a small convolution can be slower than the
convolution. So every candidate runs forward and backward in a separate layer with random values and
an input of the shape that the weight gets in the model. The candidates are interleaved, so that
slowdowns of the machine affect all of them, and the median of several rounds counts. Timings are
cached in a file, by device, library version, threads, precision, shape and form.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.cost.flops import LayerUse, ModelUse
from dynarank.files.atomic import write_text
from dynarank.files.json_data import DamagedFileError, read_json
from dynarank.files.printable import printable
from dynarank.forms import Adapted, Form, FullRank, LowRank, Plan, Request, Within
from dynarank.layers import Call, WeightSpec
from dynarank.schedules.base import Mapped, Schedule, as_schedule
from dynarank.surgery.verbs import apply_plan

__all__ = [
    "Cache",
    "Timings",
    "candidates",
    "cpu_model",
    "default_cache",
    "layer_timer",
    "measure",
    "where_faster",
]


@dataclass(frozen=True)
class Timings:
    """Measured times of a training step of each weight, in each timed form and execution.

    Args:
        seconds: the times in seconds by path and form; forms with factors have an explicit
            execution.
        margin: how much faster than full-rank a form must be to be chosen, as a share: timings are
            noisy, and a change of form has a cost.
    """

    seconds: Mapping[str, Mapping[Form, float]]
    margin: float = 0.02

    def full_rank(self, path: str) -> float:
        """The time of the weight at full rank, in seconds."""
        return self.seconds[path][FullRank()]

    def of(self, path: str, form: Form) -> float:
        """The time in a form, in seconds; for ``"auto"``, that of the fastest execution.

        Raises:
            KeyError: the form was not timed.
        """
        return self.seconds[path][self.fastest(path, form)]

    def fastest(self, path: str, form: Form) -> Form:
        """The form with its fastest execution."""
        timed = self.seconds[path]
        able = [one for one in candidates(form) if one in timed]
        if not able:
            raise KeyError(
                f"layer {path!r}: {form} was not timed; timed: {', '.join(map(str, timed))}"
            )
        return min(able, key=lambda one: timed[one])

    def is_faster(self, path: str, form: Form) -> bool:
        """Whether the form is faster than full rank by at least the margin."""
        return self.of(path, form) < (1 - self.margin) * self.full_rank(path)

    def choose(self, path: str, form: Form) -> Form:
        """The fastest execution of a low-rank form, or full rank if the form is not faster.

        An adapted form stays adapted, since it determines what trains: only its execution is
        chosen. A form that was not timed, such as one that a schedule chooses during training, is
        unchanged.
        """
        timed = self.seconds.get(path, {})
        if isinstance(form, FullRank) or not any(one in timed for one in candidates(form)):
            return form
        fastest = self.fastest(path, form)
        if isinstance(form, LowRank):
            return fastest if self.is_faster(path, form) else FullRank()
        assert isinstance(fastest, Adapted)
        return replace(fastest, restart=form.restart)


def candidates(form: Form) -> list[Form]:
    """The form with each execution that it allows; the number of restarts does not matter.

    Example:
        >>> candidates(LowRank(8))
        [LowRank(rank=8, decomposition='svd', execution='factored'), LowRank(rank=8, decomposition='svd', execution='joined')]
    """  # noqa: E501
    if isinstance(form, Adapted):
        form = replace(form, restart=0)
    if isinstance(form, FullRank) or form.execution != "auto":
        return [form]
    if isinstance(form, LowRank):
        return [replace(form, execution="factored"), replace(form, execution="joined")]
    return [replace(form, execution="merged"), replace(form, execution="two-branch")]


def measure(
    use: ModelUse,
    plans: Iterable[Plan],
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    rounds: int = 5,
    cache: Path | None = None,
    on_layer: Callable[[str], None] = lambda path: None,
) -> Timings:
    """Time every weight at full rank and in every form that the plans give it.

    Args:
        use: the trace of a batch, from :func:`dynarank.cost.trace`.
        plans: the plans to time, such as those of a schedule's phases.
        device: the device to run on.
        autocast: the dtype of autocast; None: fp32 throughout.
        channels_last: whether convolutions use this memory format.
        rounds: the number of measured runs per candidate, after one warm-up.
        cache: a file of earlier timings, which is read and extended, see ``default_cache``; None:
            no cache.
        on_layer: called with each path before it is timed.

    Example:
        >>> from dynarank.cost.flops import trace
        >>> use = trace(nn.Sequential(nn.Linear(32, 32)), torch.ones(16, 32))
        >>> sorted(measure(use, [{"0": LowRank(4)}]).seconds["0"], key=str)[0]
        FullRank()
    """
    stored = Cache(cache)
    setting = Setting(torch.device(device), autocast, channels_last, rounds)
    wanted: dict[str, dict[Form, None]] = {}
    for plan in plans:
        for path, form in plan.items():
            forms = wanted.setdefault(path, {FullRank(): None})
            forms.update(dict.fromkeys(candidates(use.layers[path].spec.resolve(form))))
    seconds: dict[str, Mapping[Form, float]] = {}
    for path, forms in wanted.items():
        on_layer(path)
        seconds[path] = layer_seconds(use.layers[path], list(forms), setting, stored)
    stored.save()
    return Timings(seconds)


def layer_timer(
    use: ModelUse, device: torch.device | str = "cpu", *, channels_last: bool = False
) -> Callable[[str, Form], float]:
    """A function ``(path, form) -> seconds`` that times training steps on demand, each form once.

    Args:
        use: the trace of a batch, from :func:`dynarank.cost.trace`.
        device: the device to run on.
        channels_last: whether convolutions use this memory format.

    Example:
        >>> from dynarank.cost.flops import trace
        >>> use = trace(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8))
        >>> layer_timer(use)("0", FullRank()) > 0
        True
    """
    setting, stored = Setting(torch.device(device), None, channels_last, 5), Cache(None)

    def seconds(path: str, form: Form) -> float:
        layer = use.layers[path]
        return min(
            layer_seconds(layer, candidates(layer.spec.resolve(form)), setting, stored).values()
        )

    return seconds


def where_faster(schedule: Schedule, timings: Timings) -> Mapped:
    """The schedule with low-rank forms only where they were measured to be faster.

    Budgets stay: which ranks they mean is not known yet.

    Example:
        >>> from dynarank.schedules import Clock, Readings, low_rank
        >>> timings = Timings({"0": {FullRank(): 1.0, LowRank(4, execution="factored"): 2.0}})
        >>> faster = where_faster(low_rank(4), timings)
        >>> faster.update({}, Clock(0, 1), Readings({"0": (32, 32)})).plan
        {'0': FullRank()}
    """

    def faster(request: Request) -> Request:
        return {
            path: form if isinstance(form, Within) else timings.choose(path, form)
            for path, form in request.items()
        }

    return Mapped(as_schedule(schedule), faster)


def default_cache() -> Path:
    """The default cache file: ``timings.json`` in ``DYNARANK_CACHE`` or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DYNARANK_CACHE") or Path(home) / "dynarank") / "timings.json"


@dataclass(frozen=True)
class Setting:
    """The options of a timing.

    Args:
        device: the device to run on.
        autocast: the dtype of autocast; None: fp32 throughout.
        channels_last: whether convolutions use this memory format.
        rounds: the number of measured runs per candidate, after one warm-up.
    """

    device: torch.device
    autocast: torch.dtype | None
    channels_last: bool
    rounds: int

    def key(self) -> str:
        """The part of the cache key that does not depend on the weight, its calls and its form."""
        cpu = f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        parts = (
            name,
            torch.__version__,
            torch.get_num_threads(),
            self.autocast,
            self.channels_last,
        )
        return "|".join(map(str, parts))


def cpu_model() -> str:
    """The name of the CPU, or of its architecture if the system does not report one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Cache:
    """A JSON file of timings; a damaged one is replaced, with a warning."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, float] = {}
        if path is not None and path.exists():
            try:
                self.known = _timings(path)
            except (OSError, DamagedFileError) as error:
                warnings.warn(f"{error}; all layers are timed again", stacklevel=3)

    def save(self) -> None:
        """Write the file, whole or not at all; without space for it, warn."""
        if self.path is None or not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.known, indent=0))
        except (OSError, ValueError) as error:
            warnings.warn(f"the timings are not cached: {error}", stacklevel=3)


def _timings(path: Path) -> dict[str, float]:
    """The timings in a file.

    Raises:
        DamagedFileError: it is not JSON of seconds by key.
    """
    found = read_json(path.resolve())
    if not isinstance(found, dict):
        raise DamagedFileError(path, "it has no timings")
    for key, seconds in cast("dict[str, object]", found).items():
        if not isinstance(seconds, float | int) or isinstance(seconds, bool) or not seconds > 0:
            raise DamagedFileError(
                path, f"{printable(key)} takes {printable(repr(seconds))}, not seconds"
            )
    return cast("dict[str, float]", found)


def layer_seconds(
    use: LayerUse, forms: list[Form], setting: Setting, cache: Cache
) -> dict[Form, float]:
    """The time of all calls of one weight in each form, from the cache or measured now."""
    keys = {form: f"{setting.key()}|{use.spec}|{use.calls}|{form}" for form in forms}
    if not all(key in cache.known for key in keys.values()):
        totals = dict.fromkeys(forms, 0.0)
        for call in dict.fromkeys(use.calls):
            for form, one in _call_seconds(use.spec, forms, call, setting).items():
                totals[form] += one * use.calls.count(call)
        cache.known.update({keys[form]: total for form, total in totals.items()})
        cache.changed = True
    return {form: cache.known[key] for form, key in keys.items()}


def _call_seconds(
    spec: WeightSpec, forms: list[Form], call: Call, setting: Setting
) -> dict[Form, float]:
    spec = spec if call.rows is None else spec.rows(*call.rows)
    with torch.random.fork_rng([setting.device] if setting.device.type == "cuda" else []):
        plain = _stand_in(spec, call)
        plain = plain.to(setting.device)
        if setting.channels_last and spec.dims == 2:
            plain = plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        layers = {form: copy.deepcopy(plain) for form in forms}
        for form, layer in layers.items():
            apply_plan(layer, {"": form})
            layer.requires_grad_(call.trains)
            if isinstance(form, Adapted):
                layer.base.requires_grad_(False)  # type: ignore[union-attr]
        x = _input(spec, call, setting)
        times: dict[Form, list[float]] = {form: [] for form in forms}
        for _ in range(setting.rounds + 1):
            for form, layer in layers.items():
                times[form].append(_step_seconds(layer, x, setting, call.reached))
    return {form: statistics.median(found[1:]) for form, found in times.items()}


def _stand_in(spec: WeightSpec, call: Call) -> nn.Module:
    """A plain layer with this weight and geometry, for an input that is already padded."""
    if call.lookup:
        return nn.Embedding(spec.shape[0], spec.shape[1])
    if spec.dims == 0:
        return nn.Linear(spec.shape[1], spec.shape[0], bias=False)
    g, dims = call.geometry, spec.dims
    kinds: tuple[Any, ...] = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if g.transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    options: dict[str, Any] = {"output_padding": g.output_padding} if g.transposed else {}
    return kinds[dims - 1](
        spec.shape[1] * g.groups, spec.shape[0], spec.shape[2:], stride=g.stride, padding=g.padding,
        dilation=g.dilation, groups=g.groups, bias=False, **options,
    )  # fmt: skip


def _input(spec: WeightSpec, call: Call, setting: Setting) -> Tensor:
    if call.lookup:
        return torch.randint(spec.shape[0], call.shape, device=setting.device)
    x = torch.randn(call.shape, device=setting.device)
    if setting.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(call.input_grad)


def _step_seconds(layer: nn.Module, x: Tensor, setting: Setting, backward: bool) -> float:
    """The time of one forward pass, and of a backward pass if there is one, in seconds."""
    layer.zero_grad()
    x.grad = None
    _wait(setting.device)
    begun = time.perf_counter()
    with _autocast(setting):
        y = layer(x)
    if backward and y.requires_grad:
        y.backward(y.detach())
    _wait(setting.device)
    return time.perf_counter() - begun


def _autocast(setting: Setting) -> Any:
    if setting.autocast is None:
        return nullcontext()
    return torch.autocast(setting.device.type, dtype=setting.autocast)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
