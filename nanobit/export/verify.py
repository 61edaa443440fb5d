"""
What an export computes, by readers that are not ours: transformers, and a binding of llama.cpp.

They read the written files alone, with the tokenizer in them, and are compared with our own float32 forward,
eager, on the CPU.
"""

import torch
import torch.nn.functional as F

import quant
from nanobit.cli import fail, library
from nanobit.generate import generate
from nanobit.infer.restore import restore
from nanobit.tokenizer import bos_of, continuation, encode_prompt, make_tokenizer

NEW = 32  # greedy tokens after each prompt


def probe(part):
    """token ids (2, T) that any model can read"""
    cfg, generator = part["config"], torch.Generator().manual_seed(0)
    return torch.randint(cfg["vocab_size"], (2, min(64, cfg["seq_len"])), generator=generator)


def as_float(part):
    """the part of a float model with the master weights of this one"""
    return part | dict(config=part["config"] | dict(ternary=False))


def dequantised(part):
    """the part of a float model with the ternary values of this one as weights: no input is rounded"""
    weights = {}
    for name, w in part["model"].items():
        if name.endswith("_proj.weight"):
            w = quant.dequantised(w)
        weights[name] = w
    return as_float(part) | dict(model=weights)


def greedy(model, ids, n):
    """n greedy tokens after ids, a list"""
    return [token.item() for token in generate(model, torch.tensor([ids]), n, temperature=0.0)]


def loss_of(logits, windows):
    """mean cross entropy in nats of what makes logits (1, T, V) of ids (1, T), over (inputs, targets)"""
    losses = [F.cross_entropy(logits(x)[0], y[0]).item() for x, y in windows]
    return sum(losses) / len(losses)


@torch.no_grad()
def compare(part, windows, reference, bound, name, logits, tokenize, go_on):
    """print and return the differences between what a reader computes and a reference of ours, the part of a
    model; `good` where no logit differs by more than `bound` times their spread, and the loss by no more than
    bound / 10 or 0.01 nats (0 for a bound of 0). The reader has logits(ids (B, T)), tokenize(text) -> ids and
    go_on(ids, n) -> n greedy tokens. windows: (inputs, targets) for the loss, ours and the reader's. Exits
    with 1 where its tokenizer is another."""
    cfg, spec, x = part["config"], part["tokenizer"], probe(part)
    ours, tokenizer = restore(reference, torch.device("cpu")), make_tokenizer(spec)
    theirs, mine = logits(x), ours(x)
    spread, difference = mine.std().item(), (theirs - mine).abs().max().item()
    found = dict(reader=name, max_difference=difference, logits_std=spread, same=0, tokens=0)
    found["good"] = difference <= bound * spread
    allowed = f"at most {bound:g} of that is good" if bound else "0 is good"
    n = max(1, min(NEW, cfg["seq_len"] // 2))
    for text in cfg["sample_prompts"]:
        try:
            ids = encode_prompt(tokenizer, bos_of(spec), text)
        except ValueError:  # a run that wrote no samples may have prompts of another language
            continue
        if (got := tokenize(text)) != ids:
            fail(f"the tokenizer that was written makes {got} of {text!r}, ours {ids}", code=1)
        texts = [greedy(ours, ids, n), go_on(ids, n)]
        found["same"] += sum(a == b for a, b in zip(*texts))
        found["tokens"] += n
        here, there = (continuation(tokenizer, ids, new) for new in texts)
        print(f"{text!r} goes on {here!r}" + (f" here, {there!r} there" if texts[0] != texts[1] else ""))
    if windows:
        own = restore(part, torch.device("cpu"), packed=part["config"]["ternary"])
        found |= dict(val_tokens=sum(y.numel() for _, y in windows), val_loss=loss_of(own, windows))
        found["reader_val_loss"] = loss_of(logits, windows)
        off = abs(found["reader_val_loss"] - found["val_loss"])
        found["good"] &= off <= (max(0.01, bound / 10) if bound else 0)
    verdict = "good" if found["good"] else "BAD"
    print(
        f"{name}: largest difference of logits {difference:.3g}, of which the standard deviation is "
        f"{spread:.3g} ({allowed}); {found['same']} of {found['tokens']} greedy tokens the same: {verdict}"
    )
    if windows:
        print(
            f"loss on {found['val_tokens']:,} tokens of the validation set: {found['val_loss']:.5f} nats "
            f"here, {found['reader_val_loss']:.5f} there"
        )
    return found


def hf(part, folder, latent=False, windows=()):
    """compare() with transformers on a folder: equal to the last bit, a mixture up to rounding"""
    lib = library("transformers")
    lib.logging.set_verbosity_error()
    lib.logging.disable_progress_bar()
    model = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = lib.AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # ours goes on after the end of a text

    def go_on(ids, n):
        return model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, len(ids) :].tolist()

    name = f"transformers {lib.__version__}"
    is_mixture, reference = part["config"]["n_expert"] > 0, part
    if part["config"]["ternary"] and (latent or is_mixture):
        reference = as_float(part) if latent else dequantised(part)
        name += ", a float model here and there" if latent else ""
    how = lambda x: model(x).logits, lambda text: tokenizer(text)["input_ids"], go_on
    part = reference if latent else part
    with torch._dynamo.config.patch(disable=True):  # parts of its BitNet code are compiled
        return compare(part, windows, reference, 1e-5 if is_mixture else 0.0, name, *how)


class Llama:
    """a GGUF file in llama.cpp, by the binding cyllama, without fp16 between its operations"""

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
        how = self.lib.LlamaContextParams()
        how.n_ctx = how.n_batch = how.n_ubatch = n_ctx
        how.type_k = how.type_v = how.flash_attn_type = 0  # fp32 keys and values; flash attention off
        how.n_threads = how.n_threads_batch = n_threads or how.n_threads
        self.context = self.lib.LlamaContext(self.model, how)

    def read(self, ids, n_past=0, all_logits=False):
        """let it read ids after n_past others"""
        batch = self.lib.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, n_past, all_logits)
        self.context.decode(batch)

    def logits(self, ids):
        """logits (T, V) of a list of ids"""
        self.context.kv_cache_clear()
        self.read(ids, all_logits=True)
        return torch.stack([torch.tensor(self.context.get_logits_ith(i)) for i in range(len(ids))])

    def tokenize(self, text):
        return self.model.get_vocab().tokenize(text, True, False)

    def write(self, ids, n):
        """yield n greedy tokens after ids"""
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


def gguf(part, path, kind, embed, windows=()):
    """compare() with llama.cpp on a file of these types"""
    try:
        llama = Llama(path, n_ctx=max(512, part["config"]["seq_len"]))
    except ValueError:
        why = "q2_0 is newer than its llama.cpp; --type=f16 can be" if kind == "q2_0" else "it is damaged"
        fail(f"{path} is written, but cyllama cannot load it, so it is not verified: {why}", code=1)

    def logits(x):
        return torch.stack([llama.logits(row.tolist()) for row in x])

    reference = dequantised(part) if part["config"]["ternary"] else part
    how = logits, llama.tokenize, lambda ids, n: list(llama.write(ids, n))
    bound = max(BOUNDS[kind], BOUNDS[embed])
    return compare(part, windows, reference, bound, "llama.cpp (cyllama)", *how)
