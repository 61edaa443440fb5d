"""Continuing a public Llama: a small one that transformers makes, with a tokenizer that has a bos."""

import json
import os

import export_faults
import pytest
import torch
from conftest import lines, run, write_data
from parts import llama_folder

import config
from nanobit import weights
from nanobit.export import hf
from nanobit.tokenizer import bos_of, encode_prompt, make_tokenizer

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
SHAPE = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=64, vocab_size=320, rope_theta=500.0)
SHAPE |= dict(norm_eps=1e-3, tie_embeddings=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {llama: the folder of a Llama, data: data sets of its tokenizer, runs}."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("llama", "data", "runs")}
    llama_folder(found["llama"])
    text = found["data"] / "text.jsonl"
    rows = [f"the cat sat on the mat, and {i} birds" for i in range(100)]
    text.write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows))
    flags = [f"--files={text}", f"--data_dir={found['data']}", "--workers=1", "--val_fraction=0.2"]
    run("prepare/text.py", *flags, f"--tokenizer={found['llama']}", "--name=books")
    return found


def settings(folders, *flags):
    return config.load([f"--init_from={folders['llama']}", "--max_steps=1", *flags])


def train_llama(folders, run_id, code=0, dataset="books", **changes):
    """Train the Llama, none of whose shape is set."""
    values = dict(
        data_dir=folders["data"], out_dir=folders["runs"], dataset=dataset, run_id=run_id, max_steps=2
    )
    values |= dict(
        init_from=folders["llama"], compile=False, device="cpu", dtype="float32", batch_size=2, log_every=1
    )
    values |= dict(seq_len=32, sample_every=1, sample_tokens=2, eval_every=1, eval_tokens=64, warmup_steps=10)
    flags = [f"--{key}={value}" for key, value in (values | changes).items()]
    return run("train.py", *flags, code=code)


def test_the_shape_is_that_of_the_llama(folders):
    """The shape is that of the Llama, with its origin; what the user sets is kept."""
    cfg = settings(folders, "--norm_eps=0.5")
    source = f"init_from {folders['llama']}"
    for key, value in (SHAPE | dict(norm_eps=0.5, seq_len=64)).items():
        assert getattr(cfg, key) == value, key
        assert type(getattr(cfg, key)) is type(value), key
        assert cfg.origin[key] == ("--norm_eps=0.5" if key == "norm_eps" else source)
    assert cfg.ternary
    assert cfg.origin["ternary"] == "default"


def test_seq_len_has_the_limit_of_the_llama(folders, capsys):
    """seq_len is at most the number of positions that the Llama was trained on."""
    assert settings(folders, "--seq_len=64").seq_len == 64
    with pytest.raises(SystemExit):
        settings(folders, "--seq_len=128")
    assert "seq_len = 128 is more than the 64 positions of init_from" in capsys.readouterr().err


def test_what_a_file_leaves_out_has_the_meaning_of_transformers(folders, tmp_path):
    """A setting that config.json leaves out has the default of transformers, not ours."""
    theirs = json.load(open(folders["llama"] / "config.json"))
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "num_key_value_heads"):
        del theirs[key]
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    default = transformers.LlamaConfig()
    cfg = config.load([f"--init_from={tmp_path}", "--max_steps=1"])
    assert (cfg.norm_eps, cfg.tie_embeddings, cfg.n_kv_head) == (default.rms_norm_eps, False, 4)
    assert cfg.rope_theta == default.rope_parameters["rope_theta"]


def test_what_disagrees_is_named_all_together(folders, data_dir):
    """All settings that disagree with the Llama are reported together, the tokenizer among them."""
    os.makedirs(folders["data"] / "tiny", exist_ok=True)
    changes = dict(n_layer=3, ffn_dim=128, rope_theta=10000.0, data_dir=data_dir)
    _, err = train_llama(folders, "x", code=2, dataset="tiny", sample_every=0, **changes)
    for text in ("n_layer = 3", "ffn_dim = 128", "rope_theta = 10000.0", "the tokenizer of dataset = 'tiny'"):
        assert text in err
    assert err.count("error: init_from") == 4
    large = write_data(folders["data"] / "large", vocab_size=400)
    err = train_llama(folders, "x", code=2, dataset="tiny", data_dir=large, sample_every=0)[1]
    assert "vocab_size = 320 is less than the 400 ids" in err
    assert "prepare the data set with the tokenizer there" in err


def test_a_run_begins_with_the_llama(folders, tmp_path):
    """A run begins with the weights and tokenizer of the Llama, and its export keeps the bos."""
    out, _ = train_llama(folders, "float", ternary=False)
    assert "cannot be compared" not in out
    assert "texts begin with" not in out
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"]).eval()
    meta = json.load(open(folders["data"] / "books" / "meta.json"))
    _, windows = hf_windows(folders)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(x).logits[0], y[0]).item() for x, y in windows]
    first = next(
        row for row in lines(folders["runs"] / "float", "metrics/scalars.jsonl") if "val_loss" in row
    )
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    part, _ = weights.trained(str(folders["runs"] / "float"))
    assert (part["tokenizer"]["bos"], part["tokenizer"]["eot"]) == (meta["bos"], meta["eot"]) == (1, 2)
    hf.write(part, str(tmp_path / "x"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    ours = make_tokenizer(part["tokenizer"])
    assert theirs("the cat")["input_ids"] == encode_prompt(ours, 1, "the cat")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def hf_windows(folders):
    """Return (meta, validation windows) that a run of 32 tokens and 64 for an evaluation reads."""
    part = dict(config=vars(settings(folders, "--seq_len=32", "--dataset=books")), tokenizer=books(folders))
    found, windows = weights.data_of(part, "val", data_dir=str(folders["data"]))
    return found, list(windows.fixed(64, 1, torch.device("cpu")))


def books(folders):
    meta = json.load(open(folders["data"] / "books" / "meta.json"))
    return meta["tokenizer"] | {key: meta[key] for key in ("eot", "bos")}


def test_samples_of_a_run_begin_with_bos(folders):
    """Samples while training, and the texts of tasks, begin with bos as the data do."""
    values = dict(
        init_from=folders["llama"], data_dir=folders["data"], out_dir=folders["runs"], dataset="books"
    )
    values |= dict(
        run_id="spied", max_steps=1, device="cpu", compile=False, batch_size=1, seq_len=16, eval_every=0
    )
    out, _ = run(
        "train.py", *(f"--{k}={v}" for k, v in values.items()), patch=export_faults.spy_on_prompts("generate")
    )
    assert "begins 1" in out
    words = folders["data"] / "words.jsonl"
    words.write_text('{"text": "the cat sat"}\n')
    run("prepare/lambada.py", f"--files={words}", f"--data_dir={folders['data']}", "--name=words")
    flags = [f"--ckpt={folders['runs']}/spied", f"--data_dir={folders['data']}", "--dataset=words"]
    assert "begins 1" in run("evaluate.py", *flags, patch=export_faults.spy_on_prompts("tasks.text"))[0]


def test_a_llama_is_used_as_it_is(folders):
    """sample.py writes from a Llama the text that transformers writes."""
    part, _ = weights.trained(str(folders["llama"]))
    assert bos_of(part["tokenizer"]) == 1
    assert not part["config"]["ternary"]
    ids = encode_prompt(make_tokenizer(part["tokenizer"]), 1, "the cat")
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"]).eval()
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[
        0
    ].tolist()
    text = make_tokenizer(part["tokenizer"]).decode(made[1:])
    flags = ["--prompt=the cat", "--temperature=0", "--max_new_tokens=8", "--device=cpu"]
    assert run("sample.py", f"--ckpt={folders['llama']}", *flags)[0] == text + "\n"


def test_data_of_another_layout_is_reported(folders):
    """A data set whose texts begin with another token than those of the Llama is reported."""
    books = folders["data"] / "books"
    old = folders["data"] / "old"
    os.makedirs(old)
    meta = json.load(open(books / "meta.json"))
    for name in [*meta["shards"], "tokenizer.model"]:
        (old / name).write_bytes((books / name).read_bytes())
    del meta["bos"]
    (old / "meta.json").write_text(json.dumps(meta))
    out, _ = train_llama(folders, "old", dataset="old", max_steps=1, eval_every=0, sample_every=0)
    assert "its texts begin with token 1, those of dataset = 'old' with 2" in out
