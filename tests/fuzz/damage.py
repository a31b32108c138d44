"""Damage to bytes, to JSON and to files, from a seed: what a disk, an editor or a stranger may do to them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STRANGE = (  # where something else belongs
    None, True, -1, 0, 1, 2, 0.5, 10**30, 10**400, 1e308, math.inf, math.nan, "x", "record", "", [], {}, [1], {"a": 1}, [[]],
    "9" * 5000,
)  # fmt: skip

OTHERS = (b"null", b"[]", b"{}", b"[" * 20_000, b"1e999", b"NaN", b'"x"', b"9" * 5000, b"\xff\xfe", bytes(2000))


def file(path: Path, rng: random.Random) -> None:
    """Damage what is in the file; or put nothing, a folder, a link or another file of its folder in its place."""
    how = rng.choice(("content",) * 9 + ("gone", "folder", "link", "other"))
    content, others = path.read_bytes(), [other for other in files(path.parent) if other != path]
    if how == "other" and others:
        content = rng.choice(others).read_bytes()
    elif how == "content":
        content = damaged(content, rng)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(rng.choice((path.parent / "nowhere", path.parent, *others)))
    elif how != "gone":
        path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    """Those that can be damaged, always in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with a bit flipped, cut off, grown, emptied, or, of JSON, with a value of another kind in some place."""
    kind = rng.choice(("flip", "flip", "cut", "grow", "empty", "other", "value", "value", "value"))
    place = rng.randrange(len(content) + 1)
    if kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "grow":
        return content[:place] + rng.randbytes(rng.randrange(1, 40)) + content[place:]
    if kind == "empty":
        return b""
    if kind == "other":
        return rng.choice(OTHERS)
    return _other_value(content, rng) or content[:-1]


def _other_value(content: bytes, rng: random.Random) -> bytes:
    """JSON, or a line of it, with one value replaced or removed; nothing where there is none to replace."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    for part, put in ((content, lambda new: new), (lines[number], lambda new: b"\n".join(_with(lines, number, new)))):
        try:
            whole = json.loads(part)
        except ValueError:
            continue
        if places := list(_places(whole)):
            holder, key = rng.choice(places)
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = rng.choice(STRANGE)
            return put(json.dumps(whole).encode())
    return b""


def _with(lines: list[bytes], number: int, new: bytes) -> list[bytes]:
    return [*lines[:number], new, *lines[number + 1 :]]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in the value with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)
