"""export.py: the command, what it replaces, and the verdict of --verify."""

import json
import os

import pytest
import torch
from conftest import lines, run, train, write_data
from parts import part_of

from nanobit import checkpoint
from nanobit.export import gguf_file, hf, verify
from nanobit.infer.restore import restore
from nanobit.record import SCALARS
from nanobit.tokenizer import encode_prompt, make_tokenizer

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
HOW = dict(max_steps=6, eval_every=3, sample_every=0, n_embd=64, ffn_dim=64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """data_dir, and out_dir with a run `r` and its float twin `f`"""
    folder = tmp_path_factory.mktemp("runs")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "r", **HOW)
    train(data_dir, out_dir, "f", **HOW, ternary=False)
    return data_dir, out_dir


def test_the_command(runs, tmp_path):
    """bugs guarded: a card without the run's losses; an export that computes something else than its run"""
    data_dir, out_dir = runs
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
        and os.path.dirname(out_dir) not in card
    )
    flags = ["--prompt=a", "--temperature=0", "--max_new_tokens=8"]
    assert run("sample.py", f"--ckpt={out}", *flags)[0] == run("sample.py", ckpt, *flags)[0]
    scores = [run("evaluate.py", each, f"--data_dir={data_dir}")[0] for each in (f"--ckpt={out}", ckpt)]
    assert len({text.strip().split("\n")[-1] for text in scores}) == 1, scores
    assert oct(os.stat(out / "model.safetensors").st_mode) == oct(os.stat(out / "config.json").st_mode)


def test_what_is_there_stays(runs, tmp_path):
    """bugs guarded: an export that replaces the user's folder or file, or what somebody puts in its place
    meanwhile; a full disk, Ctrl-C, or a rename that fails, that costs an earlier export or leaves remains"""
    ckpt, out = f"--ckpt={runs[1]}/r", tmp_path / "packed"
    run("export.py", ckpt, "--format=hf", f"--out={out}")
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", code=2)
    assert "is there already" in err and "--force" in err
    (out / "notes.txt").write_text("mine")
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", "--force", code=2)
    assert "no earlier export" in err and (out / "notes.txt").exists()
    os.remove(out / "notes.txt")
    # what somebody puts there while the export is written, too
    diary = tmp_path / "mine" / "diary.txt"
    slow = f"""
import os; from nanobit.export import hf
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
    (tmp_path / "mine.gguf").write_text("mine")
    _, err = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/mine.gguf", "--force", code=2)
    assert "no earlier export" in err and (tmp_path / "mine.gguf").read_text() == "mine"
    # a rename that fails takes no earlier export away
    stuck = f"""
import os
real = os.replace
def replace(a, b):
    if b == {str(out)!r}: raise OSError("stuck")
    real(a, b)
os.replace = replace
"""
    _, err = run("export.py", ckpt, "--format=hf", f"--out={out}", "--force", code=1, patch=stuck)
    assert "cannot be written: stuck" in err and hf.is_ours(str(out))
    for module in ("hf", "gguf_file"):
        stop = f"import os, signal, {module} as writer\nreal = writer.write\n"
        stop += "def write(*args): real(*args); os.kill(os.getpid(), signal.SIGINT)\nwriter.write = write"
        place = f"{tmp_path}/new.gguf" if module == "gguf_file" else out
        flags = [f"--format={module.removesuffix('_file')}", f"--out={place}", "--force"]
        run("export.py", ckpt, *flags, code=130, patch=stop)
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name or "new" in name]
    # a full disk leaves what was there, and nothing of its own
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    for more in (
        ["--format=hf", f"--out={out}"],
        ["--format=gguf", f"--out={tmp_path}/full.gguf", "--type=f16"],
    ):
        _, err = run("export.py", ckpt, *more, "--force", code=1, patch=full)
        assert "cannot be written" in err
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name or "full" in name]
    assert hf.is_ours(str(out))
    assert "quantization_config" in (out / "config.json").read_text()
    run("export.py", ckpt, "--format=hf", f"--out={out}", "--force", "--latent")
    assert "quantization_config" not in (out / "config.json").read_text()
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_ctrl_c_after_the_rename_is_too_late(format, runs, tmp_path):
    """bug guarded: an export that is whole, whose command ends as if it were not, and then wants --force"""
    out = f"{tmp_path}/x.gguf" if format == "gguf" else f"{tmp_path}/x"
    late = f"""
import os, signal
real = os.rename
def rename(a, b):
    real(a, b)
    if b == {out!r}: os.kill(os.getpid(), signal.SIGINT)
os.rename = rename
"""
    text, _ = run("export.py", f"--ckpt={runs[1]}/r", f"--format={format}", f"--out={out}", patch=late)
    assert text.startswith(f"wrote {out}")


def test_all_missing_packages_are_named_at_one_time(runs, tmp_path):
    """bug guarded: pip install, the same command, the next package"""
    gone = "import sys\n"
    gone += "for name in ('safetensors', 'tokenizers', 'gguf', 'transformers'): sys.modules[name] = None"
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={tmp_path}/x"]
    _, err = run("export.py", *flags, "--verify", code=2, patch=gone)
    assert "pip install safetensors tokenizers transformers, or" in err and '".[export,verify]"' in err
    assert err.count("\n") == 1
    _, err = run("export.py", *flags, code=2, patch=gone)
    assert "pip install safetensors tokenizers, or" in err and '".[export]"' in err


def test_latent_weights_come_back(runs, tmp_path):
    """bug guarded: master weights that come back changed, or not in a run"""
    data_dir, out_dir = runs
    ckpt, out = f"--ckpt={out_dir}/r", tmp_path / "latent"
    text, _ = run("export.py", ckpt, "--format=hf", f"--out={out}", "--latent", "--verify", "--eval_tokens=0")
    assert "good" in text and "no loss is compared" in text
    before = checkpoint.load(checkpoint.locate(f"{out_dir}/r"))["model"]
    after = hf.read(str(out))["model"]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    train(data_dir, str(tmp_path), "again", **HOW | dict(max_steps=1), init_from=out)


def test_types_and_flags(runs, tmp_path):
    """bugs guarded: a type that cannot hold the model; a flag of the other format that is ignored"""
    out_dir, ckpt = runs[1], f"--ckpt={runs[1]}/r"
    # a file for llama.cpp: the smallest type that fits
    text, _ = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/x.gguf")
    assert "q2_0, embedding q8_0" in text and "needs a llama.cpp of 2026" in text
    _, err = run("export.py", ckpt, "--format=gguf", f"--out={tmp_path}/y.gguf", "--type=tq2_0", code=2)
    assert "blocks of 256" in err and "--type=q2_0" in err and not os.path.exists(tmp_path / "y.gguf")
    _, err = run(
        "export.py", f"--ckpt={out_dir}/f", "--format=gguf", f"--out={tmp_path}/y.gguf", "--type=q2_0", code=2
    )
    assert "this is a float model" in err
    for flags, says in (
        (["--format=onnx", f"--out={tmp_path}/z"], "format = 'onnx' is unknown"),
        (
            ["--format=hf", f"--out={tmp_path}/z", "--type=f16"],
            "--type only applies together with --format=gguf",
        ),
        (["--format=hf", f"--out={tmp_path}/no/z"], "make it first"),
        (["--format=hf"], "--out=... is missing"),
        (["--format=hf", "--out="], "is not a name"),
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


def test_the_verdict(runs, tmp_path):
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
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={tmp_path}/y", "--verify"]
    run(
        "export.py",
        *flags,
        code=1,
        patch="from nanobit.export import verify\nverify.hf = lambda *args: dict(good=False)",
    )
