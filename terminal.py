"""What a program shows: text that is safe to print, and output that may go away before the program ends."""

import errno
import io
import os
import signal
import sys


def printable(text):
    """Return text with every control character, line break and lone surrogate as an escape such as \\x1b.

    For names and values that come from files: printed as they are, they could move the cursor, write the
    clipboard, or add a line to an error.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Lossy:
    """A text stream that drops what cannot be written: the terminal was closed, the reader of a pipe has
    ended, the disk under a log is full. For a run, which must not end because of what it prints."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a text that the encoding cannot hold is no reason

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def survive_lost_output():
    """From now on, drop what cannot be written to stdout and stderr instead of raising an error."""
    sys.stdout, sys.stderr = Lossy(sys.stdout), Lossy(sys.stderr)


def command_line(args):
    """Return args (a list) as the line that a shell of this system takes them from."""
    if os.name == "nt":
        from subprocess import list2cmdline as join
    else:
        from shlex import join
    return join(args)


class Pipe(io.FileIO):
    """Standard output whose reader may end first: the program then ends too."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows reports the second
                os._exit(1)
            raise


def end_with_reader():
    """Let this program end quietly if the reader of its output ends first, as in `sample.py ... | head`."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    elif sys.stdout is sys.__stdout__ and not sys.stdout.isatty():  # Windows has no such signal
        sys.stdout.flush()
        binary = io.BufferedWriter(Pipe(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(binary, sys.stdout.encoding, sys.stdout.errors)


class Vital(Lossy):
    """A text stream that holds what its program is run for: the program ends with exit code 1 if that cannot
    be written, quietly if the reader of a pipe has ended, else with an error line."""

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.end(error)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.end(error)

    def end(self, error):
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # an exit would flush, and fail, again


def end_with_output():
    """From now on, end the program if stdout cannot be written; show what its encoding lacks as \\u65e5."""
    sys.stdout = Vital(sys.stdout)
