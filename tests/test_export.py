"""export.py: what it writes, read by transformers, by llama.cpp and by the gguf package."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import CHARS, lines, run, settings, train

import checkpoint
import config
import gguf_file
import hf
import quant
import tokenizer_files
import verify
from inference import restore
from model import Transformer
from record import SCALARS
from tokenizer import encode_prompt, make_tokenizer

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
CHAR = dict(kind="char", sha256="x", eot=0, chars=CHARS)


def part_of(tokenizer=CHAR, **changes):
    """a checkpoint's part of a random model, whose weights are no longer those it was made with"""
    cfg = settings(**dict(n_embd=64, ffn_dim=128, n_layer=2, n_head=4, n_kv_head=2, seq_len=64) | changes)
    torch.manual_seed(0)
    model = Transformer(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.abs().mean()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    if cfg.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    values = config.assignments(config.DEFAULT) | {
        key: value for key, value in vars(cfg).items() if key not in ("origin",)
    }
    return dict(config=values, tokenizer=tokenizer, model=weights, step=7, tokens=448)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ternary=False, tie_embeddings=False, rope_theta=500.0, norm_eps=1e-3),
        dict(vocab_multiple=64),
        dict(n_kv_head=4, tie_embeddings=False),
    ],
)
def test_transformers_computes_the_same_bits(changes, tmp_path):
    """bugs guarded: a scale inverted, rows packed in another order, a norm or a position constant left at
    transformers' default, rows of padding in the vocabulary, a head that is not tied"""
    part = part_of(**changes)
    part["config"]["sample_prompts"] = ["na\u00efve", "a"]  # of which the tokenizer knows one
    hf.write(part, str(tmp_path / "x"))
    found = verify.hf(part, str(tmp_path / "x"))
    assert found["max_difference"] == 0.0 and found["same"] == found["tokens"] == verify.NEW
    assert found["logits_std"] > 0.01 and found["good"]
    theirs = json.load(open(tmp_path / "x" / "config.json"))
    assert theirs["vocab_size"] == len(CHARS) and "pad_token_id" not in theirs
    assert theirs["max_position_embeddings"] == part["config"]["seq_len"]
    # one token: where the head begins in memory decides in which order it is added
    if part["config"]["vocab_multiple"] == 1:
        ours = restore(part, "cpu")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
        with torch.no_grad(), torch._dynamo.config.patch(disable=True):
            for i in range(len(CHARS)):
                assert torch.equal(model(torch.tensor([[i]])).logits, ours(torch.tensor([[i]])))
    if part["config"]["ternary"]:
        size = os.path.getsize(tmp_path / "x" / "model.safetensors")
        ternary = sum(w.numel() for name, w in part["model"].items() if hf.is_ternary(part, name))
        assert size < ternary / 4 + 4 * (len(CHARS) * 64 * 2 + 5 * 64) + 6000, "four codes to a byte"


def test_the_verdict(data_dir, out_dir, tmp_path):
    """bugs guarded: BAD that is told as good: by a bit of the weights, by the loss alone, by the tokenizer,
    by the exit code"""
    from safetensors.torch import load_file, save_file

    part, path = part_of(), tmp_path / "x"
    part["config"]["sample_prompts"] = ["a cat"]
    hf.write(part, str(path))
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(weights | {name: weights[name].nextafter(torch.tensor(9.0))}, path / "model.safetensors")
    assert not verify.hf(part, str(path))["good"]

    model, tokenizer = restore(part, "cpu"), make_tokenizer(part["tokenizer"])
    tokenize, go_on = lambda text: encode_prompt(tokenizer, 0, text), lambda ids, n: [0] * n
    x = torch.arange(12)[None]
    for other, good in ((1.0, True), (1.1, False)):
        logits = lambda ids: model(ids) * (1.0 if len(ids) == 2 else other)  # noqa: E731, B023
        found = verify.compare(part, [(x, x)], part, 0.0, "reader", logits, tokenize, go_on)
        assert found["max_difference"] == 0 and found["good"] == good
    with pytest.raises(SystemExit) as end:
        verify.compare(part, [], part, 0.0, "reader", model, lambda text: tokenize(text)[1:], go_on)
    assert end.value.code == 1
    train(data_dir, out_dir, "r", max_steps=1, sample_every=0)
    flags = [f"--ckpt={out_dir}/r", "--format=hf", f"--out={tmp_path}/y", "--verify"]
    run("export.py", *flags, code=1, patch="import verify\nverify.hf = lambda *args: dict(good=False)")


@pytest.mark.parametrize("ternary", [False, True])
def test_a_mixture_is_a_mixtral(ternary, tmp_path):
    """bugs guarded: gate and up exchanged, experts of another order, weights of the chosen that do not sum
    to 1; ternary experts written as latent weights"""
    part = part_of(n_expert=4, n_expert_active=2, ternary=ternary)
    hf.write(part, str(tmp_path / "x"))
    found = verify.hf(part, str(tmp_path / "x"))
    assert found["good"] and found["max_difference"] < 1e-5 * found["logits_std"]
    hf.write(part, str(tmp_path / "latent"), latent=True)
    assert verify.hf(part, str(tmp_path / "latent"), latent=True)["good"]
    # another model is not good
    part["model"]["blocks.1.ffn.up_proj.weight"] = -part["model"]["blocks.1.ffn.up_proj.weight"]
    windows = [(x[None, :-1], x[None, 1:]) for x in verify.probe(part)]
    found = verify.hf(part, str(tmp_path / "x"), windows=windows)
    assert not found["good"] and found["val_loss"] != found["reader_val_loss"]
    with pytest.raises(SystemExit):
        hf.write(part_of(n_expert=4, n_expert_active=1), str(tmp_path / "y"))


def test_widths_that_cannot_be_packed(tmp_path, capsys):
    """bugs guarded: a traceback of pack; a refusal of what is not packed; a folder that stays"""
    part = part_of(ffn_dim=66)
    with pytest.raises(SystemExit):
        hf.write(part, str(tmp_path / "x"))
    assert "66 rows, no multiple of 4" in capsys.readouterr().err and not os.listdir(tmp_path)
    hf.write(part, str(tmp_path / "x"), latent=True)
    found = hf.read(str(tmp_path / "x"))["model"]
    assert all(torch.equal(w, found[name]) for name, w in part["model"].items())
    hf.write(part_of(ffn_dim=66, ternary=False), str(tmp_path / "y"))


# tokenizers


def sentencepiece(**changes):
    spm = pytest.importorskip("sentencepiece")
    text = ["the cat sat on the mat", "a dog, 12 birds and the cat", "once  upon a time"] * 30
    out = io.BytesIO()
    how = dict(
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **how | changes)
    return dict(kind="sentencepiece", sha256="x", eot=2, content=out.getvalue())


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(model_type="unigram", vocab_size=280), "is no BPE model"),
        (dict(normalization_rule_name="nmt_nfkc"), "normalises text"),
        (dict(remove_extra_whitespaces=True), "normalises text"),
        (dict(user_defined_symbols=["<sep>"]), "user-defined symbols"),
    ],
)
def test_other_sentencepiece_models_are_refused(changes, says, tmp_path, capsys):
    """bug guarded: files whose readers split text otherwise, without a word"""
    part = part_of(sentencepiece(**changes), vocab_size=320)
    for write, more in ((hf.write, ()), (gguf_file.write, ("f32", "f32"))):
        with pytest.raises(SystemExit):
            write(part, str(tmp_path / "x"), *more)
        assert says in capsys.readouterr().err and not os.path.exists(tmp_path / "x")


def tiktoken(pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"):
    """a byte-level BPE with merges of its own, named as GPT-2's"""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"the", b" t", b" the", b"at", b"cat", b" cat", b"12", b"1212"]
    content = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    spec = dict(kind="tiktoken", sha256="x", name="gpt2", content=content, pattern=pattern)
    return spec | dict(special={"<|endoftext|>": len(tokens)}, eot=len(tokens))


TEXTS = [
    "the cat",
    "",
    " ",
    "  two  spaces",
    "a line\nand\n\nanother ",
    "12 birds, 1212",
    "na\u00efve \u65e5\u672c \U0001f642",
    "\ttab",
]


NUL = dict(kind="char", sha256="x", eot=3, chars="the\0 ca12,\n")


@pytest.mark.parametrize(
    "make",
    [
        lambda: CHAR,
        lambda: NUL,
        sentencepiece,
        tiktoken,
        lambda: tiktoken(r"\p{N}{1,3}+| ?\p{L}++|[^\p{N}\p{L}]++"),
    ],
)
def test_tokenizers_come_along(make, tmp_path):
    """bugs guarded: numbers cut otherwise by a quantifier that the libraries read differently; merges in
    another order, a space put before or lost, bytes for unknown characters, an end-of-text token that is
    missing before a text"""
    spec = make()
    ours = make_tokenizer(spec)
    tokenizer_files.write(spec, str(tmp_path), 64)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choice("the cat 12,\n") for _ in range(60)) for _ in range(50)]
    texts += ["a cat", "the\nthe cat "]
    texts = [text for text in texts if not set(text) - set(spec.get("chars", text))]
    for text in texts:
        ids = encode_prompt(ours, spec["eot"], text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode([i for i in ids if i != ids[0]])
    assert theirs.pad_token is None and theirs.eos_token_id == spec["eot"] and theirs.model_max_length == 64
    assert "\0" not in theirs.eos_token, "a tool that prints names would end there"


@pytest.mark.parametrize("make", [lambda: CHAR, sentencepiece, tiktoken])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ternary=False),
        dict(ternary=False, vocab_multiple=128),
        dict(vocab_multiple=128, tie_embeddings=False),
    ],
)
def test_an_export_is_a_model_of_ours_too(make, changes, tmp_path, capsys):
    """bugs guarded: packed weights that are read as others, a tokenizer that comes back as another, rows of
    padding that are missed; damage that is not noticed"""
    spec, path = make(), tmp_path / "x"
    content = spec.get("content", b"")
    spec |= dict(sha256=hashlib.sha256(content).hexdigest())
    part = part_of(spec, vocab_size=320 if content else len(CHARS), **changes)
    part["config"]["data_dir"] = "/home/me/data"
    hf.write(part, str(path))
    for name in ("config.json", "generation_config.json"):
        theirs = json.load(open(path / name))
        assert theirs["bos_token_id"] == theirs["eos_token_id"] == spec["eot"]
    found, where = checkpoint.trained(str(path))
    assert where == str(path) and found["step"] == 7 and "/home/me" not in (path / "config.json").read_text()
    assert found["tokenizer"] == spec | ({"file": tokenizer_files.CONTENT[spec["kind"]]} if content else {})
    x = verify.probe(part)
    with torch.no_grad():
        ours = restore(part, "cpu", packed=part["config"]["ternary"])
        theirs = restore(found, "cpu", packed=True)
        assert theirs.head.weight.shape == ours.head.weight.shape
        assert (theirs.head.weight is theirs.embed.weight) == part["config"]["tie_embeddings"]
        assert torch.equal(theirs(x), ours(x)) and torch.equal(theirs(x[:1, :1]), ours(x[:1, :1]))
    if part["config"]["ternary"]:
        with pytest.raises(SystemExit):
            restore(found, "cpu")
        assert "only the integers are left" in capsys.readouterr().err
    if content:
        (path / tokenizer_files.CONTENT[spec["kind"]]).write_bytes(content[:-1])
        with pytest.raises(SystemExit):
            checkpoint.trained(str(path))
        assert "is not the one that belongs there" in capsys.readouterr().err
        os.remove(path / tokenizer_files.CONTENT[spec["kind"]])
        with pytest.raises(SystemExit):
            checkpoint.trained(str(path))
        assert "is missing" in capsys.readouterr().err


# GGUF

cyllama = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="needs cyllama: requirements-dev.txt"
)


@cyllama
@pytest.mark.parametrize(
    "changes, make",
    [
        ({}, lambda: CHAR),
        (dict(ternary=False, tie_embeddings=False, rope_theta=500.0, norm_eps=1e-3), sentencepiece),
        (dict(n_head=2, n_kv_head=1), tiktoken),
        (dict(ternary=False, n_expert=4, n_expert_active=2), lambda: CHAR),
    ],
)
def test_llama_cpp_computes_the_same(changes, make, tmp_path):
    """bugs guarded: rows of q and k in the other rotary order, k permuted by the heads of q, a constant left
    at its default, a tokenizer that llama.cpp reads otherwise"""
    spec = make()
    vocab_size = 320 if make is sentencepiece else 266 if make is tiktoken else len(CHARS)
    part = part_of(spec, vocab_size=vocab_size, **changes)
    part["config"]["sample_prompts"] = ["the cat", "a"] if spec is CHAR else TEXTS[2:]
    gguf_file.write(part, str(tmp_path / "x.gguf"), "f32", "f32")
    found = verify.gguf(part, str(tmp_path / "x.gguf"), "f32", "f32")
    assert found["good"] and found["max_difference"] < 1e-4 and found["logits_std"] > 0.01
    gguf_file.write(part, str(tmp_path / "x.gguf"), "f16", "f16")
    assert verify.gguf(part, str(tmp_path / "x.gguf"), "f16", "f16")["good"]


@pytest.mark.parametrize("make", [lambda: NUL, sentencepiece, tiktoken])
def test_what_a_file_says_of_tokens(make, tmp_path):
    """bugs guarded: an end of text that is another token, or is printed; a context of another length"""
    gguf = pytest.importorskip("gguf")
    spec, path = make(), str(tmp_path / "x.gguf")
    part = part_of(spec, vocab_size=400)
    gguf_file.write(part, path, "f16", "f16")
    fields = gguf.GGUFReader(path).fields
    says = lambda name: fields[name].contents()  # noqa: E731
    assert says("tokenizer.ggml.eos_token_id") == says("tokenizer.ggml.bos_token_id") == spec["eot"]
    kinds, names = says("tokenizer.ggml.token_type"), says("tokenizer.ggml.tokens")
    assert kinds[spec["eot"]] == gguf.TokenType.CONTROL and kinds[-1] == gguf.TokenType.UNUSED
    assert len(kinds) == len(set(names)) == 400 and "\0" not in names[spec["eot"]]
    assert says("llama.context_length") == part["config"]["seq_len"]


def test_the_smallest_type():
    assert gguf_file.smallest(part_of(n_embd=256, ffn_dim=512)) == "tq2_0"
    assert gguf_file.smallest(part_of()) == "q2_0" and gguf_file.smallest(part_of(ffn_dim=96)) == "f16"
    assert gguf_file.smallest(part_of(n_embd=256, ffn_dim=512, ternary=False)) == "f16"


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "q2_0"])
def test_codes_are_in_the_file(kind, tmp_path):
    """bug guarded: codes or scales that a reader decodes to other values"""
    gguf = pytest.importorskip("gguf")
    width = 64 if kind == "q2_0" else 256
    part = part_of(n_embd=width, ffn_dim=2 * width, n_layer=1)
    path = str(tmp_path / "x.gguf")
    gguf_file.write(part, path, kind, "q8_0")
    w = part["model"]["blocks.0.ffn.gate_proj.weight"]
    codes, s = quant.ternarize(w)
    if kind == "q2_0":  # the package cannot read it: decoded by hand
        raw = gguf_file.q2_0(codes.numpy(), 1 / s.item()).reshape(-1, 18)
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        parts = [(raw[:, 2:] >> shift & 3).astype(int) - 1 for shift in (0, 2, 4, 6)]
        decoded = np.stack(parts, -1).reshape(codes.shape)
        assert (decoded == codes.numpy()).all() and (scale == np.float16(1 / s.item())).all()
        assert open(path, "rb").read().find(raw.tobytes()) > 0
        return
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_gate.weight")
    decoded = gguf.quants.dequantize(found.data, found.tensor_type)
    assert found.tensor_type.name == kind.upper()
    assert (decoded == codes.numpy() * np.float32(np.float16(1 / s.item()))).all()


# the command


def test_the_command(data_dir, out_dir, tmp_path):
    """bugs guarded: an export that replaces the user's folder; a card without the run's losses; latent
    weights that come back changed"""
    how = dict(max_steps=6, eval_every=3, sample_every=0, n_embd=64, ffn_dim=64)
    train(data_dir, out_dir, "r", **how)
    train(data_dir, out_dir, "f", **how, ternary=False)
    ckpt, out = f"--ckpt={out_dir}/r", tmp_path / "packed"
    where = f"--data_dir={data_dir}"
    text, _ = run("export.py", ckpt, "--format=hf", f"--out={out}", "--verify", where, "--eval_tokens=64")
    found = json.loads(text.strip().split("\n")[-1])
    assert found["max_difference"] == 0.0 and found["same"] == found["tokens"]
    assert found["val_loss"] == found["reader_val_loss"] and found["val_tokens"] == 64
    scored = run("evaluate.py", ckpt, where, "--eval_tokens=64")[0].strip().split("\n")[-1]
    assert json.loads(scored)["val_loss"] == pytest.approx(found["val_loss"], abs=1e-5)
    card = open(out / "README.md", encoding="utf-8").read()
    losses = [row["val_loss"] for row in lines(f"{out_dir}/r", SCALARS) if "val_loss" in row]
    twin = [row["val_loss"] for row in lines(f"{out_dir}/f", SCALARS) if "val_loss" in row]
    assert f"this one is {losses[-1] - twin[-1]:+.4f} from it" in card
    assert (
        f"| 6 | {losses[-1]:.4f} |" in card
        and "twin `f`" in card
        and "max_steps = 6" in card
        and str(tmp_path) not in card
    )
    flags = ["--prompt=a", "--temperature=0", "--max_new_tokens=8"]
    assert run("sample.py", f"--ckpt={out}", *flags)[0] == run("sample.py", ckpt, *flags)[0]
    scores = [run("evaluate.py", each, f"--data_dir={data_dir}")[0] for each in (f"--ckpt={out}", ckpt)]
    assert len({text.strip().split("\n")[-1] for text in scores}) == 1, scores
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", code=2)
    assert "is there already" in err and "--force" in err
    (out / "notes.txt").write_text("mine")
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", "--force", code=2)
    assert "no earlier export" in err and (out / "notes.txt").exists()
    os.remove(out / "notes.txt")
    assert oct(os.stat(out / "model.safetensors").st_mode) == oct(os.stat(out / "config.json").st_mode)
    # what somebody puts there while the export is written, too
    diary = tmp_path / "mine" / "diary.txt"
    slow = f"""
import os, hf
real = hf.write
def write(*args):
    real(*args)
    os.makedirs({str(diary.parent)!r}, exist_ok=True)
    open({str(diary)!r}, "w").close()
hf.write = write
"""
    for more in ([], ["--force"], ["--force"]):
        _, err = run("export.py", ckpt, "--format=hf", f"--out={diary.parent}", *more, code=2, patch=slow)
        assert "no earlier export" in err and diary.exists()
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
    text, _ = run(
        "export.py", ckpt, "--format=hf", f"--out={out}", "--force", "--latent", "--verify", "--eval_tokens=0"
    )
    assert (
        "good" in text
        and "no loss is compared" in text
        and not [name for name in os.listdir(tmp_path) if "tmp" in name]
    )
    # nor does a rename that fails take an earlier export away
    stuck = f"""
import os
real = os.rename
def rename(a, b):
    if b == {str(out)!r} and not a.endswith(".old"): raise OSError("stuck")
    real(a, b)
os.rename = rename
"""
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", "--force", code=1, patch=stuck)
    assert "cannot be written: stuck" in err and hf.is_ours(str(out))
    # a full disk leaves what was there, and nothing of its own
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    for more in (
        ["--format=hf", f"--out={out}"],
        ["--format=gguf", f"--out={tmp_path}/full.gguf", "--type=f16"],
    ):
        _, err = run("export.py", ckpt, *more, "--force", code=1, patch=full)
        assert "cannot be written" in err
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name or "full" in name]
    # the latent weights come back bit for bit, and a run goes on from them
    before = checkpoint.load(checkpoint.locate(f"{out_dir}/r"))["model"]
    after = hf.read(str(out))["model"]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    train(data_dir, out_dir, "again", **how | dict(max_steps=1), init_from=out)
    # a file for llama.cpp: the smallest type that fits
    text, _ = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/x.gguf")
    assert "q2_0, embedding q8_0" in text and "needs a llama.cpp of 2026" in text
    (tmp_path / "mine.gguf").write_text("mine")
    _, err = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/mine.gguf", "--force", code=2)
    assert "no earlier export" in err and (tmp_path / "mine.gguf").read_text() == "mine"
    _, err = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/y.gguf", "--type=tq2_0", code=2)
    assert "blocks of 256" in err and "--type=q2_0" in err and not os.path.exists(tmp_path / "y.gguf")
    _, err = run(
        "export.py", f"--ckpt={out_dir}/f", "--format=gguf", f"--out={tmp_path}/y.gguf", "--type=q2_0", code=2
    )
    assert "this is a float model" in err
    for flags, says in (
        (["--format=onnx", f"--out={tmp_path}/z"], "format = 'onnx' is unknown"),
        (["--format=hf", f"--out={tmp_path}/z", "--type=f16"], "--type is of --format=gguf"),
        (["--format=hf", f"--out={tmp_path}/no/z"], "make it first"),
        (["--format=hf"], "--out=... is missing"),
        (["--format=hf", "--out="], "is no name"),
        (["--format=gguf", f"--out={tmp_path}/x"], "must end in .gguf"),
    ):
        assert says in run("export.py", ckpt, *flags, code=2)[1]


def test_only_what_export_wrote_is_replaced(tmp_path, capsys):
    """bugs guarded: --force that takes a model away which was trained further, or downloaded; weights that
    changed on the disk and begin a run without a word"""
    gguf = pytest.importorskip("gguf")
    part, place, file = part_of(), str(tmp_path / "x"), str(tmp_path / "x.gguf")
    hf.write(part, place, latent=True)
    gguf_file.write(part, file, "f16", "f16")
    assert hf.is_ours(place) and gguf_file.is_ours(file)
    os.symlink(place, tmp_path / "link")
    assert not hf.is_ours(str(tmp_path / "link"))
    hf.read(place, to_train=True)
    assert "trained further, or damaged" not in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(place)
    other = gguf.GGUFWriter(file, "llama")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    assert not hf.is_ours(place) and not gguf_file.is_ours(file)
    hf.read(place, to_train=True)
    assert "trained further, or damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, kind, says",
    [
        ({}, "q4_0", "q2_0"),
        ({}, "q5_0", "q2_0"),
        (dict(tokenizer=CHAR | dict(chars="ab \u2581")), "f16", "U+2581 are one"),
        (dict(tokenizer=tiktoken() | dict(name="cl100k_base"), vocab_size=266), "f16", "'cl100k_base'"),
        (dict(n_embd=48), "f16", "embed = 'q8_0' has blocks of 32"),
    ],
)
def test_what_no_file_of_llama_cpp_holds(changes, kind, says, capsys):
    """bugs guarded: codes rounded once more; two tokens of one name, on which llama.cpp aborts; text that it
    would split otherwise"""
    with pytest.raises(SystemExit):
        gguf_file.check(part_of(**changes), kind, "q8_0")
    assert says in capsys.readouterr().err


def test_foreign_folders_are_refused(data_dir, out_dir, tmp_path):
    """bug guarded: a folder that is packed, damaged or another model, that begins a run all the same"""
    part, how = part_of(n_embd=32, ffn_dim=64, seq_len=16), dict(max_steps=1, sample_every=0)

    def folder(name, latent=True, **changes):
        path = tmp_path / name
        hf.write(part, str(path), latent)
        theirs = json.load(open(path / "config.json")) | changes
        (path / "config.json").write_text(json.dumps(theirs))
        return path

    short = folder("short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[: len(data) // 2])
    for path, says in (
        (folder("packed", latent=False), "export with --latent"),
        (folder("other", model_type="gpt2"), "only 'llama' can be read"),
        (folder("bias", attention_bias=True), "attention_bias = True"),
        (folder("wide", intermediate_size=72, nanobit={}), "has the shape"),
        (folder("turn", rope_parameters=dict(rope_type="llama3"), nanobit={}), "rope_type = 'llama3'"),
        (folder("heads", head_dim=16, nanobit={}), "head_dim = 16"),
        (folder("gelu", hidden_act="gelu", nanobit={}), "hidden_act = 'gelu'"),
        (short, "is damaged"),
    ):
        _, err = train(data_dir, out_dir, "x", code=2, init_from=path, **how)
        assert says in err and str(path) in err, err
    flipped = folder("flipped", latent=False)
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (flipped / "model.safetensors").write_bytes(data)
    other = dict(quantization_config=dict(quant_method="gptq"))
    for path, says in (
        (short, "is damaged"),
        (folder("foreign", nanobit={}), "it is no export of export.py"),
        (folder("gptq", latent=False, **other), "only weights that export.py"),
        (folder("deep", latent=False, num_hidden_layers=3), "beside it 3"),
        (flipped, "is not the file that was exported"),
        (folder("head", latent=False, num_attention_heads=2), "beside it 2"),
        (folder("null", latent=False, nanobit=dict(tokenizer=None)), "cannot be read"),
        (folder("layers", latent=False, nanobit=dict(config=dict(n_layer="two"))), "n_layer = 'two'"),
        (folder("empty", latent=False, nanobit=None), "it is no export of export.py"),
        (folder("widthless", latent=False, hidden_size=None), "cannot be read"),
        (tmp_path / "none", "or an export for transformers"),
    ):
        _, err = run("sample.py", f"--ckpt={path}", "--prompt=a", code=2)
        assert says in err and str(path) in err, err
    # a Llama of another origin, whose tokenizer nobody can compare
    path = folder("llama", nanobit={})
    theirs = json.load(open(path / "config.json"))
    del theirs["rope_theta"]
    theirs["rope_parameters"] = dict(rope_theta=500.0, rope_type="default")  # where newer files have it
    (path / "config.json").write_text(json.dumps(theirs))
    assert hf.read(str(path), to_train=True)["config"]["rope_theta"] == 500.0
    how["rope_theta"] = 500.0
    same = dict(n_embd=32, ffn_dim=64, n_layer=2, n_head=4, n_kv_head=2)
    out, _ = train(data_dir, out_dir, "y", init_from=path, **how, **same)
    assert "its tokenizer cannot be compared" in out
    assert restore(part, torch.device("cpu"))(torch.tensor([[1, 2]])).isfinite().all()
