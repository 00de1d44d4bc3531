"""Seconds of one weight's training step in a form, on a device; and a file of earlier answers.

The weight stands in a plain layer of its own, with made-up values and an input of the shape it
meets in the model. Candidates run in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.cost.flops import LayerUse
from dynarank.forms import Adapted, Form
from dynarank.layers import Call, WeightSpec
from dynarank.surgery.verbs import apply_plan

__all__ = ["Cache", "Setting", "layer_seconds"]


@dataclass(frozen=True)
class Setting:
    """Where and how to run.

    Args:
        device: the device.
        autocast: its dtype, None for fp32 throughout.
        channels_last: whether convolutions run in that memory format.
        rounds: how often each candidate runs, after once to warm up.
    """

    device: torch.device
    autocast: torch.dtype | None
    channels_last: bool
    rounds: int

    def key(self) -> str:
        """What an answer depends on besides the weight, its calls and its form."""
        cpu = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        parts = (
            name,
            torch.__version__,
            torch.get_num_threads(),
            self.autocast,
            self.channels_last,
        )
        return "|".join(map(str, parts))


def _cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Cache:
    """Earlier answers in a file; a file that cannot be read counts as empty."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, float] = {}
        if path is not None and path.is_file():
            try:
                self.known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, TypeError, ValueError):
                self.known = {}

    def save(self) -> None:
        """Write it, whole or not at all."""
        if self.path is None or not self.changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self.known, indent=0), encoding="utf-8")
        partial.replace(self.path)


def layer_seconds(
    use: LayerUse, forms: list[Form], setting: Setting, cache: Cache
) -> dict[Form, float]:
    """Seconds of all calls of one weight in each form, from the cache or measured in turn."""
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
                times[form].append(_step_seconds(layer, x, setting))
    return {form: statistics.median(found[1:]) for form, found in times.items()}


def _stand_in(spec: WeightSpec, call: Call) -> nn.Module:
    """A plain layer with this weight and geometry; the input is padded already."""
    if spec.lookup:
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
    if spec.lookup:
        return torch.randint(spec.shape[0], call.shape, device=setting.device)
    x = torch.randn(call.shape, device=setting.device)
    if setting.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(call.input_grad)


def _step_seconds(layer: nn.Module, x: Tensor, setting: Setting) -> float:
    """One forward and backward pass."""
    layer.zero_grad()
    x.grad = None
    _wait(setting.device)
    begun = time.perf_counter()
    with _autocast(setting):
        y = layer(x)
    if y.requires_grad:
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
