"""
Generate text with a trained model, streamed as it comes; go on with a text in turns; play tic-tac-toe.

    python sample.py --ckpt=runs/demo --prompt=12+34=
    python sample.py --ckpt=runs/demo --prompt=12+34= --temperature=0
    echo 12+34= | python sample.py --ckpt=runs/demo --prompt=-
    python sample.py --ckpt=runs/demo --chat
    python sample.py --ckpt=runs/train_tictactoe --play --side=O --ask=not_lose

Text goes to stdout; what is said about it to stderr: tokens per second of the prompt (prefill) and of the
new ones (decode), and the words of the chat. Generation ends at the end-of-text token. --chat is one text
that you and the model write in turns, each on a new line: base models continue a text, they were not taught
to answer. --play needs a model of config/train_tictactoe.py.
"""

import contextlib
import signal
import sys
import time

import config
from nanobit import cli, terminal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the text where it is
FLAGS = {
    "ckpt": (
        "",
        "a run folder (its newest checkpoint), RUN/best (its best evaluation), a step folder, a "
        "checkpoint.pt, or an export for transformers",
    ),
    "prompt": (
        "",
        "the text to continue, as it stands: \\n is two characters; - reads it from stdin, where it may have "
        "line breaks; with --chat what the text begins with",
    ),
    "prompt_file": ("", "a UTF-8 file with the text to go on from; its last newline does not count"),
    "max_new_tokens": (256, "tokens to generate at most; in a --chat turn at most half of the context"),
    "temperature": (0.8, "0 = greedy, 1 = the model's own chances"),
    "top_k": (0, "draw from the k likeliest tokens; 0 = from all"),
    "top_p": (1.0, "draw from the likeliest tokens whose chances reach this (nucleus); 1 = from all"),
    "num_samples": (1, "texts to generate, a line --- between them"),
    "seed": (1337, "another seed draws another text"),
    "dtype": ("float32", "float32 | bfloat16 | float16: what the matrix products compute in"),
    "packed": (
        True,
        "integer weights in ternary layers; False = from the float master weights, the same text",
    ),
    "head": (
        "float32",
        "float32 | bfloat16: what the head is kept in; bfloat16 halves what a token reads, and rounds logits",
    ),
    "cuda_graph": (
        False,
        "on CUDA, replay a token as one graph, without its hundreds of launches; attention then adds in "
        "another order; not yet tried on a GPU",
    ),
    "chat": (False, "write a text in turns; /help lists the commands"),
    "play": (False, "play tic-tac-toe against the model"),
    "side": ("X", "X | O: what you play; X begins"),
    "ask": ("win", "win | not_lose: how the model is asked for a move (tictactoe.py)"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("device",), check_run=False)
config.need_flags(cfg, "ckpt", *([] if cfg.chat or cfg.play or cfg.prompt_file else ["prompt"]))
faults = [
    f"{name} = {getattr(cfg, name)!r} must be {range_}"
    for name, ok, range_ in (
        ("temperature", cfg.temperature == 0 or cfg.temperature >= 0.01, "0 or at least 0.01"),
        ("top_k", cfg.top_k >= 0, "at least 0"),
        ("top_p", 0 < cfg.top_p <= 1, "more than 0 and at most 1"),
        ("max_new_tokens", cfg.max_new_tokens >= 1, "at least 1"),
        ("num_samples", cfg.num_samples >= 1, "at least 1"),
        ("head", cfg.head in ("float32", "bfloat16"), "float32 or bfloat16"),
        ("side", cfg.side in ("X", "O"), "X or O"),
        ("ask", cfg.ask in ("win", "not_lose"), "win or not_lose"),
        ("prompt", not (cfg.prompt and cfg.prompt_file), "left out where --prompt_file is given"),
        ("prompt", not (cfg.prompt == "-" and cfg.chat), "a text: --chat reads your messages from stdin"),
        ("play", not (cfg.chat and cfg.play), "left out with --chat"),
        ("prompt", not (cfg.play and (cfg.prompt or cfg.prompt_file)), "left out with --play"),
    )
    if not ok
]
if faults:
    cli.fail(*faults)
terminal.end_with_output()

import select

import torch

from nanobit import cli, machine, weights
from nanobit.generate import generate
from nanobit.infer.restore import lighten_head, restore
from nanobit.tasks import tictactoe as game
from nanobit.tokenizer import TextStream, bos_of, encode_prompt, make_tokenizer

with contextlib.suppress(ModuleNotFoundError):  # Windows: its console edits lines by itself
    import readline  # noqa: F401 -- input() then edits lines, and takes a paste of several at once

HELP = """you and the model write one text in turns: your message is put on a new line after what is there,
and the model continues on the next line. It is a base model: it was not taught to answer. If it ended the
text, your next message begins another. Several lines pasted at once are one message; an empty one lets the
model continue where it was.
  /reset   empty the history
  /help    this
  /exit    end; so do exit, quit and Ctrl-D
  Ctrl-C   stop the model where it is; at the prompt: end"""


def read_prompt():
    """the text of --prompt or --prompt_file. Exits with 2 where it cannot be read."""
    if cfg.prompt != "-" and not cfg.prompt_file:
        return cfg.prompt
    try:
        with open(cfg.prompt_file or 0, encoding="utf-8-sig") as file:  # as prepare/text.py reads a text
            return file.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        setting = f"prompt_file = {cfg.prompt_file!r}" if cfg.prompt_file else "prompt = '-' (stdin)"
        cli.fail(f"{setting} cannot be read as UTF-8 text: {error}; name a text file, or --prompt=TEXT")


@torch.inference_mode()
def write_on(ids, max_new_tokens, generator):
    """Generate after ids (a list) and print the text as it comes. ids grows by the new tokens, and at the end
    of a text by what stands before the next one, which is not printed. Returns (seconds to the first token,
    tokens, seconds for the tokens after the first)."""
    began, first, made, stream = time.perf_counter(), 0.0, 0, TextStream(tokenizer, ids)
    options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, generator=generator)
    options["cuda_graph"] = cfg.cuda_graph
    with machine.autocast(device, dtype):
        for token in generate(model, torch.tensor([ids], device=device), max_new_tokens, **options):
            made, first = made + 1, first or time.perf_counter()
            ids.append(token.item())
            if ids[-1] == eot:
                ids += [] if bos == eot else [bos]
                break
            print(stream.add(ids[-1]), end="", flush=True)
    print(stream.end(), end="", flush=True)
    return first - began, made, time.perf_counter() - first


def read_line(prompt):
    """the next line of stdin, or None at its end; the prompt is for a terminal"""
    try:
        return input(prompt if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print(file=sys.stderr)
        return None


def has_line():
    """Return whether a terminal has the next line ready. Windows cannot know: a paste is several messages."""
    try:
        return sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0.05)[0])
    except OSError:
        return False


def read_message():
    """the next line of stdin, or None at its end; from a terminal all lines that come at once: a paste"""
    message = read_line("> ")
    while message is not None and has_line():
        more = read_line("")
        if more is None:
            break
        message += "\n" + more
    return message


def say(text):
    print(text, file=sys.stderr, flush=True)


def message_ids(ids, message):
    """Return the ids of a message after ids: on a line of its own, as the screen shows it, if the tokenizer
    has line breaks that do not end a text. ValueError if it lacks a character."""
    encode = tokenizer.encode if ids[-1] == bos else tokenizer.encode_on
    try:
        has_lines = eot not in tokenizer.encode("\n")
    except ValueError:
        has_lines = False
    if not (message and has_lines):
        return encode(message)
    is_new_line = ids[-1] == bos or tokenizer.decode(ids[-8:]).endswith("\n")
    return encode(("" if is_new_line else "\n") + message + "\n")


def chat(ids):
    """let the user and the model write in turns after ids, until stdin ends"""
    context = model.cfg.seq_len
    budget = min(cfg.max_new_tokens, context // 2)
    generator, has_cut = torch.Generator().manual_seed(cfg.seed), False
    say(f"at most {budget} tokens a turn, the model sees the last {context}; /help explains, Ctrl-D ends")
    while (message := read_message()) not in (None, "exit", "quit", "/exit", "/quit"):
        if message.startswith("/") and "\n" not in message:
            if message == "/reset":
                ids = [bos]
                say("the history is empty")
            else:
                say(HELP if message == "/help" else f"no command {message}; /help lists them")
            continue
        try:
            ids += message_ids(ids, message)
        except ValueError as error:
            say(f"not taken: {error}")
            continue
        if len(ids) + budget > context:
            del ids[: len(ids) + budget - context]
            if not has_cut:
                say(f"from here on the oldest text is forgotten: the context has room for {context} tokens")
            has_cut = True
        try:
            write_on(ids, budget, generator)
        except KeyboardInterrupt:
            pass  # stops this turn only
        print(flush=True)


def ask_square(moves):
    """the free square '1' to '9' that the user takes after moves, or '' to end"""
    board = game.board_of(moves)
    squares = [str(square + 1) for square in game.free(board)]
    print(game.draw(board), flush=True)
    while True:
        line = read_line(f"{cfg.side} takes (p: the model's chances, q: end) ")
        line = "q" if line is None else line.strip().lower()
        if line in squares or line == "q":
            return line.replace("q", "")
        if line == "p":
            with machine.autocast(device, dtype):
                scores, wished = game.ask_model(model, tokenizer, eot, [moves], cfg.ask)
            print(f"the model in your place, asked to {cfg.ask}:")
            for square, token in enumerate(tokenizer.encode("123456789")):
                row = f"  {square + 1} {wished[0, token].exp():6.1%}"
                if cfg.ask == "not_lose":
                    row += f"   then {game.other(cfg.side)} wins {(-scores[0, square]).exp():6.1%}"
                print(row + ("" if str(square + 1) in squares else "   taken"))
            print(flush=True)
        elif line in list("123456789"):
            say(f"square {line} is taken; free are {', '.join(squares)}")
        else:
            say(f"{line!r} is no square; type one of {', '.join(squares)}, p or q")


def play():
    """games of tic-tac-toe until the user ends them; the model takes the free square that it likes best"""
    asked = illegal = 0
    playing = True
    while playing:
        moves = ""
        while playing and not game.result(game.board_of(moves)):
            if game.to_move(game.board_of(moves)) == cfg.side:
                move = ask_square(moves)
                playing = bool(move)
            else:
                with machine.autocast(device, dtype):
                    square, legal = game.answers(model, tokenizer, eot, [moves], cfg.ask)[0]
                asked, illegal, move = asked + 1, illegal + (not legal), str(square + 1)
                print(f"the model takes {move}")
            moves += move
        if playing:
            result = game.result(game.board_of(moves))
            print(game.draw(game.board_of(moves)))
            said = {cfg.side: "you win", game.other(cfg.side): "the model wins", "D": "a draw"}
            print(said[result], flush=True)
            again = read_line("another game? [Y/n] ")
            playing = again is not None and again.strip().lower() in ("", "y", "yes")
    if asked:
        print(f"the model's likeliest token was no free square in {illegal} of its {asked} moves", flush=True)


device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
text = "" if cfg.play else read_prompt()
part, _ = weights.trained(cfg.ckpt)
if cfg.play and part["tokenizer"].get("chars") != game.CHARS:
    trained = f"was trained on {part['config']['dataset']!r}, not on games of tic-tac-toe"
    cli.fail(f"ckpt = {cfg.ckpt!r} {trained}; --play needs a model of config/train_tictactoe.py")
if cfg.play or cfg.chat:
    sys.stdin.reconfigure(errors="replace")
if cfg.cuda_graph:
    machine.check_cuda_graph(device, part["config"]["n_expert"])
model = restore(part, device, cfg.packed)
if cfg.head == "bfloat16":
    lighten_head(model)
tokenizer, eot, bos = make_tokenizer(part["tokenizer"]), part["tokenizer"]["eot"], bos_of(part["tokenizer"])
try:
    text.encode()  # half a character of a command line is told like one that the tokenizer lacks
    prompt = encode_prompt(tokenizer, bos, text)
except ValueError as error:
    cli.fail(f"prompt_file = {cfg.prompt_file!r}: {error}" if cfg.prompt_file else f"prompt: {error}")

if cfg.play or cfg.chat:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # readline has to give the terminal back
    if text:
        print(text, flush=True)
    try:
        play() if cfg.play else chat(prompt)
    except KeyboardInterrupt:
        say("")
        raise SystemExit(128 + signal.SIGINT) from None
else:
    context = model.cfg.seq_len
    if len(prompt) > context:
        say(f"of the prompt's {len(prompt)} tokens the model sees the last {context}, which is its context")
    generator = torch.Generator().manual_seed(cfg.seed)
    for number in range(cfg.num_samples):
        print(("---\n" if number else "") + text, end="", flush=True)
        prefill_seconds, made, decode_seconds = write_on(list(prompt), cfg.max_new_tokens, generator)
        print(flush=True)
        read = min(len(prompt), context)
        if read + made - 1 > context:  # the last token is not read
            say(f"the text outgrew the context of {context} tokens; each time, its later half was kept")
        speed = f"prefill {read} tokens, {read / prefill_seconds:,.0f} tokens/s"
        if made > 1:  # the first token came with the prefill
            speed += f"; decode {made - 1} tokens, {(made - 1) / decode_seconds:,.0f} tokens/s"
        say(speed)
