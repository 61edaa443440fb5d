"""Generate text with a trained model, streamed as it comes; write a text in turns; play tic-tac-toe.

    python sample.py --ckpt=runs/demo --prompt=12+34=
    python sample.py --ckpt=runs/demo --prompt=12+34= --temperature=0
    echo 12+34= | python sample.py --ckpt=runs/demo --prompt=-
    python sample.py --ckpt=runs/demo --chat
    python sample.py --ckpt=runs/train_tictactoe --play --side=O --ask=not_lose

Text goes to stdout, all else to stderr: tokens per second of the prompt (prefill) and of new ones (decode).
Generation ends at the end-of-text token. Base models continue a text, in a chat too: they do not answer."""

import contextlib
import select
import signal
import sys
import time

import config
from nanobit.cli import SEED, Flag, fail

PROMPT = dict(not_with="prompt_file play", required=True, unless="prompt_file chat play")
FLAGS = {
    "ckpt": Flag("", "a run folder, RUN/best, step folder, checkpoint.pt or exported folder", required=True),
    "prompt": Flag("", "the text to continue, as it is: \\n is two characters; - reads stdin", **PROMPT),
    "prompt_file": Flag("", "a UTF-8 file to continue; its last newline does not count", not_with="play"),
    "max_new_tokens": Flag(256, "most tokens to generate; in a chat half of the context", within="[1, inf)"),
    "temperature": Flag(0.8, "0 = greedy, 1 = the model's probabilities", within="[0, 0] or [0.01, inf)"),
    "top_k": Flag(0, "draw from the k most likely tokens; 0 = from all"),
    "top_p": Flag(1.0, "draw from the smallest set with this total probability; 1 = all", within="(0, 1]"),
    "num_samples": Flag(1, "texts to generate, with a line --- between them", within="[1, inf)"),
    "seed": Flag(1337, "another seed draws another text", within=SEED),
    "dtype": Flag("float32", "auto | float32 | bfloat16 | float16: of the matrix products", config.DTYPES),
    "packed": Flag(True, "integer weights in ternary layers; False = float master weights, the same text"),
    "head": Flag("float32", "float32 | bfloat16 | int8 (fewer bytes, rounded logits)", config.HEADS),
    "chat": Flag(False, "write a text in turns, after the prompt if there is one; /help lists the commands"),
    "play": Flag(False, "play tic-tac-toe against a model of config/train_tictactoe.py", not_with="chat"),
    "side": Flag("X", "X | O: the side that you play; X begins", ("X", "O"), only_with="play"),
    "ask": Flag("win", "win | not_lose: how to ask for a move", ("win", "not_lose"), only_with="play"),
}


def derive(cfg):
    """Yield the fault that a row of FLAGS cannot state."""
    if cfg.chat and cfg.prompt == "-":
        yield "prompt = '-' does not work with --chat, which reads your messages from stdin; give a text"


cfg = config.load(doc=__doc__, flags=FLAGS, only=("device", "cuda_graph"), derive=derive)

import torch

import quant
from nanobit import machine, weights
from nanobit.generate import generate
from nanobit.infer.head import lighten_head
from nanobit.infer.restore import restore
from nanobit.tasks import game
from nanobit.tasks.play import play
from nanobit.tokenizer import TextStream, bos_of, encode_prompt, make_tokenizer

with contextlib.suppress(ModuleNotFoundError):  # Windows: its console edits lines by itself
    import readline  # noqa: F401 -- input() then edits lines, and accepts several pasted lines

HELP = """you and the model write one text in turns, each on a new line. It is a base model: it was
not trained to answer. If it has ended the text, your next message begins another. Several lines pasted
together are one message; an empty message lets the model continue.
  /reset   empty the history
  /help    this
  /exit    end; so do exit, quit and Ctrl-D
  Ctrl-C   stop the model; at the prompt: end"""

device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
source = f"prompt_file = {cfg.prompt_file!r}" if cfg.prompt_file else "prompt"
text = cfg.prompt
if cfg.prompt == "-" or cfg.prompt_file:
    try:
        with open(cfg.prompt_file or 0, encoding="utf-8-sig") as file:  # as prepare/text.py reads a text
            text = file.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{source} cannot be read as UTF-8 text: {error}; name a text file, or --prompt=TEXT")
part, _ = weights.trained(cfg.ckpt)
tokenizer = make_tokenizer(part["tokenizer"])
eot = part["tokenizer"]["eot"]
bos = bos_of(part["tokenizer"])
if cfg.play and part["tokenizer"].get("chars") != game.CHARS:
    was_trained = f"was trained on {part['config']['dataset']!r}, not on games of tic-tac-toe"
    fail(f"ckpt = {cfg.ckpt!r} {was_trained}; --play needs a model of config/train_tictactoe.py")
try:
    text.encode()  # report an undecodable byte like a character that the tokenizer lacks
    prompt = encode_prompt(tokenizer, bos, text)
except ValueError as error:
    fail(f"{source}: {error}")
cfg.cuda_graph = machine.can_replay(cfg, device, part["config"]["n_expert"])
model = restore(part, device, cfg.packed)
quant.keep_codes(model)  # of layers that are not packed
lighten_head(model, cfg.head)
context = model.cfg.seq_len
generator = torch.Generator().manual_seed(cfg.seed)
options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, generator=generator)


def say(line):
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


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


def message_ids(ids, message):
    """Return the ids of a message after ids, on a separate line if the tokenizer has line breaks that do not
    end a text. Raises ValueError if it lacks a character."""
    encode = tokenizer.encode if ids[-1] == bos else tokenizer.encode_on
    try:
        has_lines = eot not in tokenizer.encode("\n")
    except ValueError:
        has_lines = False
    if not (message and has_lines):
        return encode(message)
    is_new_line = ids[-1] == bos or tokenizer.decode(ids[-8:]).endswith("\n")
    return encode(("" if is_new_line else "\n") + message + "\n")


def write_on(ids, max_new_tokens):
    """Generate after ids, a list that grows, and print the text as it comes. Return (seconds to the first
    token, tokens, seconds for the others)."""
    began, first, made = time.perf_counter(), 0.0, 0
    stream = TextStream(tokenizer, ids)
    idx = torch.tensor([ids], device=device)
    for token in generate(model, idx, max_new_tokens, **options, cuda_graph=cfg.cuda_graph):
        made += 1
        first = first or time.perf_counter()
        ids.append(token.item())
        if ids[-1] == eot:
            if bos != eot:  # it begins the next text
                ids.append(bos)
            break
        print(stream.add(ids[-1]), end="", flush=True)
    print(stream.end(), end="", flush=True)
    return first - began, made, time.perf_counter() - first


def write_samples(prompt):
    """Print num_samples texts, and on stderr how fast they were made."""
    if len(prompt) > context:
        say(f"the prompt has {len(prompt)} tokens; the model sees the last {context}, its context")
    read = min(len(prompt), context)
    for number in range(cfg.num_samples):
        if number:
            print("---")
        print(text, end="", flush=True)
        prefill_seconds, made, decode_seconds = write_on(list(prompt), cfg.max_new_tokens)
        print(flush=True)
        if read + made - 1 > context:  # the last token is not read
            say(f"the text outgrew the context of {context} tokens; each time, its later half was kept")
        speed = f"prefill {read} tokens, {read / prefill_seconds:,.0f} tokens/s"
        if made > 1:  # the first token came with the prefill
            speed += f"; decode {made - 1} tokens, {(made - 1) / decode_seconds:,.0f} tokens/s"
        say(speed)


def chat(ids):
    """Let the user and the model write in turns after ids, until stdin ends."""
    budget = min(cfg.max_new_tokens, context // 2)
    has_cut = False
    if text:
        print(text, flush=True)
    say(f"at most {budget} tokens a turn, the model sees the last {context}; /help explains, Ctrl-D ends")
    while (message := read_message()) not in (None, "exit", "quit", "/exit", "/quit"):
        if message.startswith("/") and "\n" not in message:
            if message == "/reset":
                ids = [bos]
            replies = {"/reset": "the history is empty", "/help": HELP}
            say(replies.get(message, f"no command {message}; /help lists them"))
            continue
        try:
            ids += message_ids(ids, message)
        except ValueError as error:
            say(f"message ignored: {error}")
            continue
        excess = len(ids) + budget - context
        if excess > 0:
            del ids[:excess]
            if not has_cut:
                say(f"from now on the oldest text is forgotten: the context holds {context} tokens")
            has_cut = True
        with contextlib.suppress(KeyboardInterrupt):  # it stops this turn only
            write_on(ids, budget)
        print(flush=True)


with torch.inference_mode(), machine.autocast(device, dtype):
    if not (cfg.play or cfg.chat):
        write_samples(prompt)
        raise SystemExit(0)
    sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # readline has to give the terminal back
    try:
        if cfg.play:
            play(model, tokenizer, eot, cfg.side, cfg.ask, read_line)
        else:
            chat(prompt)
    except KeyboardInterrupt:
        say("")
        raise SystemExit(128 + signal.SIGINT) from None
