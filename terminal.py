"""What a program shows: text that is safe to print, and output that may go away before the program ends."""


def printable(text):
    """Return text with every control character, line break and lone surrogate as an escape such as \\x1b.

    For names and values that come from files: printed as they are, they could move the cursor, write the
    clipboard, or add a line to an error.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
