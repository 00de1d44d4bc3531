"""The trained network of a run: its weights, written at the end, and the network made again.

``model.safetensors`` has the merged weights. If layers are low-rank at the end, their factors are
in ``factors.safetensors``, beside it. The header of the first says what the network was told of the
data and what its inputs are like, so that no data is read to make it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dynarank.cost.stand_in import without_graphs
from dynarank.distributed.processes import independent
from dynarank.files.json_data import parse_json
from dynarank.files.reading import DamagedFileError, sha256
from dynarank.files.tensors import TensorFile, load_tensors, save_tensors
from dynarank.forms import LowRank
from dynarank.records import Run, SummaryRecord, read_run
from dynarank.surgery.sites import current_plan
from dynarank.surgery.verbs import apply_plan, merge
from dynarank.train.batch_outline import outline, stand_in
from dynarank.train.networks import build_network, network_facts
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError

__all__ = ["OWN_FILES", "WEIGHTS", "Trained", "read_trained", "write_trained"]

OWN_FILES = WEIGHTS, _FACTORS = "model.safetensors", "factors.safetensors"


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run and its network.

    Args:
        run: its records.
        summary: the last of them.
        recipe: its recipe.
        model: the network with the weights of the end of the run, low-rank layers as such.
        example: inputs of the shapes and dtypes that it was trained with; None: they are unknown.
    """

    run: Run
    summary: SummaryRecord
    recipe: Recipe
    model: nn.Module
    example: Any


def write_trained(model: nn.Module, sample: Any, folder: Path) -> str:
    """Write the weights of a run; returns the SHA-256 of the merged ones, which are written last.

    Args:
        model: as trained; it does not change.
        sample: a batch's arguments of the forward pass.
        folder: that of the run.
    """
    notes = {"format": "pt", "inputs": json.dumps(outline(sample))}
    if (facts := network_facts(model)) is not None:
        notes["network"] = json.dumps(facts)
    if any(isinstance(form, LowRank) for form in current_plan(model).values()):
        save_tensors(folder / _FACTORS, model.state_dict())
        notes["factors_sha256"] = sha256(folder / _FACTORS)
    with independent():  # a copy: the model is still that of the optimizer
        state = merge(deepcopy(model, without_graphs(model))).state_dict()
    save_tensors(folder / WEIGHTS, {k: v.detach() for k, v in state.items()}, notes)
    return sha256(folder / WEIGHTS)


def read_trained(folder: Path) -> Trained:
    """Make the network of a finished run, and load its weights.

    Raises:
        RecipeError: the run is not finished, or its network is not known: it was recorded in a loop
            of the user's own, or the user's own code has changed.
        DamagedFileError: the weights are not those that were written.
    """
    run = read_run(folder)
    if "recipe" not in run.config or "recorder" in run.config:
        raise RecipeError(
            f"{folder} was recorded in a loop of your own, and does not know the network: use "
            "dr.to_plain(model) there"
        )
    if run.summary is None:
        raise RecipeError(f"{folder} is not finished: go on with it (--resume {folder}) first")
    recipe, notes = _recipe(run), _notes(folder, run.summary)
    if "network" not in notes:
        raise RecipeError(f"{folder} does not say what its network was told of the data")
    with torch.random.fork_rng(devices=[]):
        model = build_network(recipe, notes["network"]["known"], **notes["network"]["offered"])
    apply_plan(model, {})  # from now on it takes the forms of a state
    held = folder / (_FACTORS if "factors_sha256" in notes else WEIGHTS)
    model.load_state_dict(load_tensors(held))
    return Trained(run, run.summary, recipe, model.eval(), stand_in(notes["inputs"]))


def _recipe(run: Run) -> Recipe:
    try:
        return Recipe.model_validate(run.config["recipe"])
    except ValidationError as error:
        raise DamagedFileError(run.folder / "config.json", "it holds no recipe") from error


def _notes(folder: Path, summary: SummaryRecord) -> Mapping[str, Any]:
    """What the header of the weights says, once they are known to be those that were written."""
    weights, factors = folder / WEIGHTS, folder / _FACTORS
    _check(weights, summary.model_sha256)
    told = TensorFile(weights).metadata
    if "factors_sha256" in told:
        _check(factors, told["factors_sha256"])
    texts = {name: text for name, text in told.items() if name in ("inputs", "network")}
    return {**told, **{n: parse_json(text, str(weights)) for n, text in texts.items()}}


def _check(path: Path, digest: str | None) -> None:
    if digest != sha256(path):
        raise DamagedFileError(path, "it has changed since it was written (SHA-256 differs)")
