from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from dynarank.files.json_data import dump_json, parse_json, read_json
from dynarank.files.reading import DamagedFileError

REFUSED = {
    "empty": (b"", "not JSON at line 1"),
    "cut": (b'{"a": 1', "not JSON at line 1, column 8"),
    "two values": (b"1 2", "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "NUL": (b"{}\0", "not JSON"),
    "key twice": (b'{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice"),
    "key twice below": (b'[{"x": {"\\u0061": 1, "a": 2}}]', "key 'a' appears twice"),
    "NaN": (b"[NaN]", "NaN, which is no JSON number"),
    "Infinity": (b"-Infinity", "-Infinity, which is no JSON number"),
    "too large a float": (b"1e999", "1e999 is larger than the largest float"),
    "too long an integer": (b"1" * 310, "an integer of 310 digits, at most 309"),
    "deep lists": (b"[" * 65 + b"]" * 65, "nested 65 deep, at most 64"),
    "deep objects": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "nested 2,000 deep"),
    "never closed": (b"[" * 100_000, "nested 100,000 deep"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("text", [False, True])
def test_what_is_refused(kind: str, text: bool) -> None:
    data, problem = REFUSED[kind]
    if text and "UTF" in problem:
        pytest.skip("text is decoded already")
    with pytest.raises(DamagedFileError) as caught:
        parse_json(data.decode() if text else data, "a.json")
    assert problem in str(caught.value) and str(caught.value).startswith("a.json cannot be read")


@pytest.mark.parametrize(
    "data",
    [
        [[]],
        {"a": [1, -2.5, None, True, 'é"[\\{\n', 2**128]},
        ["[" * 1000 + '"' * 3 + "\\" * 5, "]{"],
        [[[{"a": [{}]}]]] * 3,
        "alone",
    ],
)
def test_what_is_read(data: Any) -> None:
    for text in (dump_json(data), json.dumps(data, indent=2), json.dumps(data, ensure_ascii=False)):
        assert parse_json(text, "a.json") == parse_json(text.encode(), "a.json") == data


def test_what_is_not_finite_is_read_on_request() -> None:
    found = parse_json("[NaN, Infinity, -Infinity, 1e999]", "a.json", allow_nan=True)
    assert math.isnan(found[0]) and found[1:] == [math.inf, -math.inf, math.inf]


def test_limits_are_arguments() -> None:
    assert parse_json("[[[]]]", "a", max_depth=3) == [[[]]]
    with pytest.raises(DamagedFileError, match="nested 3 deep, at most 2"):
        parse_json("[[[]]]", "a", max_depth=2)
    with pytest.raises(DamagedFileError, match="6 bytes, at most 5"):
        parse_json("[[[]]]", "a", max_bytes=5)


def test_a_key_of_any_text_makes_a_short_printable_message() -> None:
    key = "\x1b[31m" + "x" * 100_000 + "\u202e"
    text = f'{{"{key}": 1, "{key}": 2}}'.replace("\x1b", "\\u001b")
    with pytest.raises(DamagedFileError) as caught:
        parse_json(text, "a\n.json")
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_only_regular_files_of_the_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (folder / "real.json").write_text("[1]")
    (folder / "inside.json").symlink_to("real.json")
    assert read_json(folder / "real.json") == read_json(folder / "inside.json") == [1]
    (tmp_path / "secret.json").write_text("[2]")
    (folder / "outside.json").symlink_to("../secret.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "loop.json").symlink_to("loop.json")
    os.mkfifo(folder / "pipe.json")
    for name, problem in {
        "outside.json": "symbolic link out of its folder",
        "zero.json": "symbolic link out of its folder",
        "loop.json": "symbolic link",
        "pipe.json": "not a regular file",
        "sub": "not a regular file",
    }.items():
        with pytest.raises(DamagedFileError, match=problem) as caught:
            read_json(folder / name)
        assert name in str(caught.value)
    for path in (folder / "nothing.json", folder / "nowhere" / "a.json"):
        with pytest.raises(FileNotFoundError):
            read_json(path)
    with pytest.raises(DamagedFileError, match="not a regular file"):
        read_json(Path("/dev/null"))


def test_the_size_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFileError, match=r"1,099,511,627,776 bytes, at most 67,108,864"):
        read_json(path)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({1: 2}, TypeError),
        ([{"a": {None: 1}}], TypeError),
        ([float("nan")], ValueError),
        ([10**309], ValueError),
        ({1, 2}, TypeError),
    ],
)
def test_what_would_not_be_read_again_is_not_dumped(data: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        dump_json(data)


def test_data_that_contain_themselves_are_not_dumped() -> None:
    data: list[Any] = []
    data.append(data)
    with pytest.raises(ValueError, match="nested deeper than 64"):
        dump_json(data)
    deepest: Any = 1
    for _ in range(64):
        deepest = [deepest]
    assert parse_json(dump_json(deepest), "a") == deepest
    with pytest.raises(ValueError, match="nested deeper than 64"):
        dump_json([deepest])
