"""Makes text printable: names and texts come from files of others and must not control the terminal or forge a line."""

import sys


def printable(text: str) -> str:
    r"""Returns a text with invisible characters, line ends included, replaced by escapes such as `\x1b`.

    Characters that standard output can't write in its encoding are replaced in the same way.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return seen.encode(encoding, "backslashreplace").decode(encoding)


def error_line(error: Exception) -> str:
    """Returns the line that a command prints when it ends with an error."""
    return f"error: {printable(' '.join(str(error).split()))}"
