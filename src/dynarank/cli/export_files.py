"""The files of ``dynarank export``: one of several kinds, or a folder with a model card."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dynarank.export.batch_axis import Batch
from dynarank.export.model_card import model_card
from dynarank.export.plain import Keep, to_plain
from dynarank.export.program import Exported, to_pt2
from dynarank.export.weights import chains, write_weights
from dynarank.files.atomic import temporary_beside, write_text
from dynarank.forms import Rank
from dynarank.report.formats import number, ratio, score_text
from dynarank.report.transition_points import transition_points
from dynarank.surgery.sites import survey
from dynarank.train.recipe_error import RecipeError
from dynarank.train.trained import Trained

__all__ = ["IN_FOLDER", "KINDS", "Answer", "write_files"]

KINDS = (".safetensors", ".onnx", ".pt2", ".pt")
IN_FOLDER = ("README.md", "model.safetensors", "model.pt2")
"""The files of a folder."""

_ROWS = 2  # of the batch that files are compared on


@dataclass(frozen=True)
class Answer:
    """What was written.

    Args:
        run: the folder of the run.
        files: the files.
        parameters: their number in the plain network.
        full_rank: their number at full rank.
    """

    run: Path
    files: tuple[Exported, ...]
    parameters: int
    full_rank: int

    def data(self) -> dict[str, Any]:
        """As plain data."""
        files = [{**asdict(one), "path": str(one.path)} for one in self.files]
        return {**asdict(self), "run": str(self.run), "files": files}


def write_files(trained: Trained, to: Path, *, keep: Keep, batch: int | None) -> Answer:
    """Write the trained network of a run to a file, by its suffix, or to a folder.

    Args:
        trained: the network.
        to: the place; what is there is replaced when the new is whole.
        keep: which factors are kept, see :func:`dynarank.to_plain`.
        batch: the batch size of the files that have one; None: any.

    Raises:
        RecipeError: it needs inputs, and those of the run are not known.
        ValueError: the network cannot be exported so.
    """
    job = _Job(trained, keep, batch)
    if to.suffix in KINDS and not to.is_dir():
        files = [job.file(to)]
    else:
        with temporary_beside(to) as beside:
            beside.mkdir()
            files = [job.file(beside / name) for name in IN_FOLDER[1:]]
            write_text(beside / IN_FOLDER[0], job.model_card(to))
            with temporary_beside(to) as before:
                if to.exists():
                    to.rename(before)
                beside.rename(to)
        files = [replace(one, path=to / one.path.name) for one in files]
    return Answer(trained.run.folder, tuple(files), job.parameters, job.full_rank)


class _Job:
    """The network of a run, and its plain form."""

    def __init__(self, trained: Trained, keep: Keep, batch: int | None) -> None:
        self.trained, self.keep = trained, keep
        self.plain = to_plain(trained.model, keep=keep)
        self.dim, self.example = (0 if batch is None else None), trained.example
        if self.example is not None:
            self.example = Batch(self.example, 0).of_size(batch or _ROWS).example
        self.parameters = _parameters(self.plain)
        more = (math.prod(site.shape) - site.entries() for site in survey(trained.model))
        self.full_rank = _parameters(trained.model) + sum(more)

    def file(self, path: Path) -> Exported:
        """Write a file by its suffix."""
        if path.suffix in (".safetensors", ".pt"):
            batch = None if self.example is None else Batch(self.example, self.dim)
            about = {key: value for key, value in self.about().items() if value}
            return write_weights(self.plain, path, batch, about)
        if self.example is None:
            raise RecipeError(
                f"{self.trained.run.folder} does not say what the inputs are like, which "
                f"{path.suffix} needs: use dr.to_plain and torch.export in Python, or write "
                ".safetensors"
            )
        how: dict[str, Any] = {"keep": self.keep, "batch_dim": self.dim}
        if path.suffix == ".pt2":
            return to_pt2(self.trained.model, self.example, path, **how)
        from dynarank.export.onnx import to_onnx  # the extra

        return to_onnx(self.trained.model, self.example, path, **how)

    def about(self) -> dict[str, str]:
        """How the network was made, one line each."""
        run, recipe, summary = self.trained.run, self.trained.recipe, self.trained.summary
        header, rank = run.header, recipe.rank
        points = (f"{one.label} at epoch {number(one.epoch)}" for one in transition_points(run))
        size = f", batches of {recipe.batch_size}" if recipe.batch_size else ""
        score = summary.test_score
        return {
            "Recipe": header.recipe,
            "Data": recipe.data,
            "Network": recipe.model,
            "Schedule": f"{header.schedule}, seed {header.seed}, epochs: {header.epochs}",
            "Rank": f"{rank.value}:{rank.of}" if isinstance(rank, Rank) else str(rank),
            "Transition points": ", ".join(points) or "none",
            "Optimizer": f"{recipe.optimizer}, learning rate {recipe.learning_rate:g}{size}",
            f"Test {header.metric.name}": ""
            if score is None
            else score_text(score, header.metric, 2),
            "Training FLOPs": f"{ratio(summary.relative_flops)} of full rank",
            "Trained": f"{header.started}, {header.hardware}, {header.precision}",
            "Versions": ", ".join(f"{name} {one}" for name, one in header.versions.items()),
            "Commit": header.commit or "",
        }

    def model_card(self, to: Path) -> str:
        """The model card of a folder."""
        command = f"dynarank export {self.trained.run.folder} --to {to} --keep {self.keep}"
        about = {key: value for key, value in self.about().items() if value}
        return model_card(
            self.trained.model,
            self.plain,
            name=f"{self.trained.recipe.name}, {self.trained.run.header.schedule}",
            example=self.example,
            about={**about, "Written by": f"`{command}`"},
            load=_loading(self.plain),
            metrics=[self.trained.run.header.metric.name],
        )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _loading(plain: nn.Module) -> str:
    """Code that loads the files of a folder."""
    rows = "\n".join(_row(path, modules) for path, modules in chains(plain).items())
    return f"""import torch

model = torch.export.load("model.pt2").module()  # needs torch alone; in evaluation mode

# The weights, into a network of your own class:
from safetensors.torch import load_model
from torch import nn


def load_into(network: nn.Module) -> nn.Module:
{rows or "    # every layer is as it was"}
    load_model(network, "model.safetensors")
    return network
"""


def _row(path: str, modules: list[str]) -> str:
    parts = ", ".join(f"nn.{one}" for one in modules)
    return f"    network.set_submodule({path!r}, nn.Sequential({parts}))"
