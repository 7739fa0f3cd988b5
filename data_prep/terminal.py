"""What is printed: names and texts of strangers stand in it, and none of them may drive the terminal or forge a line."""

import sys


def printable(text: str) -> str:
    r"""Returns a text whose characters are all seen: others, line ends included, are written as escapes such as `\x1b`.

    So are those that standard output can't write in its encoding.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return seen.encode(encoding, "backslashreplace").decode(encoding)


def error_line(error: Exception) -> str:
    """Returns the line that a command ends with."""
    return f"error: {printable(' '.join(str(error).split()))}"
