"""Generate text with a trained model, streamed as it comes; talk with it; play tic-tac-toe.

    python sample.py --ckpt=runs/demo --prompt=12+34=
    python sample.py --ckpt=runs/demo --prompt=12+34= --temperature=0
    echo 12+34= | python sample.py --ckpt=runs/demo --prompt=-
    python sample.py --ckpt=runs/demo --chat
    python sample.py --ckpt=runs/chat --chat --system="You are a cook."
    python sample.py --ckpt=runs/chat --chat --prompt="What is bread made of?"
    python sample.py --ckpt=runs/train_tictactoe --play --side=O --ask=not_lose

Text goes to stdout, all else to stderr: tokens per second of the prompt (prefill) and of new ones (decode).
Generation ends at the end-of-text token. Base models continue a text, in a chat too. A model that was trained
on conversations (docs/chat.md) answers: in a chat, or the one question of --chat --prompt=."""

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
    "max_new_tokens": Flag(256, "most new tokens; in a chat at most half of the context", within="[1, inf)"),
    "temperature": Flag(0.8, "0 = greedy, 1 = the model's probabilities", within="[0, 0] or [0.01, inf)"),
    "top_k": Flag(0, "draw from the k most likely tokens; 0 = from all"),
    "top_p": Flag(1.0, "draw from the smallest set with this total probability; 1 = all", within="(0, 1]"),
    "num_samples": Flag(
        1, "texts to generate, with a line --- between them", within="[1, inf)", not_with="chat play"
    ),
    "seed": Flag(1337, "another seed draws another text", within=SEED),
    "dtype": Flag("float32", "auto | float32 | bfloat16 | float16: of the matrix products", config.DTYPES),
    "packed": Flag(True, "integer weights in ternary layers; False = float master weights, the same text"),
    "head": Flag("float32", "float32 | bfloat16 | int8 (fewer bytes, rounded logits)", config.HEADS),
    "chat": Flag(False, "talk in turns, or ask the prompt alone; a base model continues the prompt"),
    "system": Flag("", "a text before a conversation, as 'You are a cook.'", only_with="chat"),
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

from nanobit import machine, weights
from nanobit.chat import FORMAT
from nanobit.generate import write_on
from nanobit.infer.head import set_head
from nanobit.infer.restore import restore
from nanobit.kept_codes import keep_codes
from nanobit.tasks import game, talk
from nanobit.tasks.play import play
from nanobit.terminal import say
from nanobit.tokenizer import bos_of, encode_prompt, make_tokenizer

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
spec = part["tokenizer"]
tokenizer = make_tokenizer(spec)
eot = spec["eot"]
if cfg.play and spec.get("chars") != game.CHARS:
    was_trained = f"was trained on {part['config']['dataset']!r}, not on games of tic-tac-toe"
    fail(f"ckpt = {cfg.ckpt!r} {was_trained}; --play needs a model of config/train_tictactoe.py")
try:
    text.encode()  # report an undecodable byte like a character that the tokenizer lacks
    prompt = encode_prompt(tokenizer, bos_of(spec), text)
except ValueError as error:
    fail(f"{source}: {error}")
if cfg.chat and spec.get("chat", FORMAT) != FORMAT:
    fail(f"ckpt = {cfg.ckpt!r} has another format of conversations, {spec['chat']!r}, than {FORMAT!r}")
if cfg.system and "chat" not in spec:
    fail(f"ckpt = {cfg.ckpt!r} is a base model: --system needs one trained on conversations (docs/chat.md)")
model = restore(part, device, cfg.packed)
keep_codes(model)  # of layers that are not packed
set_head(model, cfg.head)
context = model.cfg.seq_len
generator = torch.Generator().manual_seed(cfg.seed)
options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, generator=generator)
options["cuda_graph"] = machine.can_replay(cfg, device, part["config"]["n_expert"])


def write(ids, max_new_tokens):
    """Return the pieces of text that follow ids, see write_on."""
    return write_on(model, tokenizer, eot, ids, max_new_tokens, **options)


def write_samples():
    """Print num_samples texts, and on stderr how fast they were made."""
    if len(prompt) > context:
        say(f"the prompt has {len(prompt)} tokens; the model sees the last {context}, its context")
    read = min(len(prompt), context)
    for number in range(cfg.num_samples):
        if number:
            print("---")
        print(text, end="", flush=True)
        ids = list(prompt)
        times = [time.perf_counter()]
        for piece in write(ids, cfg.max_new_tokens):
            print(piece, end="", flush=True)
            times.append(time.perf_counter())
        print(flush=True)
        made = len(ids) - len(prompt)
        if read + made - 1 > context:  # the last token is not read
            say(f"the text outgrew the context of {context} tokens; each time, its later half was kept")
        speed = f"prefill {read} tokens, {read / (times[1] - times[0]):,.0f} tokens/s"
        if made > 1:  # the first token came with the prefill
            speed += f"; decode {made - 1} tokens, {(made - 1) / (times[-1] - times[1]):,.0f} tokens/s"
        say(speed)


def chat():
    """Talk with the model until stdin ends, or ask it the one question that was given."""
    sizes = (context, min(cfg.max_new_tokens, context // 2))
    if "chat" not in spec:
        if text:
            print(text, flush=True)
        talk.Text(tokenizer, spec, write, *sizes, ids=prompt).talk()
        return
    conversation = talk.Conversation(tokenizer, spec, write, *sizes, system=cfg.system)
    if cfg.system:
        try:
            conversation.ids_after("x")
        except ValueError as error:
            fail(f"system = {cfg.system[:60]!r}: {error}")
    if not text:
        conversation.talk()
        return
    try:
        ids = conversation.ids_after(text)
    except ValueError as error:
        fail(f"{source}: {error}")
    conversation.reply(text, ids)


with torch.inference_mode(), machine.autocast(device, dtype):
    if not (cfg.play or cfg.chat):
        write_samples()
        raise SystemExit(0)
    sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # readline has to give the terminal back
    try:
        if cfg.play:
            play(model, tokenizer, eot, cfg.side, cfg.ask, talk.read_line)
        else:
            chat()
    except KeyboardInterrupt:
        say("")
        raise SystemExit(128 + signal.SIGINT) from None
