"""A model card: a Markdown page with the header that Hugging Face reads, and the ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dynarank.cost.flops import trace
from dynarank.distributed.processes import independent
from dynarank.distributed.unwrap import unwrapped
from dynarank.export.same_outputs import tensors_in
from dynarank.files.version import __version__
from dynarank.forms import Form, FullRank, LowRank, form_name
from dynarank.surgery.sites import Site, survey

__all__ = ["model_card"]

_TAGS = ("dynarank", "low-rank")


def model_card(
    model: nn.Module,
    plain: nn.Module,
    *,
    name: str = "Model",
    example: Any = None,
    about: Mapping[str, str] | None = None,
    load: str = "",
    tags: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> str:
    """The model card of what is shipped, as Markdown.

    Args:
        model: as trained, with its forms.
        plain: what is shipped, from :func:`dynarank.to_plain`.
        name: the title.
        example: a batch, for the FLOPs of a forward pass; None: they are left out.
        about: how it was made, one line each, such as ``{"Schedule": "dynamic-rank"}``.
        load: Python code that loads it.
        tags: more tags for the header.
        metrics: names of metrics for the header.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(64, 64)), 8, layers="0")
        >>> print(model_card(model, dr.to_plain(model), name="Small").split("## ")[2])
        Layers
        <BLANKLINE>
        | layer | weight | form | decomposition | rank | full rank | here |
        |---|---|---|---|---:|---:|---:|
        | `0` | 64x64 | low-rank | svd | 8 | 4,096 | 1,024 |
        <BLANKLINE>
        1,088 parameters, 0.262 of the 4,160 at full rank.
        <BLANKLINE>
    """
    core = unwrapped(model)
    sites = [site for site in survey(core) if site.form is not None]
    parts = [
        _header(tags, metrics),
        f"# {_line(name)}\n",
        "A PyTorch model whose low-rank layers are kept as their factors: "
        "`Linear -> Linear`, `Conv -> Conv`. It needs no dynarank to run.\n",
        _how(about or {}),
        f"## Layers\n\n{_layers(sites, plain)}\n\n{_totals(core, sites, plain)}\n",
        _flops(core, plain, sites, example),
        f"## How to load it\n\n```python\n{load.strip()}\n```\n" if load else "",
    ]
    return "\n".join(part for part in parts if part)


def _header(tags: Sequence[str], metrics: Sequence[str]) -> str:
    """The YAML header; a JSON string is one of YAML too."""
    lines = ["---", "library_name: pytorch", "tags:", *_listed([*_TAGS, *tags])]
    lines += ["metrics:", *_listed(metrics)] if metrics else []
    return "\n".join([*lines, "---", ""])


def _listed(values: Iterable[str]) -> list[str]:
    return [f"- {json.dumps(value)}" for value in dict.fromkeys(values)]


def _how(about: Mapping[str, str]) -> str:
    lines = [f"- {_line(key)}: {_line(value)}" for key, value in about.items()]
    lines.append(f"- Made with dynarank {__version__}")
    return "## How it was made\n\n" + "\n".join(lines) + "\n"


def _layers(sites: Sequence[Site], plain: nn.Module) -> str:
    rows = ["| layer | weight | form | decomposition | rank | full rank | here |"]
    rows.append("|---|---|---|---|---:|---:|---:|")
    for site in sites:
        form = _form(site, plain)
        low = (form.decomposition, str(form.rank)) if isinstance(form, LowRank) else ("", "")
        shape = "x".join(map(str, site.shape))
        name = form_name(form) if form == site.form else f"{form_name(site.form)}, merged"  # type: ignore[arg-type]
        cells = [f"`{site.path or 'the model'}`", shape, name, *low]
        counts = [f"{math.prod(site.shape):,}", f"{site.entries(form):,}"]
        rows.append(f"| {' | '.join(_cell(cell) for cell in (*cells, *counts))} |")
    return "\n".join(rows)


def _form(site: Site, plain: nn.Module) -> Form:
    """The form that a weight has in the plain model."""
    path = site.module_paths[0]
    module = plain.get_submodule(path) if path else plain
    kept = isinstance(site.form, LowRank) and "decomposition" in vars(module)
    return site.form if kept and site.form is not None else FullRank()


def _totals(core: nn.Module, sites: Sequence[Site], plain: nn.Module) -> str:
    here, trained = (sum(p.numel() for p in one.parameters()) for one in (plain, core))
    whole = trained + sum(math.prod(site.shape) - site.entries() for site in sites)
    return f"{here:,} parameters, {_share(here, whole)} of the {whole:,} at full rank."


def _flops(core: nn.Module, plain: nn.Module, sites: Sequence[Site], example: Any) -> str:
    """The FLOPs of a forward pass of one row of the batch."""
    if example is None:
        return ""
    with independent():
        use = trace(core, example)
    rows = next((x.shape[0] for _, x in tensors_in(example) if x.ndim), 1)
    here = use.flops({site.path: _form(site, plain) for site in sites}).forward / rows
    whole = use.flops({site.path: FullRank() for site in sites}).forward / rows
    shapes = ", ".join(str(tuple(x.shape[1:])) for _, x in tensors_in(example))
    return (
        f"{here:,.0f} FLOPs in a forward pass of one example of {shapes}, {_share(here, whole)} of "
        "those at full rank (matrix products and convolutions; 1 multiply-accumulate = 2 FLOPs).\n"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "1.000"


def _line(text: str) -> str:
    """Text on one line."""
    return " ".join(str(text).split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")
