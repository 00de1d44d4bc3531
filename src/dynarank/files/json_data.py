"""JSON from files that anyone may have written: limits of size and depth, and one kind of error."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, read_bytes

__all__ = ["DamagedFileError", "dump_json", "parse_json", "read_json"]

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
_MAX_DIGITS, _MAX_BITS = 309, 1024  # of the largest float
# Possessive, so that a text without closing quotes takes linear time.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = b"[]{}"
_STEPS = bytes.maketrans(_BRACKETS, bytes([1, 255, 1, 255]))  # as signed bytes: 1, -1
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))


def parse_json(
    data: bytes | str,
    name: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nan: bool = False,
) -> Any:
    """Parse JSON, or say what is wrong with it.

    Args:
        data: the JSON, in UTF-8.
        name: of the file, for the message.
        max_bytes: the largest size that is parsed.
        max_depth: the deepest nesting of lists and objects.
        allow_nan: take ``NaN`` and ``Infinity``, and numbers beyond the largest float.

    Raises:
        DamagedFileError: it is too large or too deep, not UTF-8, not JSON, has a key twice in an
            object or an integer of more digits than the largest float.

    Example:
        >>> parse_json('{"rank": 4}', "config.json")
        {'rank': 4}
        >>> parse_json('{"rank": 4, "rank": 8}', "config.json")
        Traceback (most recent call last):
        dynarank.files.reading.DamagedFileError: config.json cannot be read: key 'rank' appears ...
    """
    try:
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        if len(raw) > max_bytes:
            raise _Unfit(f"it has {len(raw):,} bytes, at most {max_bytes:,} are read")
        if (depth := _depth(raw)) > max_depth:
            raise _Unfit(f"it is nested {depth:,} deep, at most {max_depth} are read")
        text = data if isinstance(data, str) else raw.decode("utf-8")
        return _decoder(allow_nan).decode(text)
    except UnicodeDecodeError as error:
        raise DamagedFileError(name, f"it is not UTF-8 at byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        problem = f"it is not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise DamagedFileError(name, problem) from error
    except (_Unfit, RecursionError, MemoryError) as error:
        raise DamagedFileError(name, str(error) or "it needs too much memory") from error


def read_json(
    path: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nan: bool = False,
) -> Any:
    """Read a JSON file with the limits of ``parse_json``; its size is checked before it is read.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a regular file (nor a link to one in its folder), or not JSON
            within the limits.

    Example:
        >>> path = getfixture("tmp_path") / "config.json"
        >>> _ = path.write_text('{"rank": 4}')
        >>> read_json(path)
        {'rank': 4}
    """
    data = read_bytes(path, max_bytes)
    return parse_json(
        data, str(path), max_bytes=max_bytes, max_depth=max_depth, allow_nan=allow_nan
    )


def dump_json(data: Any) -> str:
    """JSON of plain data, in their order and without spaces, which ``parse_json`` takes again.

    Raises:
        ValueError: a number is not finite or has more digits than the largest float, or the data
            are nested deeper than is read.
        TypeError: something is not plain data, or a key is not a string.

    Example:
        >>> dump_json({"b": [1.5], "a": None})
        '{"b":[1.5],"a":null}'
    """
    _check_plain(data)
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


class _Unfit(ValueError):
    """Why JSON is not taken."""


def _check_plain(data: Any) -> None:
    """Refuse what JSON would change (keys) and what would be refused when it is read."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH + 1):
        children: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str):
                        raise TypeError(f"key {key!r} of JSON data is not a string: make it one")
                children += value.values()
            elif isinstance(value, list | tuple):
                children += value
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise ValueError(f"an integer of {value.bit_length():,} bits: write it as text")
        if not (level := children):
            return
    raise ValueError(f"the data are nested deeper than {MAX_DEPTH}, which is not read again")


def _depth(raw: bytes) -> int:
    if raw.count(b"[") + raw.count(b"{") <= 1:
        return 1
    steps = array("b", _STRING.sub(b"", raw).translate(_STEPS, _OTHERS))
    return max(accumulate(steps), default=0)


def _decoder(allow_nan: bool) -> json.JSONDecoder:
    if allow_nan:
        return json.JSONDecoder(parse_int=_integer, object_pairs_hook=_once)
    return json.JSONDecoder(
        parse_float=_finite, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_once
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise _Unfit(f"key {printable(twice)!r} appears twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _Unfit(f"it has an integer of {len(text):,} digits, at most {_MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _Unfit(f"the number {printable(text, 40)} is larger than the largest float")
    return number


def _refuse(text: str) -> NoReturn:
    raise _Unfit(f"it has {text}, which is no JSON number")
