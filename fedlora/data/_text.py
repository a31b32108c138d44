"""The bytes of a file as text, or the sentence that says why they are none; and what a library says, on one line."""

from __future__ import annotations

import codecs

from fedlora.check import ConfigError

OTHERS = {  # first bytes → what the file is, and the cure
    codecs.BOM_UTF32_LE: ("UTF-32 text", "save it as UTF-8"),  # begins with the next one, so it comes first
    codecs.BOM_UTF32_BE: ("UTF-32 text", "save it as UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16 text", "save it as UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16 text", "save it as UTF-8"),
    b"PAR1": ("Parquet", "give its name the ending .parquet"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save it as CSV"),
    b"\x1f\x8b": ("gzip", "unpack it"),
    b"version https://git-lfs": ("a pointer of Git LFS in place of the data", "fetch the data by git lfs pull"),
}


def decoded(source: str, content: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises ConfigError, which says what else the bytes are, or where."""
    for start, (what, cure) in OTHERS.items():
        if content.startswith(start):
            raise ConfigError(f"{source} is {what}, by its first bytes; {cure}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 in line {_line(content, error.start)}; save it with that encoding") from error
    if "\0" in text:
        line = _line(content, content.index(b"\0"))
        raise ConfigError(f"{source} has a NUL byte in line {line}, which no text has; save it again, as UTF-8")
    return text


def one_line(error: BaseException, length: int = 200) -> str:
    """What an exception says, on one line and cut at `length` characters; its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= length else f"{said[: length - 1]}…"


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1
