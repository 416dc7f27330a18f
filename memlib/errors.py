"""Messages that fit in one line, and names that have changed."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches

# diffusers' and transformers' lazy imports: the reason is in a later line or in the cause
ANNOUNCED = re.compile(r":$|^Could not import module")


class ModelError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


def short(value: object, most: int = 80) -> str:
    """A value's text in one line of at most `most` characters; the middle of a longer one goes."""
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2 - 1]}…{text[-(most // 2 - 1) :]}"
    return "".join(c if c.isprintable() else " " for c in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """`": did you mean 'ddim'?"` or, where nothing is near, the list of valid names."""
    valid = [str(v) for v in valid]
    match = get_close_matches(str(name), valid, 1, 0.5)
    return f": did you mean {match[0]!r}?" if match else f"; valid are {', '.join(valid)}"


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing: one line.

    That is its first line; where this only announces another error ("Failed to import ... because
    of the following error:"), the last line of the innermost cause.
    """
    first = _lines(error)[0]
    if not ANNOUNCED.search(first):
        return first
    while error.__cause__:
        error = error.__cause__
    return _lines(error)[-1].strip()


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def renamed(**names: str) -> Callable:
    """A decorator: the function still takes these arguments by their old names, with a warning."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **given):
            for old in names.keys() & given.keys():
                warn_renamed(f"the argument {old}=", f"{names[old]}=")
                given[names[old]] = given.pop(old)
            return function(*args, **given)

        return call

    return decorate


def warn_renamed(old: str, new: str) -> None:
    """Say once that a name goes with the next version, where the caller's code has it."""
    warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=3)
