import os
import re
import sys
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from dynarank.sinks.extras import install_command
from dynarank.train.data import (
    ImageData,
    _shifted,
    limit,
    limit_test,
    load_cifar10,
    load_cifar100,
    load_digits_data,
    load_shifted_digits,
)


def test_digits_shapes_balance_and_split() -> None:
    data = load_digits_data()
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    assert data.test_labels.bincount().min() >= 34 and data.test_labels.bincount().max() <= 37
    assert data.test_labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert data.classes == 10


def test_digits_are_normalized_and_constant_pixels_do_not_blow_up() -> None:
    data = load_digits_data()
    mean, std = data.train_images.mean(0), data.train_images.std(0, correction=0)
    assert mean.abs().max() < 1e-5
    assert std.max() < 1 + 1e-5 and (std > 0.999).sum() > 48
    assert std[0, 0, 0] == 0  # a pixel that is always blank stays 0
    assert data.train_images.abs().max() < 20 and data.test_images.abs().max() < 20


def test_digits_do_not_depend_on_global_random_state() -> None:
    np.random.seed(1)
    first = load_digits_data()
    np.random.seed(2)
    assert torch.equal(first.train_images, load_digits_data().train_images)


@pytest.mark.parametrize("load", [load_digits_data, load_shifted_digits])
def test_digits_without_scikit_learn(
    load: Callable[[], ImageData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=re.escape(install_command("demo"))):
        load()


def test_shifted_digits_have_a_fixed_split_and_leave_the_random_state() -> None:
    state, data = torch.get_rng_state(), load_shifted_digits()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(data.test_images, load_shifted_digits().test_images)
    assert data.train_images.shape == (4 * 897, 1, 12, 12)
    assert data.test_images.shape == (4 * 900, 1, 12, 12)
    assert data.train_images.dtype == torch.float32 and data.train_images.abs().max() < 20
    assert (data.test_labels.view(4, 900) == data.test_labels[:900]).all()
    assert data.test_labels.bincount().min() >= 4 * 87 and data.classes == 10


def test_every_shifted_digit_is_whole_and_is_at_every_position() -> None:
    digit = np.arange(1, 65, dtype=np.uint8).reshape(1, 1, 8, 8)
    seen: set[tuple[int, int]] = set()
    for image in _shifted(digit.repeat(100, 0), stream=0)[:, 0]:
        y, x = np.argwhere(image)[0]
        assert np.array_equal(image[y : y + 8, x : x + 8], digit[0, 0])
        seen.add((int(y), int(x)))
    assert seen == set(product(range(5), repeat=2))


def fake(labels: list[int]) -> ImageData:
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1)
    return ImageData(images, torch.tensor(labels), images[:1], torch.tensor([0]), 3)


def test_limit_is_balanced_nested_and_fixed() -> None:
    data = fake([0] * 50 + [1] * 30 + [2] * 4)
    taken = [limit(data, n) for n in range(1, 85)]
    for n, some in enumerate(taken, 1):
        chosen = some.train_images.flatten().long()
        assert len(chosen) == n == len(set(chosen.tolist()))
        assert torch.equal(data.train_labels[chosen], some.train_labels)
        assert torch.equal(chosen, taken[-1].train_images.flatten().long()[:n])
        assert some.test_images is data.test_images
    assert taken[11].train_labels.bincount().tolist() == [4, 4, 4]
    assert taken[23].train_labels.bincount().tolist() == [10, 10, 4]
    assert sorted(taken[-1].train_images.flatten().tolist()) == list(range(84))
    zeros = chosen[taken[-1].train_labels == 0]  # shuffled within a class too
    assert not torch.equal(zeros, zeros.sort().values)


def test_limit_leaves_values_and_global_random_state() -> None:
    data, state = load_digits_data(), torch.get_rng_state()
    some = limit(data, 100)
    assert torch.equal(state, torch.get_rng_state())
    assert some.train_labels.bincount().tolist() == [10] * 10
    rows = {tuple(image.flatten().tolist()) for image in data.train_images}
    assert all(tuple(image.flatten().tolist()) in rows for image in some.train_images)


@pytest.mark.parametrize("wrong", [0, -1, 5])
def test_limit_out_of_range(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"{wrong} training images.*request 1 to 4"):
        limit(fake([0, 1, 2, 0]), wrong)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DYNARANK_DATA"), reason="DYNARANK_DATA is not set")
def test_real_cifar10() -> None:
    data = load_cifar10(None)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [5_000] * 10
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.train_labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]  # the official order
    assert data.train_images.mean(0).abs().max() < 1e-4
    assert (data.train_images.std(0) - 1).abs().max() < 1e-3


def test_limit_of_the_test_images_is_the_same_choice() -> None:
    data = fake([0, 1, 2, 0])
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    images = torch.arange(84).float().view(-1, 1, 1, 1)
    other = ImageData(data.train_images, data.train_labels, images, labels, 3)
    some, wanted = limit_test(other, 12), limit(fake(labels.tolist()), 12)
    assert torch.equal(some.test_images, wanted.train_images)
    assert torch.equal(some.test_labels, wanted.train_labels)
    assert some.train_images is data.train_images
    with pytest.raises(ValueError, match=r"85 test images.*request 1 to 84"):
        limit_test(other, 85)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DYNARANK_DATA"), reason="DYNARANK_DATA is not set")
def test_real_cifar100() -> None:
    data = load_cifar100(None)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [500] * 100
    assert data.test_labels.bincount().tolist() == [100] * 100
    assert data.train_images.mean(0).abs().max() < 1e-4
