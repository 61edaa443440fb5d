"""Compare an export in transformers, a binding of llama.cpp or Node with our float32 forward, eager, on the
CPU."""

import functools
import os

import torch
import torch.nn.functional as F

import quant
from nanobit.cli import fail, library
from nanobit.export.hf import codes_of, is_ternary
from nanobit.export.web import html_file, node
from nanobit.generate import generate
from nanobit.infer.restore import restore
from nanobit.tokenizer import bos_of, continuation, encode_prompt, make_tokenizer

NEW = 32  # greedy tokens after each prompt


def probe(part):
    """Return token ids (2, T) that any model can read."""
    cfg = part["config"]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cfg["vocab_size"], (2, min(64, cfg["seq_len"])), generator=generator)


def dequantized(part):
    """Return the part of a float model with the ternary values of this one: it rounds no input."""
    model = {}
    for name, w in part["model"].items():
        if is_ternary(part, name):
            codes, scale = codes_of(part, name)
            w = codes / scale
        if not name.endswith("weight_scale"):
            model[name] = w
    return part | dict(config=part["config"] | dict(ternary=False), model=model)


def loss_of(logits, windows):
    """Return the mean cross entropy in nats over the targets that count (not -100) in windows of (inputs,
    targets), of what makes logits (1, T, V) of ids."""
    nats = sum(F.cross_entropy(logits(x)[0], y[0], reduction="sum").item() for x, y in windows)
    return nats / n_targets(windows)


def n_targets(windows):
    """Return how many targets count in windows of (inputs, targets)."""
    return sum((y >= 0).sum().item() for _, y in windows)


@torch.no_grad()
def compare(part, windows, reference, bound, name, logits, tokenize, write, loss=None):
    """Print and return the differences between what a reader computes and a reference of ours, the part of a
    model; windows: (inputs, targets) for the loss of both. Exits with 1 if its tokenizer is another.

    `good`: no logit differs by more than `bound` times their spread, and the loss by no more than bound / 10
    or 0.01 nats (0 for a bound of 0). The reader has logits(ids (B, T)), tokenize(text) -> ids,
    write(ids, n) -> n greedy tokens, and loss(windows) unless that is loss_of its logits."""
    is_packed = any(w.dtype == torch.uint8 for w in reference["model"].values())
    ours = restore(reference, torch.device("cpu"), is_packed)
    tokenizer = make_tokenizer(part["tokenizer"])
    x = probe(part)
    mine = ours(x)
    difference = (logits(x) - mine).abs().max().item()
    spread = mine.std().item()
    facts = dict(reader=name, max_difference=difference, logits_std=spread, same=0, tokens=0)
    facts["good"] = difference <= bound * spread
    n = max(1, min(NEW, part["config"]["seq_len"] // 2))
    for text in part["config"]["sample_prompts"]:
        try:
            ids = encode_prompt(tokenizer, bos_of(part["tokenizer"]), text)
        except ValueError:  # a run that wrote no samples may have prompts of another language
            continue
        if tokenize(text) != ids:
            fail(f"the tokenizer that was written makes {tokenize(text)} of {text!r}, ours {ids}", code=1)
        new = [token.item() for token in generate(ours, torch.tensor([ids]), n, temperature=0.0)]
        theirs = list(write(ids, n))
        facts["same"] += sum(a == b for a, b in zip(new, theirs))
        facts["tokens"] += n
        other = f" here, {continuation(tokenizer, ids, theirs)!r} there" if theirs != new else ""
        print(f"{text!r} continues with {continuation(tokenizer, ids, new)!r}{other}")
    n_counted = n_targets(windows)
    loss = loss or functools.partial(loss_of, logits)
    if n_counted:
        own = restore(part, torch.device("cpu"), packed=part["config"]["ternary"])
        facts |= dict(val_tokens=n_counted, val_loss=loss_of(own, windows))
        facts["reader_val_loss"] = loss(windows)
        allowed = max(0.01, bound / 10) if bound else 0
        facts["good"] &= abs(facts["reader_val_loss"] - facts["val_loss"]) <= allowed
    logit_text = f"largest difference of logits {difference:.3g}, their standard deviation {spread:.3g}"
    verdict = "good" if facts["good"] else "BAD"
    same = f"{facts['same']} of {facts['tokens']} greedy tokens the same"
    print(f"{name}: {logit_text} (at most {bound:g} of it is good); {same}: {verdict}")
    if n_counted:
        losses = "{val_loss:.5f} nats here, {reader_val_loss:.5f} there".format(**facts)
        print(f"loss on {n_counted:,} tokens of the validation set: {losses}")
    return facts


def hf(part, folder, latent=False, windows=()):
    """Return compare() with transformers on a folder: equal to the last bit, a mixture up to rounding."""
    lib = library("transformers")
    lib.logging.set_verbosity_error()
    lib.logging.disable_progress_bar()
    model = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = lib.AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # ours continues after the end of a text

    def write(ids, n):
        return model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, len(ids) :].tolist()

    name = f"transformers {lib.__version__}"
    reference = part
    if latent and part["config"]["ternary"]:
        reference = part = part | dict(config=part["config"] | dict(ternary=False))
        name += ", a float model here and there"
    elif part["config"]["n_expert"]:
        reference = dequantized(part)
    bound = 1e-5 if part["config"]["n_expert"] else 0.0
    with torch._dynamo.config.patch(disable=True):  # parts of its BitNet code are compiled
        reader = (lambda x: model(x).logits, tokenizer.encode, write)
        return compare(part, windows, reference, bound, name, *reader)


class Llama:
    """A GGUF file in llama.cpp, by the binding cyllama, without fp16 between its operations."""

    def __init__(self, path, n_ctx=512, n_threads=0):
        self.lib = library("cyllama.llama.llama_cpp", "cyllama")
        self.lib.disable_logging()
        self.lib.llama_backend_init()
        self.lib.ggml_backend_load_all()

        class Model(self.lib.LlamaModel):
            @property
            def n_vocab(self):  # its context asks for it, and version 0.2.18 has none
                return self.get_vocab().n_vocab

        self.model = Model(path)
        params = self.lib.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.type_k = params.type_v = params.flash_attn_type = 0  # fp32 keys, values; no flash attention
        params.n_threads = params.n_threads_batch = n_threads or params.n_threads
        self.context = self.lib.LlamaContext(self.model, params)

    def read(self, ids, n_past=0, all_logits=False):
        """Let it read ids after n_past others."""
        batch = self.lib.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, n_past, all_logits)
        self.context.decode(batch)

    def logits(self, x):
        """Return the logits (B, T, V) of ids (B, T)."""
        rows = []
        for ids in x.tolist():
            self.context.kv_cache_clear()
            self.read(ids, all_logits=True)
            rows.append(torch.stack([torch.tensor(self.context.get_logits_ith(i)) for i in range(len(ids))]))
        return torch.stack(rows)

    def tokenize(self, text):
        return self.model.get_vocab().tokenize(text, True, False)

    def write(self, ids, n):
        """Yield n greedy tokens after ids."""
        sampler = self.lib.LlamaSampler()
        sampler.add_greedy()
        self.context.kv_cache_clear()
        self.read(ids)
        for n_past in range(len(ids), len(ids) + n):
            token = sampler.sample(self.context, -1)
            yield token
            self.read([token], n_past)


# what llama.cpp may differ by from a forward that rounds no input, as a part of the spread of the logits: it
# computes with halves, or rounds inputs and weights in blocks
BOUNDS = dict(f32=1e-4, f16=0.02, q8_0=0.1, q5_0=0.3, q4_0=0.6, tq2_0=0.3, tq1_0=0.3, q2_0=0.3)


def gguf(part, path, type_name, embed, windows=()):
    """Return compare() with llama.cpp on a file of these types."""
    try:
        llama = Llama(path, n_ctx=max(512, part["config"]["seq_len"]))
    except ValueError:
        reason = "it is damaged"
        if type_name == "q2_0":
            reason = "q2_0 is newer than its llama.cpp; --type=f16 can be"
        fail(f"{path} is written, but cyllama cannot load it, so it is not verified: {reason}", code=1)
    bound = max(BOUNDS[type_name], BOUNDS[embed])
    reader = (llama.logits, llama.tokenize, llama.write)
    return compare(part, windows, dequantized(part), bound, "llama.cpp (cyllama)", *reader)


def rounding_of(part, held):
    """Return the largest distance of a weight in a page, {name: tensor}, from that of a model, as a part of
    the largest in its row; 1 if a ternary matrix differs at all."""
    worst = 0.0
    for name, w in held.items():
        own = part["model"][name]
        if is_ternary(part, name):
            codes, scale = codes_of(part, name)
            worst = max(worst, float(not torch.equal(codes / scale.view(1, 1), w)))
        else:
            own = own[: len(w)]
            rows = own.abs().amax(-1, keepdim=True)
            worst = max(worst, ((w - own) / rows.clamp(min=quant.EPS)).abs().max().item())
    return worst


# the largest rounding_of a page: half a step of int8, or of the 11 bits of float16
STEPS = dict(int8=0.5 / 127, f16=0.5 / 1024)


def as_held(part, held):
    """Return a part with the embeddings and the other floats of a page, {name: tensor}."""
    model = dict(part["model"])
    for name, w in held.items():
        if not is_ternary(part, name):
            padding = len(model[name]) - len(w)
            model[name] = F.pad(w, (0, 0, 0, padding)) if padding else w
    if part["config"]["tie_embeddings"]:
        model["head.weight"] = model["embed.weight"]
    return part | dict(model=model)


def web(part, path, embed, windows=()):
    """Return compare() with the scripts of a page, in Node, and our model with the page's own embeddings; the
    losses are those of the page and of the model as it was trained. Without Node only weights are compared.

    The scripts compute in doubles. One ulp of fp32 flips the rounding of an int8 input now and then, which
    later layers amplify: a tenth of the spread of the logits is usual in 6 layers, so the bound is not 0. The
    tests compare the scripts with a model in float64, to 1e-6."""
    held = {name: w.float() for name, w in html_file.values(path).items()}
    rounding = rounding_of(part, held)
    is_held = rounding <= STEPS[embed] * 1.001
    verdict = "good" if is_held else "BAD"
    print(f"weights of the page: rounded by {rounding:.2g} of the largest in a row at most: {verdict}")
    if not node.is_installed():
        print("Node is not installed: the page's logits, text and loss were not compared")
        return dict(reader=None, rounding=rounding, good=is_held)

    def call(expression, **data):
        try:
            return node.call(["verify.js"], expression, path=os.path.abspath(path), **data)
        except RuntimeError as error:
            fail(f"the page does not run in Node ({error}); expected Node 18 or newer", code=1)

    def logits(x):
        return torch.tensor(call("logitsOf(path, rows)", rows=x.tolist()))

    def loss(windows):
        rows = [[x[0].tolist(), y[0].tolist()] for x, y in windows]
        return call("natsOf(path, windows)", windows=rows) / n_targets(windows)

    def tokenize(text):
        return call("tokenize(path, text)", text=text)

    def write(ids, n):
        return call("greedy(path, ids, n)", ids=ids, n=n)

    bound = 0.3 if part["config"]["ternary"] else 1e-4
    reader = (logits, tokenize, write, loss)
    facts = compare(part, windows, as_held(part, held), bound, "the page in Node", *reader)
    return facts | dict(rounding=rounding, good=facts["good"] and is_held)
