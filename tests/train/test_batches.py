import doctest

import pytest
import torch

from dynarank.train import batches as module
from dynarank.train.batches import Batches, crop_and_flip

N = 50


def numbered(**options: object) -> Batches:
    """Batches of images whose every pixel, like the label, is the image's number."""
    labels = torch.arange(N)
    images = labels.float().view(N, 1, 1, 1).expand(N, 3, 6, 5).contiguous()
    return Batches(images, labels, **{"batch_size": 8, "seed": 0, **options})  # type: ignore[arg-type]


def random_images(**options: object) -> Batches:
    images = torch.rand(N, 3, 6, 5, generator=torch.Generator().manual_seed(0)) + 1
    return Batches(images, torch.arange(N), **{"batch_size": 8, "seed": 0, **options})  # type: ignore[arg-type]


def order(batches: Batches, epoch: int) -> list[int]:
    return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()


def same(a: Batches, b: Batches, epoch: int = 0, other_epoch: int | None = None) -> bool:
    pairs = zip(a.epoch(epoch), b.epoch(epoch if other_epoch is None else other_epoch), strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def naive(images: torch.Tensor, offsets: list[list[int]], flips: list[bool]) -> torch.Tensor:
    out = torch.zeros_like(images)
    for n, image in enumerate(images):
        (top, left), (channels, height, width) = offsets[n], image.shape
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    y, x = i + top - 4, (width - 1 - j if flips[n] else j) + left - 4
                    if 0 <= y < height and 0 <= x < width:
                        out[n, c, i, j] = image[c, y, x]
    return out


def test_crops_match_a_naive_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 2, 6, 7, generator=generator)
    offsets = torch.randint(0, 9, (40, 2), generator=generator)
    offsets[:3] = torch.tensor([[0, 0], [8, 8], [0, 8]])
    flips = torch.randint(0, 2, (40,), generator=generator).bool()
    wanted = naive(images, offsets.tolist(), flips.tolist())
    assert torch.equal(crop_and_flip(images, offsets, flips), wanted)


def test_middle_offset_without_flip_is_the_image() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    middle, none = torch.full((4, 2), 4), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(crop_and_flip(images, middle, none), images)
    assert torch.equal(crop_and_flip(images, middle, ~none), images.flip(3))


def test_augmented_epoch_is_the_naive_one() -> None:
    """Epoch and images go together: every batch is its images, cropped by the epoch's draws."""
    batches = random_images(augment=True)
    draws = batches._draws(3)
    for step, (images, labels) in enumerate(batches.epoch(3)):
        rows = slice(step * 8, step * 8 + 8)
        offsets, flips = draws.offsets[rows].tolist(), draws.flips[rows].tolist()
        assert torch.equal(images, naive(batches.images[labels], offsets, flips))


def test_draws_are_uniform() -> None:
    images = torch.zeros(20_000, 1, 1, 1)
    draws = Batches(images, torch.arange(20_000), 10, seed=0, augment=True)._draws(0)
    assert draws.offsets is not None and draws.flips is not None
    for axis in range(2):
        counts = draws.offsets[:, axis].bincount(minlength=9)
        assert len(counts) == 9 and (counts - 20_000 / 9).abs().max() < 250
    assert abs(draws.flips.float().mean() - 0.5) < 0.02


@pytest.mark.parametrize("augment", [False, True])
def test_every_image_once_an_epoch(augment: bool) -> None:
    batches = numbered(batch_size=10, augment=augment)
    assert len(batches) == 5
    for epoch in range(3):
        assert sorted(order(batches, epoch)) == list(range(N))


def test_images_go_with_their_labels() -> None:
    for images, labels in numbered().epoch(1):
        assert torch.equal(images[:, 0, 0, 0].long(), labels) and images.shape == (8, 3, 6, 5)


def test_last_images_are_dropped() -> None:
    batches = numbered()
    assert len(batches) == 6 == len(list(batches.epoch(0)))
    assert len(set(order(batches, 0))) == 48


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_is_a_function_of_seed_and_epoch(shuffle: str, augment: bool) -> None:
    a, b = (random_images(seed=7, shuffle=shuffle, augment=augment) for _ in range(2))
    later = list(a.epoch(5))  # in another order, with other draws between
    assert same(a, b, 0) and same(a, b, 5) and later[0][0].equal(next(b.epoch(5))[0])
    assert not same(a, random_images(seed=8, shuffle=shuffle, augment=augment))


def test_epochs_differ() -> None:
    batches = numbered()
    orders = {tuple(order(batches, epoch)) for epoch in range(5)}
    assert len(orders) == 5 and tuple(range(48)) not in orders


def test_once_repeats_the_first_epochs_order_but_not_its_crops() -> None:
    once = random_images(shuffle="once", augment=True)
    assert order(once, 0) == order(once, 1) == order(once, 9) == order(numbered(), 0)
    assert not same(once, once, 0, 1)


def test_order_and_augmentation_are_drawn_from_streams_of_their_own() -> None:
    seeds, streams, epochs = range(5), (module._ORDER, module._AUGMENTATION), range(5)
    keys = [(s, t, e) for s in seeds for t in streams for e in epochs]
    assert len({module.epoch_generator(*key).initial_seed() for key in keys}) == 50


def test_augmenting_does_not_change_the_order() -> None:
    assert order(numbered(), 4) == order(numbered(augment=True), 4)


def test_resuming_within_an_epoch() -> None:
    batches = random_images(augment=True)
    whole = list(batches.epoch(2))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(2, start=start))
        assert len(rest) == len(batches) - start
        for (images, labels), (x, y) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, x) and torch.equal(labels, y)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = list(random_images(augment=True).epoch(0))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again = random_images(augment=True).epoch(0)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(first, again, strict=True))


@pytest.mark.parametrize("augment", [False, True])
def test_memory_format(augment: bool) -> None:
    plain = random_images(augment=augment)
    last = random_images(augment=augment, memory_format=torch.channels_last)
    for (x, _), (u, _) in zip(plain.epoch(0), last.epoch(0), strict=True):
        assert torch.equal(x, u) and x.is_contiguous()
        assert u.is_contiguous(memory_format=torch.channels_last) and not u.is_contiguous()


def test_training_images_are_not_changed() -> None:
    batches = random_images(augment=True)
    before = batches.images.clone()
    for images, _ in batches.epoch(0):
        images.zero_()
    assert torch.equal(before, batches.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "batch_size must be from 1 to the number of images, 50, got 51"),
        ({"batch_size": 0}, "number of images, 50, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"shuffle": "never"}, "'epoch' or 'once', got 'never'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered(**options)


def test_wrong_tensors() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5,\)"):
        Batches(torch.zeros(5, 3), torch.zeros(5), 1, seed=0)
    with pytest.raises(ValueError, match=r"\(5, 3, 2, 2\) and \(4,\)"):
        Batches(torch.zeros(5, 3, 2, 2), torch.zeros(4), 1, seed=0)
    with pytest.raises(ValueError, match="on meta and cpu"):
        Batches(torch.zeros(5, 3, 2, 2, device="meta"), torch.zeros(5), 1, seed=0)


def test_wrong_epochs_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        numbered().epoch(-1)
    with pytest.raises(ValueError, match="start must be from 0 to the number of batches, 6, got 7"):
        numbered().epoch(0, start=7)


def test_example() -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}) == (0, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_same_batches_and_no_waiting() -> None:
    here = random_images(augment=True, memory_format=torch.channels_last)
    there = Batches(
        here.images.cuda(),
        here.labels.cuda(),
        8,
        seed=0,
        augment=True,
        memory_format=torch.channels_last,
    )
    batches = there.epoch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (u, v) in zip(here.epoch(0), found, strict=True):
        assert torch.equal(x, u.cpu()) and torch.equal(y, v.cpu()) and u.is_cuda
