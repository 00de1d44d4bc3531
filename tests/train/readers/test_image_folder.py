"""Folders of images: splits, sizes, damage, transforms."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dynarank.train.readers import image_folder
from dynarank.train.readers.image_folder import read
from dynarank.train.sources import DataError

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path)


def tree(root: Path, mode: str = "RGB") -> Path:
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                ending = "jpg" if i % 2 else "png"
                picture(root / part / name / f"{i}.{ending}", mode=mode, seed=10 * i + label)
    return root


def test_train_and_test_folders(tmp_path: Path) -> None:
    tree(tmp_path / "pets")
    train, test = read("pets", tmp_path)
    assert (len(train), len(test), train.classes) == (12, 4, [0, 1])
    images, labels = (torch.stack(x) for x in zip(*train, strict=True))
    assert images.shape == (12, 3, 6, 8) and labels.tolist() == [0] * 6 + [1] * 6
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    gray = read(str(tree(tmp_path / "gray", "L")), tmp_path)[0]
    assert gray[0][0].shape == (1, 6, 8)
    assert read("pets", tmp_path, size=[4, 5])[0][0][0].shape == (3, 4, 5)


def test_one_tree_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    train, test = read(str(tree(tmp_path) / "train"), tmp_path, test_share=1 / 3)
    assert test.labels.bincount().tolist() == [2, 2] and not {*train.paths} & {*test.paths}
    assert read("train", tmp_path, test_share=1 / 3)[1].paths == test.paths


def test_what_is_not_kept_in_memory_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = read(str(tree(tmp_path)), tmp_path)[0]
    monkeypatch.setattr(image_folder, "_IN_MEMORY", 0)
    lazy = read(".", tmp_path)[0]
    assert lazy.pixels is None and all(torch.equal(lazy[i][0], kept[i][0]) for i in range(12))


def test_augmentation_draws_from_torch(tmp_path: Path) -> None:
    train, test = read(str(tree(tmp_path)), tmp_path, augment=True)
    drawn = [(torch.manual_seed(seed), train[0][0])[1] for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])
    assert torch.equal(test[0][0], test[0][0]) and drawn[0].shape == (3, 6, 8)


def test_what_is_wrong_names_the_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "a")

    def told(match: str, **options: object) -> None:
        with pytest.raises(DataError, match=match):
            read("a", tmp_path, **options)  # type: ignore[arg-type]

    told("size must be a number of pixels", size=[1, 2, 3])
    picture(root / "train" / "cat" / "9.png", (5, 5))
    told(r"9.png has 5x5 pixels, .*0.png 8x6; set size")
    path = root / "train" / "cat" / "9.png"
    path.write_bytes(b"no image")
    told(r"9.png cannot be read as an image")
    picture(path)
    path.write_bytes(path.read_bytes()[:90])
    told(r"9.png cannot be read as an image.*damaged")
    path.unlink()
    picture(root / "val" / "cow" / "1.png")
    told("has the class 'cow', which .*train has not")
    shutil.rmtree(root / "val")
    told("has train/ but none of test, val")
    shutil.rmtree(root / "train" / "dog")
    (root / "val").mkdir()
    told("a folder for each of 2 or more classes; it contains cat/")
    (root / "train" / "dog").mkdir()
    told("dog has no images")
    with pytest.raises(DataError, match=r"absent does not exist"):
        read("absent", tmp_path)
