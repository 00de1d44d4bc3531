"""JSON objects that carry a checksum of themselves, so that a change of any bit is noticed.

The last member, ``"crc"``, is the CRC-32 of all bytes before it. The text stays plain JSON for
everyone else's tools. An object without it, such as one of an older version, is taken as it is.
"""

from __future__ import annotations

import re
import zlib

__all__ = ["sealed", "unsealed"]

_KEY = b"crc"
_TAIL = 64  # bytes; more than a seal takes
# Any key and value of a seal's lengths, since these can be damaged too.
_SEAL = re.compile(rb',(?:\n  )?"(...)": ?"(.{8})"\n?\}\n?\Z', re.DOTALL)


def sealed(text: str) -> str:
    """Add the checksum to the text of a JSON object with at least one member.

    Example:
        >>> sealed('{"rank":4}')
        '{"rank":4,"crc":"6202301c"}'
    """
    body = text.rstrip().removesuffix("}").rstrip()
    checksum = f"{zlib.crc32(body.encode()):08x}"
    if "\n" in body:
        return f'{body},\n  "crc": "{checksum}"\n}}'
    return f'{body},"crc":"{checksum}"}}'


def unsealed(data: bytes) -> bytes:
    """The JSON object without its checksum, once that is found to be right.

    Raises:
        ValueError: it does not match.

    Example:
        >>> unsealed(b'{"rank":4,"crc":"6202301c"}')
        b'{"rank":4}'
        >>> unsealed(b'{"rank":8,"crc":"6202301c"}')
        Traceback (most recent call last):
        ValueError: it does not match its checksum: it has changed since it was written
    """
    start = max(len(data) - _TAIL, 0)
    found = _SEAL.search(data, start)
    if found is None and b'"crc"' not in data[start:]:
        return data
    body = data[: found.start()] if found else b""
    if found is None or found[1] != _KEY or found[2] != b"%08x" % zlib.crc32(body):
        raise ValueError("it does not match its checksum: it has changed since it was written")
    return body + b"}"
