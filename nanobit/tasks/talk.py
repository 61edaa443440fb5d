"""Talk with a model on the terminal: a base model and the user write one text in turns, a model that was
trained on conversations answers."""

import contextlib
import itertools
import select
import sys

from nanobit import chat
from nanobit.terminal import say
from nanobit.tokenizer import bos_of

with contextlib.suppress(ModuleNotFoundError):  # Windows: its console edits lines by itself
    import readline  # noqa: F401 -- input() then edits lines, and accepts several pasted lines


def read_line(shown):
    """Return the next line of stdin, or None at its end; only a terminal shows the prompt."""
    try:
        return input(shown if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            say("")
        return None


def read_message():
    """Return the next line of stdin, or None at its end; from a terminal all lines of a paste."""
    message = read_line("> ")
    with contextlib.suppress(OSError):  # Windows: select takes sockets only, and a paste is several messages
        while message is not None and sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
            line = read_line("")
            if line is None:
                break
            message += "\n" + line
    return message


class Partner:
    """A model that replies on the terminal. write(ids, n) yields the text of at most n tokens after ids, in
    pieces, and appends the tokens to ids; context: how many tokens the model reads; budget: most tokens of a
    reply; commands: {name: method}. Subclasses have HELP, reset(), ids_after(message), which raises
    ValueError for a message that the model cannot read, and reply(message, ids after it)."""

    COMMANDS = """
  /reset   empty the history
  /help    this
  /exit    end; so do exit, quit and Ctrl-D
  Ctrl-C   stop the model; at the prompt: end"""

    def __init__(self, tokenizer, spec, write, context, budget):
        self.tokenizer = tokenizer
        self.spec = spec
        self.write = write
        self.context = context
        self.budget = budget
        self.has_forgotten = False
        self.commands = {"/reset": self.reset, "/help": lambda: say(self.HELP + self.COMMANDS)}

    def report_forgotten(self, what):
        """Report once that the context is full."""
        if not self.has_forgotten:
            say(f"from now on the oldest {what} is forgotten: the context holds {self.context} tokens")
        self.has_forgotten = True

    def talk(self):
        """Reply to each message until stdin ends."""
        sizes = f"at most {self.budget} tokens a turn, the model sees the last {self.context}"
        say(f"{sizes}; /help explains, Ctrl-D ends")
        while (message := read_message()) not in (None, "exit", "quit", "/exit", "/quit"):
            try:
                if message in self.commands:
                    self.commands[message]()
                elif message.startswith("/") and "\n" not in message:
                    say(f"no command {message}; /help lists them")
                else:
                    self.take(message)
            except KeyboardInterrupt:  # it stops this turn only
                pass

    def take(self, message):
        """Reply to a message, or report what is wrong with it."""
        try:
            ids = self.ids_after(message)
        except ValueError as error:
            say(f"message ignored: {error}")
        else:
            self.reply(message, ids)


class Text(Partner):
    """A text that the user and a base model write in turns; ids: those of the text so far."""

    HELP = """you and the model write one text in turns, each on a new line. It is a base model: it was
not trained to answer. If it has ended the text, your next message begins another. Several lines pasted
together are one message; an empty message lets the model continue."""

    def __init__(self, *args, ids):
        super().__init__(*args)
        self.ids = ids
        self.bos = bos_of(self.spec)
        self.eot = self.spec["eot"]

    def reset(self):
        """Begin another text."""
        self.ids = [self.bos]
        say("the history is empty")

    def ids_after(self, message):
        """Return the ids of the text and a message, which is a separate line if the tokenizer has line breaks
        that do not end a text. Raises ValueError if it lacks a character."""
        begins = self.ids[-1] == self.bos
        encode = self.tokenizer.encode if begins else self.tokenizer.encode_on
        try:
            has_lines = self.eot not in self.tokenizer.encode("\n")
        except ValueError:
            has_lines = False
        if not (message and has_lines):
            return self.ids + encode(message)
        is_new_line = begins or self.tokenizer.decode(self.ids[-8:]).endswith("\n")
        return self.ids + encode(("" if is_new_line else "\n") + message + "\n")

    def reply(self, message, ids):
        """Print how the model continues after the ids."""
        self.ids = ids
        excess = len(self.ids) + self.budget - self.context
        if excess > 0:
            del self.ids[:excess]
            self.report_forgotten("text")
        try:
            for piece in self.write(self.ids, self.budget):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        if self.ids[-1] == self.eot and self.bos != self.eot:  # it begins the next text
            self.ids.append(self.bos)


class Conversation(Partner):
    """Questions, and the answers of a model that was trained on conversations (nanobit/chat.py). Only whole
    turns leave the history. system: a text that stands before all of them."""

    HELP = """ask a question; the model answers, and sees as many earlier turns as its context holds. Several
lines pasted together are one message.
  /retry   another answer to the last question"""

    def __init__(self, *args, system):
        super().__init__(*args)
        self.system = []
        if system:
            self.system.append({"role": "system", "content": system})
        self.turns = []  # [question, answer], both messages
        self.question = ""
        self.is_answered = False
        self.commands["/retry"] = self.retry

    def reset(self):
        """Forget all turns."""
        self.turns = []
        self.question = ""
        say("the history is empty")

    def retry(self):
        """Answer the last question again; the earlier answer is forgotten."""
        if not self.question:
            say("no question was asked yet")
            return
        if self.is_answered:
            self.turns.pop()
        self.take(self.question)

    def ids_after(self, question):
        """Return the ids of the turns and a question. Forgets the oldest turns if the context is too short.
        Raises ValueError, and forgets none, if the question cannot be asked."""
        room = self.context - self.budget
        for first in range(len(self.turns) + 1):
            ids = self.encode([*itertools.chain(*self.turns[first:]), {"role": "user", "content": question}])
            if len(ids) <= room:
                break
        else:
            raise ValueError(f"it takes {len(ids)} tokens of the context, and {room} are left for it")
        if first:
            del self.turns[:first]
            self.report_forgotten("turn")
        return ids

    def encode(self, messages):
        """Return the ids of messages, of which the last is a question, after the system message."""
        return chat.prompt_ids(self.tokenizer, self.spec, [*self.system, *messages])

    def reply(self, question, ids):
        """Print the answer after the ids, those of ids_after(question), and keep both."""
        self.question = question
        answer = ""
        try:
            for piece in self.write(ids, self.budget):
                new = piece if answer else piece.lstrip()  # the answer begins after a space
                print(new, end="", flush=True)
                answer += new
        finally:  # an answer that Ctrl-C stops counts as whole
            print(flush=True)
            self.keep(answer)

    def keep(self, answer):
        """Add the last question and its answer to the turns, unless the answer is empty or cannot be read: a
        model may write a NUL."""
        question = {"role": "user", "content": self.question}
        turn = [question, {"role": "assistant", "content": answer}]
        self.is_answered = False
        try:
            self.encode([*turn, question])
        except ValueError as error:
            reason = f"cannot be read again ({error})" if answer else "is empty"
            say(f"the answer {reason}: this turn is not kept")
            return
        self.turns.append(turn)
        self.is_answered = True
