"""The folder for transformers: written, read by transformers, and read back."""

import hashlib
import json
import os

import pytest
import torch
from conftest import CHARS, run, train
from parts import CHAR, llama_like, part_of, sentencepiece, tiktoken

import config
from nanobit import weights
from nanobit.export import hf, llama, tokenizer_files, verify
from nanobit.infer.restore import restore
from nanobit.tokenizer import bos_of

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")


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
    """transformers computes the bits of the run from an export: scales, packing, constants, padding of the
    vocabulary and a tied head are its own."""
    part = part_of(**changes)
    part["config"]["sample_prompts"] = ["na\u00efve", "a"]  # of which the tokenizer knows one
    hf.write(part, str(tmp_path / "x"))
    found = verify.hf(part, str(tmp_path / "x"))
    assert found["max_difference"] == 0.0
    assert found["same"] == found["tokens"] == verify.NEW
    assert found["logits_std"] > 0.01
    assert found["good"]
    theirs = json.load(open(tmp_path / "x" / "config.json"))
    assert theirs["vocab_size"] == len(CHARS)
    assert "pad_token_id" not in theirs
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


@pytest.mark.parametrize("ternary", [False, True])
def test_a_mixture_is_a_mixtral(ternary, tmp_path):
    """A mixture is exported as a Mixtral that computes the same, and another model does not pass as the
    same."""
    part = part_of(n_expert=4, n_expert_active=2, ternary=ternary)
    hf.write(part, str(tmp_path / "x"))
    found = verify.hf(part, str(tmp_path / "x"))
    assert found["good"]
    assert found["max_difference"] < 1e-5 * found["logits_std"]
    hf.write(part, str(tmp_path / "latent"), latent=True)
    assert verify.hf(part, str(tmp_path / "latent"), latent=True)["good"]
    # another model is not good
    part["model"]["blocks.1.ffn.up_proj.weight"] = -part["model"]["blocks.1.ffn.up_proj.weight"]
    windows = [(x[None, :-1], x[None, 1:]) for x in verify.probe(part)]
    found = verify.hf(part, str(tmp_path / "x"), windows=windows)
    assert not found["good"]
    assert found["val_loss"] != found["reader_val_loss"]
    with pytest.raises(SystemExit):
        hf.write(part_of(n_expert=4, n_expert_active=1), str(tmp_path / "y"))


def test_widths_that_cannot_be_packed(tmp_path, capsys):
    """Widths that cannot be packed are refused in one line that leaves no folder; latent and float weights
    are written."""
    part = part_of(ffn_dim=66)
    with pytest.raises(SystemExit):
        hf.write(part, str(tmp_path / "x"))
    assert "66 rows, which is not a multiple of 4" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
    hf.write(part, str(tmp_path / "x"), latent=True)
    found = hf.read(str(tmp_path / "x"))["model"]
    assert all(torch.equal(w, found[name]) for name, w in part["model"].items())
    hf.write(part_of(ffn_dim=66, ternary=False), str(tmp_path / "y"))


@pytest.mark.parametrize("make", [lambda: CHAR, sentencepiece, tiktoken, llama_like])
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
    """An export is read back as the model and tokenizer of its run, and damage to it is noticed."""
    spec, path = make(), tmp_path / "x"
    content = spec.get("content", b"")
    spec |= dict(sha256=hashlib.sha256(content).hexdigest())
    part = part_of(spec, vocab_size=320 if content else len(CHARS), **changes)
    part["config"]["data_dir"] = "/home/me/data"
    hf.write(part, str(path))
    for name in ("config.json", "generation_config.json"):
        theirs = json.load(open(path / name))
        assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (bos_of(spec), spec["eot"])
    found, where = weights.trained(str(path))
    assert where == str(path)
    assert found["step"] == 7
    assert "/home/me" not in (path / "config.json").read_text()
    assert found["tokenizer"] == spec | ({"file": tokenizer_files.CONTENT[spec["kind"]]} if content else {})
    x = verify.probe(part)
    with torch.no_grad():
        ours = restore(part, "cpu", packed=part["config"]["ternary"])
        theirs = restore(found, "cpu", packed=True)
        assert theirs.head.weight.shape == ours.head.weight.shape
        assert (theirs.head.weight is theirs.embed.weight) == part["config"]["tie_embeddings"]
        assert torch.equal(theirs(x), ours(x))
        assert torch.equal(theirs(x[:1, :1]), ours(x[:1, :1]))
    if part["config"]["ternary"]:
        with pytest.raises(SystemExit):
            restore(found, "cpu")
        assert "only the integers are left" in capsys.readouterr().err
    if content:
        (path / tokenizer_files.CONTENT[spec["kind"]]).write_bytes(content[:-1])
        with pytest.raises(SystemExit):
            weights.trained(str(path))
        assert "is not the one that belongs there" in capsys.readouterr().err
        os.remove(path / tokenizer_files.CONTENT[spec["kind"]])
        with pytest.raises(SystemExit):
            weights.trained(str(path))
        assert "is missing" in capsys.readouterr().err


def changed(folder, **changes):
    """Return the folder, with these changes in its config.json."""
    theirs = json.load(open(folder / "config.json")) | changes
    (folder / "config.json").write_text(json.dumps(theirs))
    return folder


def refused(capsys, path, to_train):
    """Return the error line with which a folder is refused."""
    with pytest.raises(SystemExit) as end:
        (weights.initial if to_train else weights.trained)(str(path))
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert str(path) in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    return err


def test_foreign_folders_are_refused(data_dir, out_dir, tmp_path, capsys):
    """A folder that is packed, damaged or of another kind of model is refused by name; a Llama of another
    origin begins a run."""
    part, how = part_of(n_embd=32, ffn_dim=64, seq_len=16), dict(max_steps=1, sample_every=0)

    def folder(name, latent=True, **changes):
        hf.write(part, str(tmp_path / name), latent)
        return changed(tmp_path / name, **changes)

    short, headless, empty = folder("short"), folder("headless"), folder("no_weights")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[: len(data) // 2])
    (headless / "model.safetensors").write_bytes(data[:50])
    os.remove(empty / "model.safetensors")
    for path, says in (
        (folder("packed", latent=False), "export with --latent"),
        (folder("other", model_type="gpt2"), "only 'llama' can be read"),
        (folder("bias", attention_bias=True), "attention_bias = True"),
        (folder("wide", intermediate_size=72, nanobit={}), "has the shape"),
        (folder("grouped", num_key_value_heads=1, nanobit={}), "by its settings and model.py; copy or"),
        (folder("turn", rope_parameters=dict(rope_type="llama3"), nanobit={}), "rope_type = 'llama3'"),
        (folder("heads", head_dim=16, nanobit={}), "head_dim = 16"),
        (folder("gelu", hidden_act="gelu", nanobit={}), "hidden_act = 'gelu'"),
        (short, "is damaged"),
        (headless, "is damaged"),
        (empty, "holds no .safetensors"),
    ):
        assert says in refused(capsys, path, to_train=True)
    flipped = folder("flipped", latent=False)
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (flipped / "model.safetensors").write_bytes(data)
    other = dict(quantization_config=dict(quant_method="gptq"))
    for path, says in (
        (short, "is damaged"),
        (folder("foreign", nanobit={}), "it is not an export of export.py"),
        (folder("gptq", latent=False, **other), "only weights that export.py"),
        (folder("deep", latent=False, num_hidden_layers=3), "3, but its files hold 2 blocks"),
        (flipped, "is not the file that was exported"),
        (folder("head", latent=False, num_attention_heads=2), "beside it 2"),
        (folder("null", latent=False, nanobit=dict(tokenizer=None)), "cannot be read"),
        (folder("layers", latent=False, nanobit=dict(config=dict(n_layer="two"))), "n_layer = 'two'"),
        (folder("nothing", latent=False, nanobit=None), "it is not an export of export.py"),
        (folder("widthless", latent=False, hidden_size=None), "cannot be read"),
    ):
        assert says in refused(capsys, path, to_train=False)
    _, err = run("sample.py", f"--ckpt={tmp_path}/none", "--prompt=a", code=2)
    assert "or an export for transformers" in err
    assert f"{tmp_path}/none" in err
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


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_hidden_layers=10**7),
        dict(num_hidden_layers=0),
        dict(num_attention_heads=0),
        dict(num_attention_heads=-2),
        dict(num_key_value_heads=3),
        dict(hidden_size=2**62),
        dict(intermediate_size=2**23),
        dict(vocab_size=2**31),
        dict(max_position_embeddings=2**40),
        dict(rms_norm_eps=-1.0),
        dict(rope_theta=float("inf")),
        dict(tie_word_embeddings="yes"),
    ],
)
@pytest.mark.parametrize("to_train", [False, True])
def test_sizes_that_the_file_does_not_have_are_refused(changes, to_train, tmp_path, capsys, monkeypatch):
    """Sizes in config.json are compared with the tensors before a model is built."""
    monkeypatch.setattr(hf, "Transformer", None)  # nothing is built
    hf.write(part_of(), str(tmp_path / "x"), latent=True)
    theirs = json.load(open(tmp_path / "x" / "config.json"))
    ours = {llama.SETTINGS[name]: value for name, value in changes.items()}
    theirs["nanobit"]["config"] |= ours  # which agrees
    err = refused(capsys, changed(tmp_path / "x", **changes, nanobit=theirs["nanobit"]), to_train)
    assert err.count("\n") == 1
    assert next(iter(changes)) in err
    with pytest.raises(SystemExit):
        config.load([f"--init_from={tmp_path}/x", "--max_steps=1"])


@pytest.mark.parametrize("own", [dict(vocab_multiple=2**40), dict(vocab_multiple=0), dict(n_expert=10**8)])
def test_sizes_that_export_never_wrote_are_refused(own, tmp_path, capsys):
    """Padding and experts in the note of an export must be those of its tensors."""
    hf.write(part_of(), str(tmp_path / "x"))
    theirs = json.load(open(tmp_path / "x" / "config.json"))["nanobit"]
    theirs["config"] |= own
    assert f"{next(iter(own))} = " in refused(capsys, changed(tmp_path / "x", nanobit=theirs), to_train=False)


def test_deep_json_is_refused(tmp_path, capsys):
    """JSON that is nested too deeply is refused in one line."""
    hf.write(part_of(), str(tmp_path / "x"))
    (tmp_path / "x" / "config.json").write_text('{"a":' * 100_000)
    assert "cannot be read" in refused(capsys, tmp_path / "x", to_train=False)
