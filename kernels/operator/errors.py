"""What reading a file raises, in words that are fit to print: what a file says stands in them, and may be
anything."""

import re
from contextlib import contextmanager
from pathlib import Path

MESSAGE, NAME = 2000, 200  # characters that a text and one word of it may have
_LONG = re.compile(rf"\S{{{NAME + 1},}}")


class NamedError(ValueError):
    """An error that names the file, or what in it, and what was expected. Its text is bounded and has no
    control characters."""

    def __init__(self, text: object = ""):
        super().__init__(sentence(str(text)))


@contextmanager
def naming(path: Path, but: type[Exception] | tuple[type[Exception], ...] = ()):
    """What is found wrong within names the file `path`, too, with the type that it has; but: types that name
    another file. Errors of others, such as PyTorch's, become a NamedError."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, but) or str(path) in str(error):
            raise
        if type(error).__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise NamedError(f"{path}: {error}") from error
        error.args = (f"{path}: {error}",)
        raise


def plain(text: str, keep: str = "") -> str:
    """The text with everything that is not printed, control characters, marks of direction and broken
    surrogates, as in Python's strings; keep: what stays, such as line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shortened(text: str, most: int = NAME) -> str:
    """The text, cut in its middle where it has over `most` characters: both ends of a name say something."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[len(text) - tail :]}"


def sentence(text: str, keep: str = "") -> str:
    """What an error says: `plain`, no word longer than NAME but for those of the path in front, and MESSAGE
    characters in all."""
    path, colon, rest = plain(shortened(text, 8 * MESSAGE), keep).partition(": ")
    if not colon:
        path, rest = "", path
    return shortened(path + colon + _LONG.sub(lambda word: shortened(word[0]), rest), MESSAGE)
