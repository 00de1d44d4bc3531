"""The problems of the training benchmark, on small made-up data in the official formats."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from made_up_glue import write_encoder, write_mrpc, write_rte, write_sst2, write_stsb

from benchmarks.training.problems.encoder import NAME, STSB, TunedRTE
from benchmarks.training.problems.problem import Problem
from benchmarks.training.problems.rows import fixed_order
from benchmarks.training.problems.sentences import MRPC, SST2
from benchmarks.training.problems.tabular import Table
from dynarank.train.glue_files import read_glue


def sst2(folder: Path) -> Problem:
    write_sst2(folder)
    return SST2(folder, epochs=2)


def mrpc(folder: Path) -> Problem:
    write_mrpc(folder)
    return MRPC(folder, valid=30)


def stsb(folder: Path) -> Problem:
    write_encoder(folder)
    write_stsb(folder)
    return STSB(folder, rows=36, valid=20)


def rte(folder: Path) -> Problem:
    write_encoder(folder)
    write_rte(folder)
    return TunedRTE(folder, rows=36, valid=20)


def table(folder: Path) -> Problem:
    return Table()


@pytest.fixture(params=[sst2, mrpc, table, stsb, rte], scope="module")
def problem(request, tmp_path_factory) -> Problem:
    make: Callable[[Path], Problem] = request.param
    return make(tmp_path_factory.mktemp("data"))


def same(one, other) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_batch_depends_on_seed_and_step_only(problem):
    first = problem.batch(3, 1)
    torch.manual_seed(99)
    problem.batch(4, 0)
    assert same(first, problem.batch(3, 1))
    assert not same(first, problem.batch(4, 1))
    assert not same(first, problem.batch(3, 0))


def test_an_epoch_shows_no_row_twice(problem):
    seen = torch.cat([problem.indices(0, step) for step in range(problem.epoch_steps)])
    assert len(seen.unique()) == len(seen) == problem.epoch_steps * problem.batch_size


def test_all_batches_have_the_shapes_of_the_first(problem):
    shapes = [[part.shape for part in tree_leaves(problem.batch(0, s))] for s in range(2)]
    assert shapes[0] == shapes[1]


def rows(problem, part) -> set[tuple[float, ...]]:
    inputs = problem.parts[part][0]
    return {tuple(row.flatten().tolist()) for row in inputs}


def test_parts_do_not_overlap(problem):
    train, valid, test = (rows(problem, part) for part in ("train", "valid", "test"))
    assert not train & valid and not train & test and not valid & test


def test_testing_gives_the_mode_of_the_model_back(problem):
    model = problem.model(0)
    found = problem.test(model, "valid")
    assert model.training
    assert math.isfinite(found["loss"]) and 0 <= found[problem.metric] <= 100
    model.eval()
    problem.test(model, "test")
    assert not model.training


def test_testing_covers_every_row(problem):
    for part in ("valid", "test"):
        count = sum(len(targets) for _, targets in problem.held_out(part))
        assert count == len(problem.parts[part][-1])


def test_a_seed_determines_the_model(problem):
    one, other = (problem.model(0).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_narrower_network_has_fewer_parameters(problem):
    if not problem.narrowable:
        pytest.skip("a pretrained network has its width")
    half, whole = (sum(p.numel() for p in problem.model(0, w).parameters()) for w in (0.5, 1.0))
    assert half < whole


def test_a_step_trains(problem):
    model = problem.model(0)
    optimizer = problem.optimizer(model, 3e-4)
    batch = problem.batch(0, 0)
    before = problem.training_loss(model, batch)
    for _ in range(10):
        optimizer.zero_grad()
        problem.backward(model, batch)
        optimizer.step()
    assert problem.training_loss(model, batch) < before


def test_gradients_are_clipped_where_a_problem_says_so(problem, monkeypatch):
    norms = []
    for most in (None, 1e-3):
        monkeypatch.setattr(problem, "max_norm", most)
        model = problem.model(0)
        problem.backward(model, problem.batch(0, 0))
        norms.append(get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_phrases_of_validation_sentences_are_not_trained_on(tmp_path):
    write_sst2(tmp_path)
    problem = SST2(tmp_path)
    lengths = {part: (tokens[0] != 0).sum(1) for part, tokens in problem.parts.items()}
    assert len(problem.parts["valid"][-1]) == 40  # the whole sentences
    assert len(problem.parts["train"][-1]) == 40  # of their phrases only the shorter ones
    assert lengths["valid"].min() > lengths["train"].max()


def test_accuracy_and_f1_of_pairs(tmp_path):
    problem = mrpc(tmp_path)
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = problem.score(logits, torch.tensor([1, 0, 0, 0]))
    assert found["accuracy"] == pytest.approx(75)
    assert found["f1"] == pytest.approx(200 / 3)


def test_the_fixed_order_is_a_shuffle_that_never_changes():
    assert fixed_order(5).tolist() == [2, 4, 3, 0, 1] == fixed_order(5).tolist()


def test_correlations_of_scores(tmp_path):
    problem = stsb(tmp_path)
    found = problem.score(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.0, 0.5, 1.0]))
    assert found["spearman"] == pytest.approx(100)
    assert found["pearson"] == pytest.approx(91.7663, abs=1e-3)
    assert found["loss"] == pytest.approx((0.01 + 0.09 + 0.01) / 3)


def test_padding_does_not_change_a_sentence(tmp_path):
    problem = stsb(tmp_path)
    longer = STSB(tmp_path, rows=36, valid=20)
    longer.length = 40
    longer.parts["test"] = longer.encoded(read_glue("stsb", tmp_path).test)
    model = problem.model(0)
    one, other = (p.outputs(model, next(iter(p.held_out("test")))[0]) for p in (problem, longer))
    assert torch.allclose(one, other, atol=0.02)  # in bf16


def test_the_encoder_is_where_the_environment_says(tmp_path, monkeypatch):
    write_encoder(tmp_path)
    write_stsb(tmp_path)
    (tmp_path / NAME).rename(tmp_path / "elsewhere")
    monkeypatch.delenv("DYNARANK_ENCODER", raising=False)
    with pytest.raises(FileNotFoundError, match="DYNARANK_ENCODER"):
        STSB(tmp_path)
    monkeypatch.setenv("DYNARANK_ENCODER", str(tmp_path / "elsewhere"))
    assert len(STSB(tmp_path, rows=36, valid=20).parts["valid"][-1]) == 20


def test_embeddings_are_frozen(tmp_path):
    problem = rte(tmp_path)
    model = problem.model(0)
    named = dict(model.named_parameters())
    frozen = {name for name, p in named.items() if not p.requires_grad}
    assert frozen == {name for name in named if name.startswith("bert.embeddings.")}
    held = [p for group in problem.optimizer(model, 0.1).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for n, p in named.items() if n not in frozen}
