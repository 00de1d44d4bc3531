"""Own data of every kind trains, goes on bit for bit, and leaves the random state alone."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_recipes import own
from torch import Tensor
from torch.utils._pytree import tree_leaves
from training import Silent

from dynarank.files.json_data import parse_json
from dynarank.records import EpochRecord, NoiseRecord, read_run
from dynarank.train.data_digest import data_digest
from dynarank.train.interruption import Interrupted
from dynarank.train.loop import Machine
from dynarank.train.own_task import OwnTask
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.run import CheckpointPlan, run_schedule
from dynarank.train.schedules import check_schedules
from dynarank.train.tasks import make_task, sketch

CPU = torch.device("cpu")
OWN = "batch_size = 12\nnum_workers = 0"
KINDS = {
    "tensors": OWN,
    "arrays": OWN,
    "dicts": OWN,
    "datasets": OWN,
    "noisy": OWN,
    "listed": OWN,
    "loaders": OWN,
    "weighted": "",
    "streams": "batch_size = 12\nsteps_per_epoch = 6",
    "labeled": 'batch_size = 12\nmodel = "net.py:Labeled"\nmetric = "accuracy"',
}


def recipe_of(folder: Path, kind: str) -> Recipe:
    more = KINDS[kind]
    made = own(folder, kind, "\n".join(x for x in more.splitlines() if not x.startswith("model")))
    named = [line for line in more.splitlines() if line.startswith("model")]
    return made.with_settings({"model": named[0].split('"')[1]} if named else {})


def task_of(recipe: Recipe, seed: int = 0) -> Any:
    return make_task(recipe, seed=seed, device=CPU)


def run(recipe: Recipe, folder: Path, schedule: str = "dynamic-rank", **options: Any) -> None:
    settings: dict[str, Any] = {
        "machine": Machine(CPU),
        "checkpoints": CheckpointPlan(minutes=None),
        **options,
    }
    run_schedule(
        recipe, schedule, task_of(recipe), folder, Silent(), seed=0, epochs=2,
        say=lambda text: None, **settings,
    )  # fmt: skip


def stopping(step: int) -> Any:
    left = iter(range(step - 1, -1, -1))
    return lambda: signal.SIGINT if next(left) == 0 else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_twice_is_the_run_that_was_not(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, kind)
    run(recipe, tmp_path / "whole")
    for step in (1, 7):  # in the first epoch and in the second
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "stopped", stop=stopping(step))
    run(recipe, tmp_path / "stopped")
    one, two = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")
    )
    assert one == two
    scores = [read_run(tmp_path / n).summary.test_score for n in ("whole", "stopped")]  # type: ignore[union-attr]
    assert scores[0] == scores[1]


def _numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_a_pure_function_of_seed_and_epoch(kind: str, tmp_path: Path) -> None:
    task = task_of(recipe_of(tmp_path, kind))

    def values(task: OwnTask, epoch: int, start: int = 0) -> Tensor:
        batches = list(task.epoch(epoch, start))
        assert len(batches) == task.steps_per_epoch - start == 6 - start
        return torch.cat([x.flatten().double() for b in batches for x in tree_leaves(b)])

    before = (torch.random.get_rng_state(), random.getstate(), _numpy_state())
    first = values(task, 0)
    again = (torch.random.get_rng_state(), random.getstate(), _numpy_state())
    assert torch.equal(before[0], again[0]) and before[1:] == again[1:]
    _ = torch.rand(3), random.random(), np.random.rand()  # what a model draws changes nothing
    assert torch.equal(values(task, 0), first)
    assert torch.equal(values(task, 0, 4), first[-len(first) // 3 :])
    assert not torch.equal(values(task, 1), first)
    assert not torch.equal(values(task_of(task.recipe, seed=1), 0), first)


def test_workers_read_the_same(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "noisy")
    several = task_of(recipe.with_settings({"num_workers": 2}))
    for one, two in zip(task_of(recipe).epoch(1, 3), several.epoch(1, 3), strict=True):
        assert torch.equal(one[0], two[0])


def test_what_is_not_said_suits_the_targets(tmp_path: Path) -> None:
    recipe = own(tmp_path, "tensors")
    task = task_of(recipe)
    assert (task.metric.name, task.metric.higher_is_better) == ("accuracy", True)
    assert task.model().head.out_features == 3
    real = "\ndef real():\n    return tuple((x, x.sum(1)) for x, _ in tensors())\n"
    task = task_of(own(tmp_path, "real", code=real))
    assert (task.metric.name, task.metric.higher_is_better) == ("mean squared error", False)
    loss, score = task.loss(model := task.model(), batch := next(task.epoch(0)))
    assert torch.isclose(score, loss) and model.head.out_features == 1
    assert model(batch[0]).shape == (12, 1) and batch[1].shape == (12,)  # no broadcast
    model.eval()
    expected = (model(batch[0])[:, 0] - batch[1]).square().mean()
    assert torch.isclose(task.loss(model, batch)[0], expected)


EVERYTHING = """
batch_size = 12
loss = "net.py:margin"
metric = "net.py:worst"
higher_is_better = false
optimizer = "net.py:lion"
optimizer_options = { scale = 0.5 }
lr_schedule = "net.py:halved"
schedules = ["low-rank", "net.py:late", "net.py:by_clock"]
layers = "hidden"
rank = 6
"""


def test_everything_may_be_own(tmp_path: Path) -> None:
    recipe = own(tmp_path, "noisy", EVERYTHING)
    assert recipe.schedule_names == ("low-rank", "late", "by_clock")
    check_schedules([(recipe, name) for name in recipe.schedule_names], task_of(recipe), 2)
    for name in ("late", "by_clock"):
        run(recipe, tmp_path / name, name)
        found = read_run(tmp_path / name)
        assert found.header.metric.name == "worst" and not found.header.metric.higher_is_better
        assert [e.learning_rate for e in found.all(EpochRecord)] == [0.025, 0.0125]
        config = parse_json((tmp_path / name / "config.json").read_bytes(), "config.json")
        assert config["recipe"]["sources"].keys() == {"net.py"}  # type: ignore[index, call-overload]
    drawn = sketch(recipe)
    assert drawn.sample.is_meta and "net.py:noisy" in drawn.read


def test_a_sketch_is_made_on_the_cpu_where_it_cannot_be_made_on_meta(tmp_path: Path) -> None:
    code = "\ndef Net(inputs, classes):\n    width = int(torch.tensor(24.0).item())\n"
    code += "    return nn.Sequential(nn.Linear(inputs, width), nn.Linear(width, classes))\n"
    drawn = sketch(own(tmp_path, code=code))
    assert all(p.is_meta for p in drawn.model.parameters()) and drawn.model[0].out_features == 24  # type: ignore[index]


def test_a_run_whose_code_has_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("STEP = 1\n")
    recipe = own(tmp_path, "tensors", code="\nfrom helper import STEP\n")
    assert recipe.sources is not None and recipe.sources.keys() == {"net.py", "helper.py"}
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", stop=stopping(2))
    (tmp_path / "helper.py").write_text("STEP = 2\n")
    with pytest.raises(RecipeError, match=r"helper\.py has changed since the run began"):
        run(recipe, tmp_path / "run")
    changed = load_recipe(str(tmp_path / "my.toml"))
    with pytest.raises(RecipeError, match=r"other settings \(recipe\.sources"):
        run(changed, tmp_path / "run")
    (tmp_path / "helper.py").write_text("STEP = 1\n")
    run(recipe, tmp_path / "run")


WRONG_CODE = """
def no_pair(): return points()[0]
def forgot(): return points()
def none(): return None
def empty(): return (torch.zeros(0, 8), torch.zeros(0).long()), points(20)
def ragged(): return (torch.zeros(50, 8), torch.zeros(40).long()), points(20)
def fails(): return {}["x"]
def nan(): return (torch.full((24, 8), torch.nan), torch.arange(24) % 3), points(20)
def classes(): return points(), (points(20)[0], torch.full((20,), 7))
def words(): return list(zip("abcdefgh" * 3, range(24))), list(zip("abcdefgh", range(8)))
def endless(): return Stream(), Noisy(20)
class Unnamed(Dataset):
    def __init__(self): self.held = points()
    def __len__(self): return 72
    def __getitem__(self, index): return self.held[0][index], self.held[1][index]
def unnamed(): return Unnamed(), Noisy(20)
def option(count): return points(count), points(20)
def no_module(): return 3
def raises(inputs): raise TypeError("no such net")
def small(inputs): return nn.Linear(inputs, 2)
def narrow(): return nn.Linear(5, 3)
NET = nn.Linear(8, 3)
def same(): return NET
def vector(output, target): return output.sum(1)
def detached(output, target): return (output.argmax(1) != target).float().mean()
def three(output, target, weight): return output.mean()
def no_optimizer(params, lr): return params
def foreign(params, lr): return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
def no_scheduler(optimizer, total_steps): return optimizer
def plateau(optimizer, total_steps):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
def no_schedule(): return 3
class Odd(torch.optim.Optimizer):
    def __init__(self, params, lr): super().__init__(params, {"lr": lr})
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["odd"] = torch.ones(3)


def one_class():
    return ((points()[0], points()[1] * 0),) * 2
"""

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one part": ({"data": "net.py:no_pair"}, "must return .train, test.*Tensor of shape"),
    "x, y for train, test": ({"data": "net.py:forgot"}, "the training part must be one of"),
    "nothing": ({"data": "net.py:none"}, "must return .train, test.*NoneType"),
    "empty": ({"data": "net.py:empty"}, "the training part is empty"),
    "ragged": ({"data": "net.py:ragged"}, r"as many examples each, they are \(50, 8\), \(40,\)"),
    "raises": ({"data": "net.py:fails"}, r"net.py:fails' raised KeyError.*net.py, line \d+"),
    "nan": ({"data": "net.py:nan"}, "loss of the first batch is nan: the batch itself holds"),
    "classes": ({"data": "net.py:classes"}, "classes are 7 to 7, but the network has 3 outputs"),
    "one class": ({"data": "net.py:one_class"}, "cross-entropy of one output is always 0"),
    "words": ({"data": "net.py:words"}, "net.py:Net|forward|Linear"),
    "endless": ({"data": "net.py:endless"}, "stream without a length; set steps_per_epoch"),
    "epochs of no stream": ({"steps_per_epoch": 3}, "steps_per_epoch is for streams"),
    "missing option": ({"data": "net.py:option"}, "missing a required argument: 'count'"),
    "unknown classes": ({"data": "net.py:unnamed"}, "of the data, inputs, channels is known"),
    "unknown option": ({"data_options.cuont": 9, "data": "net.py:option"}, "mean 'count'"),
    "batch": ({"batch_size": 100}, "72 training examples do not fill one batch of 100"),
    "loader's batch": ({"data": "net.py:weighted", "batch_size": 5}, "batches of 12, but batch_si"),
    "no module": ({"model": "net.py:no_module"}, "must return an nn.Module, got 3"),
    "model raises": ({"model": "net.py:raises"}, "raised TypeError: no such net .*net.py, line"),
    "model option": ({"model_options.widht": 3}, "did you mean 'width'"),
    "few outputs": ({"model": "net.py:small"}, "classes are 0 to 2, but the network has 2 outputs"),
    "shapes": ({"model": "net.py:narrow"}, "a training step .*narrow.* raised RuntimeError"),
    "same": ({"model": "net.py:same"}, "returned the same network twice"),
    "an instance": ({"model": "net.py:NET"}, "is a network; name a function or class"),
    "no function": ({"model": "net.py:SIDE"}, "must be a function or class, got 24"),
    "vector": ({"loss": "net.py:vector"}, r"must return a scalar tensor, got shape \(12,\)"),
    "detached": ({"loss": "net.py:detached"}, "does not depend on the network's parameters"),
    "three": ({"loss": "net.py:three"}, "missing a required argument: 'weight'"),
    "mse of classes": ({"loss": "mse"}, "must have the same shape"),
    "f1 of three": ({"metric": "f1"}, "0 or 1"),
    "metric of numbers": ({"metric": "pearson"}, "must have the same shape"),
    "no optimizer": ({"optimizer": "net.py:no_optimizer"}, "must return a torch.optim.Optimizer"),
    "foreign": ({"optimizer": "net.py:foreign"}, "holds parameters that it was not given"),
    "optimizer option": ({"optimizer_options.nestrov": True}, "did you mean 'nesterov'"),
    "sgd's": ({"optimizer_options.nesterov": True, "momentum": 0.0}, "Nesterov momentum requires"),
    "odd state": ({"optimizer": "net.py:Odd", "schedules": "dynamic-rank"}, "odd"),
    "rprop": ({"optimizer": "torch.optim:Rprop"}, "cannot be moved.*moments='reset'"),
    "no scheduler": ({"lr_schedule": "net.py:no_scheduler"}, "must return an LRScheduler"),
    "plateau": ({"lr_schedule": "net.py:plateau"}, "ReduceLROnPlateau waits"),
    "no schedule": ({"schedules": "net.py:no_schedule"}, "must return a rank schedule"),
    "decomposition": ({"decomposition": "svdd"}, "unknown decomposition 'svdd'"),
    "budget": ({"budget": 0.001}, "budget|total"),
    "rank": ({"rank": 1000}, "rank 1000"),
    "layers": ({"layers": ["hiden"]}, "'hiden' matches no layer.*nearest: 'hidden'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    settings, told = WRONG[name]
    base = own(tmp_path, "tensors", "batch_size = 12" if "loader" not in name else "", WRONG_CODE)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=told):
        recipe = base.with_settings({"rank": 8, **settings})
        chosen = [(recipe, name) for name in recipe.schedule_names]
        check_schedules(chosen, task_of(recipe), 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"my.toml", "net.py"}


def test_limits(tmp_path: Path) -> None:
    for kind in ("tensors", "noisy", "loaders"):
        recipe = recipe_of(tmp_path, kind)
        task: Any = make_task(recipe, seed=0, device=CPU, train_limit=36, test_limit=5)
        assert (task.train_size, task.steps_per_epoch, task.test.size) == (36, 3, 5)
        with pytest.raises(ValueError, match="73 examples requested, but there are 72"):
            make_task(recipe, seed=0, device=CPU, train_limit=73)
    with pytest.raises(RecipeError, match="set steps_per_epoch"):
        make_task(recipe_of(tmp_path, "streams"), seed=0, device=CPU, train_limit=36)


def test_the_data_decides_which_run_it_is(tmp_path: Path) -> None:
    recipe = own(tmp_path, "noisy")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", stop=stopping(2))
    code = "\nclass Noisy(Noisy):\n    def __len__(self): return len(self.x) - 1\n"
    other = own(tmp_path, "noisy", code=code).model_copy(update={"sources": recipe.sources})
    with pytest.raises(RecipeError, match=r"train_size|has changed"):
        run(other, tmp_path / "run")


SPLIT = """
def split():
    x = torch.randn(92, 8)
    parts = torch.utils.data.random_split(TensorDataset(x, x[:, :3].argmax(1)), [72, 20])
    np.random.shuffle(order := list(range(72)))
    return torch.utils.data.Subset(parts[0], order), parts[1]
"""


def test_what_a_data_function_draws_is_the_same_in_every_run(tmp_path: Path) -> None:
    recipe = own(tmp_path, "split", code=SPLIT)
    one = next(task_of(recipe, 0).test.ordered())
    _ = torch.rand(3), np.random.rand()
    state = torch.random.get_rng_state()
    two = next(task_of(recipe, 1).test.ordered())
    assert all(map(torch.equal, one, two))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["loaders", "labeled"])
def test_the_noise_scale_is_measured(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, kind).with_settings({"batch_size": 0 if kind == "loaders" else 12})
    run(recipe, tmp_path / "run", machine=Machine(CPU, noise=True))
    assert read_run(tmp_path / "run").all(NoiseRecord)


def test_a_network_that_reads_values_is_sketched_and_trained(tmp_path: Path) -> None:
    code = "\nclass Net(Net):\n    def forward(self, x):\n"
    code += "        return super().forward(x if x.sum().item() < 1e9 else -x)\n"
    recipe = own(tmp_path, code=code)
    drawn = sketch(recipe)
    assert not drawn.sample.is_meta
    run(recipe, tmp_path / "run")


def test_a_run_goes_on_where_its_folder_was_moved_to(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    recipe = own(tmp_path / "one", "noisy")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "one" / "run", stop=stopping(3))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = load_recipe(str(tmp_path / "two" / "my.toml")).with_settings({"num_workers": 1})
    run(moved, tmp_path / "two" / "run")
    assert read_run(tmp_path / "two" / "run").summary is not None
    with pytest.raises(RecipeError, match=r"net.py is not there"):
        run(recipe, tmp_path / "two" / "run")


ODD = """
class Drawn(Noisy):
    def __init__(self, count):
        super().__init__(count)
        self.own = np.random.default_rng()

    def __getitem__(self, index):
        return self.x[index] + float(self.own.normal()), self.y[index]


class Later(Noisy):
    def __getitem__(self, index):
        return self.x[index], torch.tensor(9) if index == self.wrong else self.y[index]

    wrong = 37


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(8), 1


class Tokens(Noisy):
    def __getitem__(self, index):
        from collections import UserDict
        return UserDict(x=self.x[index], labels=self.y[index])


def rows(items):
    from collections import UserDict
    return UserDict({k: torch.stack([i[k] for i in items]) for k in ("x", "labels")})


def drawn():
    return Drawn(72), Noisy(20)


def drawn_stream():
    class Stream(IterableDataset):
        own = np.random.default_rng()

        def __iter__(self):
            return iter([(torch.ones(8) * self.own.normal(), 1)] * 72)

    return Stream(), Noisy(20)


def later():
    return Later(72), Noisy(20)


def endless_test():
    return Noisy(72), DataLoader(Endless(), 12)


def tokens():
    return tuple(DataLoader(Tokens(n), 12, collate_fn=rows) for n in (72, 20))
"""


@pytest.mark.parametrize(("data", "more"), [("drawn", ""), ("drawn_stream", "steps_per_epoch = 6")])
def test_what_data_draws_from_a_generator_of_its_own_identifies_no_run(
    data: str, more: str, tmp_path: Path
) -> None:
    recipe = own(tmp_path, data, f"batch_size = 12\n{more}", ODD)
    assert data_digest(task_of(recipe)) == data_digest(task_of(recipe))


def test_a_batch_that_fails_later_is_an_error_that_says_where(tmp_path: Path) -> None:
    recipe = own(tmp_path, "later", "batch_size = 12", ODD)
    task = task_of(recipe)
    with pytest.raises(RecipeError, match=r"loss 'by default'.*Target 9 is out of bounds"):
        for batch in task.epoch(0):
            task.loss(task.model(), batch)


def test_a_test_stream_that_does_not_end_is_refused(tmp_path: Path) -> None:
    recipe = own(tmp_path, "endless_test", "batch_size = 12", ODD)
    with pytest.raises(RecipeError, match="test part has not ended after 1,000 batches"):
        check_schedules([(recipe, "low-rank")], task_of(recipe), 2)


def test_a_batch_may_be_any_mapping(tmp_path: Path) -> None:
    recipe = own(tmp_path, "tokens", "", ODD)
    task = task_of(recipe)
    batch = next(task.epoch(0))
    assert type(batch) is dict and batch["x"].shape == (12, 8)
    values = torch.cat([x.flatten() for x in task.test.digest()])
    assert len(values) > 20 * 9


def test_a_regression_loss_makes_the_target_of_a_table_real(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{i},{10 * (i % 5)}\n" for i in range(40)))
    recipe = own(tmp_path).with_settings({"data": "csv:a.csv", "loss": "mse", "batch_size": 8})
    target: Any = task_of(recipe).train.fields[1]
    assert target.is_floating_point() and target.max() == 40
