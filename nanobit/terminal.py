"""What a program shows: text that is safe to print, and output that may go away before the program ends."""

import errno
import os
import shlex
import subprocess
import sys


def printable(text):
    """Return text with control characters, line breaks and lone surrogates as escapes such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(line):
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


# a program that was started with a closed stdout or stderr has none
sys.stdout = sys.stdout or open(os.devnull, "w")
sys.stderr = sys.stderr or open(os.devnull, "w")


class Lossy:
    """A text stream that drops what cannot be written (a closed terminal or pipe, a full disk)."""

    errors = (OSError, ValueError)  # ValueError: the stream is closed

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for what the encoding lacks

    def write(self, text):
        try:
            return self.stream.write(text)
        except self.errors as error:
            return self.lose(error, len(text))

    def flush(self):
        try:
            self.stream.flush()
        except self.errors as error:
            self.lose(error)

    def lose(self, error, n_chars=0):
        return n_chars

    def __getattr__(self, name):
        return getattr(self.stream, name)


def survive_lost_output():
    """Drop what cannot be written from now on: a run must not end because of what it prints."""
    sys.stdout = Lossy(getattr(sys.stdout, "stream", sys.stdout))  # no longer Vital
    sys.stderr = Lossy(sys.stderr)


def command_line(args):
    """Return args (a list) as one line, quoted for the shell of this system."""
    return subprocess.list2cmdline(args) if os.name == "nt" else shlex.join(args)


class Vital(Lossy):
    """A text stream that carries the result of its program, which ends with exit code 1 if that cannot be
    written: silently if the reader of a pipe has ended, else with an error line."""

    errors = OSError

    def lose(self, error, n_chars=0):
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows reports the second for the first
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # an exit would flush, and fail, again


def end_with_output():
    """Make stdout Vital from now on: in `sample.py ... | head` the reader may end first."""
    if not isinstance(sys.stdout, Vital):
        sys.stdout = Vital(sys.stdout)


def progress_bar(total, done, hidden=False):
    """Return a bar on stderr that fits 60 columns; without a terminal it only passes lines on."""
    from tqdm import tqdm

    hidden = hidden or not sys.stderr.isatty()
    layout = "{n_fmt}/{total_fmt} {percentage:3.0f}% |{bar}| {desc}{remaining}"
    return tqdm(total=total, initial=done, disable=hidden, dynamic_ncols=True, bar_format=layout)
