"""Corpora: what is read, in which order, how it is split; and the standard library's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynarank.train import text_files
from dynarank.train.sources import DataError
from dynarank.train.text_files import TextData, load_split_text, load_text, standard_library


def text(part: Tensor) -> bytes:
    return bytes(part.tolist())


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def pieces(data: TextData) -> tuple[set[bytes], set[bytes]]:
    """Whole files of both parts."""
    train, test = (set(text(part).split(b"\0")) - {b""} for part in (data.train, data.test))
    return train, test


def test_files_are_held_out_whole(tmp_path: Path) -> None:
    files = {f"{i}.txt": f"file {i}: {'x' * (10 + i)}".encode() for i in range(40)}
    data = load_text(write(tmp_path, files), held_out=0.2)
    train, test = pieces(data)
    assert train | test == set(files.values()) and not train & test
    share = len(data.test) / (len(data.train) + len(data.test))
    assert 0.1 <= share <= 0.2 and data.files == 40
    assert text(data.train).endswith(b"\0") and text(data.test).endswith(b"\0")


def test_a_corpus_is_a_function_of_its_files(tmp_path: Path) -> None:
    files = {f"{i}.txt": bytes([65 + i]) * 50 for i in range(20)}
    one = load_text(write(tmp_path / "a", files))
    two = load_text(write(tmp_path / "b", dict(reversed(files.items()))))
    assert one.sha256 == two.sha256 and text(one.test) == text(two.test)
    changed = load_text(write(tmp_path / "b", {"3.txt": b"other"}))
    assert changed.sha256 != one.sha256
    wanted = hashlib.sha256(text(one.train) + text(one.test)).hexdigest()
    assert one.sha256 == wanted


def test_the_order_of_a_folders_listing_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, listed = (
        write(tmp_path, {f"{i}.txt": bytes([65 + i]) * 50 for i in range(20)}),
        Path.rglob,
    )
    wanted = load_text(place, max_bytes=600).sha256
    monkeypatch.setattr(Path, "rglob", lambda *arguments: reversed([*listed(*arguments)]))
    assert load_text(place, max_bytes=600).sha256 == wanted


def test_what_is_read(tmp_path: Path) -> None:
    place = write(
        tmp_path,
        {
            "a.txt": b"one",
            "below/b.md": b"two",
            "copy.txt": b"one",  # a content counts once
            "empty.txt": b"",
            "picture.png": b"no",
            ".hidden/c.txt": b"no",
            "tests/d.py": b"three",  # only the standard library's tests are left out
        },
    )
    data = load_text(place, held_out=0.5)
    train, test = pieces(data)
    assert train | test == {b"one", b"two", b"three"} and data.files == 3
    assert len(data.train) + len(data.test) == len(b"one0two0three0")
    train, test = pieces(load_text(place, patterns=["*.png"], held_out=0.5))
    assert train | test == {b"no"} or b"".join([*train, *test]) in (b"no", b"on")


def test_a_single_file_is_split_near_its_end(tmp_path: Path) -> None:
    content = bytes(range(1, 101)) * 10
    place = Path(write(tmp_path, {"input.data": content})) / "input.data"
    data = load_text(str(place), held_out=0.1)
    assert text(data.train) + text(data.test) == content + b"\0"
    assert len(data.test) == 100


def test_a_few_large_files_are_each_split_near_their_ends(tmp_path: Path) -> None:
    files = {"a.txt": b"a" * 1000, "b.txt": b"b" * 3000, "readme.txt": b"r"}
    data = load_text(write(tmp_path, files), held_out=0.1)
    assert text(data.test).count(b"a") == 99 and text(data.test).count(b"b") == 299
    assert text(data.train).count(b"a") == 901


@pytest.mark.parametrize("cap", [2, 10, 99, 100])
def test_the_cap_holds(tmp_path: Path, cap: int) -> None:
    place = write(tmp_path, {f"{i}.txt": bytes([65 + i]) * 20 for i in range(10)})
    data = load_text(place, max_bytes=cap)
    assert len(data.train) + len(data.test) <= cap


def test_the_standard_library_is_there_without_what_is_installed_beside_it() -> None:
    names = [path.relative_to(standard_library()) for path in text_files._files(
        standard_library(), ["*.py"], text_files._BESIDE
    )]  # fmt: skip
    assert len(names) > 300 and Path("argparse.py") in names
    assert not any(
        part in ("site-packages", "test", "tests") for name in names for part in name.parts
    )
    data = load_text(None, max_bytes=300_000)
    assert b"import" in text(data.train) and 250_000 < len(data.train) <= 300_000
    assert len(data.test) > 5_000 and len(data.sha256) == 64


def test_a_python_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"argparse.pyc": b"x", "site-packages/a.py": b"x"})
    monkeypatch.setattr(text_files, "standard_library", lambda: tmp_path)
    with pytest.raises(DataError, match=r"only compiled files; pass a folder of text with --data"):
        load_text(None)


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no files named \*\.txt, .* in .*: pass the folder"):
        load_text(write(tmp_path, {"picture.png": b"x"}))
    with pytest.raises(DataError, match="does not exist"):
        load_text(str(tmp_path / "absent"))


@pytest.mark.parametrize("options", [{"max_bytes": 1}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 2 and held_out between"):
        load_text(None, **options)  # type: ignore[arg-type]


def test_a_corpus_that_is_split_already(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("one " * 50)
    with pytest.raises(DataError, match="no valid, validation, val or test beside it"):
        load_split_text(tmp_path, max_bytes=1000, held_out=0.1)
    (tmp_path / "valid.txt").write_text("two " * 50)
    data = load_split_text(tmp_path, max_bytes=1000, held_out=0.1)
    assert bytes(data.train.tolist()) == b"one " * 50 + b"\0"
    assert bytes(data.test.tolist()) == (b"two " * 50)[:99] + b"\0"
    whole = load_split_text(tmp_path / "valid.txt", max_bytes=1000, held_out=0.1)
    assert torch.equal(whole.train, load_text(str(tmp_path / "valid.txt"), held_out=0.1).train)
