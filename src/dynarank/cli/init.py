"""``dynarank init``: a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynarank.files.atomic import write_text
from dynarank.train.recipe_error import RecipeError

__all__ = ["init"]

_RECIPE = """\
# A recipe: what `dynarank train {name}` runs. Lines that begin with # show the defaults.
{data}
epochs = 10
learning_rate = 0.05

# batch_size = 64
# schedules = ["full-rank", "low-rank", "dynamic-rank"]   # `dynarank schedules` lists them; or
#                                                         # "file.py:function" -> a rank schedule
# rank = 0.5                  # share of a layer's own cost; 16: a rank
# layers = ["*conv*"]         # patterns of the layers that change rank; default: chosen by size

# optimizer = "sgd"           # "adamw", or "file.py:function" (parameters, lr=..., **options)
# optimizer_options = {{}}
# momentum = 0.9
# weight_decay = 0.0
# lr_schedule = "cosine"      # "constant", "linear", ..., or "file.py:function" (optimizer, steps)
# warmup = 0.0                # share of the run

# For data of your own, by default those that suit its targets:
# loss = "cross-entropy"      # "mse", "l1", "huber", "bce", or "file.py:function" (output, target)
# metric = "accuracy"         # "f1", "mse", "loss", ..., or "file.py:function" (output, target),
# higher_is_better = true     # which says its direction
"""

_DIGITS = """
# Your data: "file.py:function" that returns (train, test), each a pair of tensors, a Dataset or a
# DataLoader; "imagefolder:DIR", "csv:FILE", "npz:FILE", "text:DIR", "hf:NAME"; or a built-in set.
data = "digits"
# Your network: "file.py:function" that returns an nn.Module, or a built-in one.
model = "mlp"
model_options = { inputs = 64, width = 128 }
"""

_OWN = """
data = "{module}.py:data"      # returns (train, test)
model = "{module}.py:network"  # returns an nn.Module
model_options = {{ width = 64 }}
"""

_PYTHON = '''\
"""The network and the data of a recipe."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def network(inputs: int, classes: int, width: int = 64) -> nn.Module:
    """A network: `inputs` and `classes` come from the data, `width` from model_options."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: points in 16 dimensions; the class is the largest of 4 sums."""
    x = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    y = x.view(-1, 4, 4).sum(2).argmax(1)
    return TensorDataset(x[:1_600], y[:1_600]), TensorDataset(x[1_600:], y[1_600:])
'''


def init(
    name: Annotated[
        Path, typer.Argument(metavar="NAME.toml", help="The file to write.")
    ] = Path("recipe.toml"),
    python: Annotated[
        bool,
        typer.Option("--python", help="Also write a Python file with a network and data."),
    ] = False,
) -> None:  # fmt: skip
    """Write a commented recipe that runs as it is: `dynarank train NAME.toml`.

    With --python, a small network and data of your own lie beside it in NAME.py, to be changed.
    Nothing is overwritten.
    """
    if name.is_dir():
        raise RecipeError(f"{name} is a folder; name the file to write, {name / 'recipe.toml'}")
    if name.suffix != ".toml":
        raise RecipeError(f"a recipe is a .toml file, got {name}; write {name.stem}.toml")
    code = name.with_name(f"{_module(name.stem)}.py")
    for path in (name, *([code] if python else [])):
        if path.exists():
            raise RecipeError(f"{path} exists already and is not overwritten; pass another name")
    if not name.parent.is_dir():
        raise RecipeError(
            f"cannot write {name}: the folder {name.parent} does not exist; pass another or make it"
        )
    lines = _OWN.format(module=code.stem) if python else _DIGITS
    if python:
        write_text(code, _PYTHON)
    write_text(name, _RECIPE.format(name=name.name, data=lines))
    print(f"Wrote {name}{f' and {code}' if python else ''}. Next: dynarank train {name}")


def _module(stem: str) -> str:
    """A file's name as that of a module that can be imported."""
    made = "".join(c if f"_{c}".isidentifier() else "_" for c in stem)
    return made if made.isidentifier() else f"own_{made}"
