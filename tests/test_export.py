"""export.py: the command, what it replaces, and the verdict of --verify."""

import json
import os
import shutil

import export_faults
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
    """Return data_dir, and out_dir with a run `r` and its float twin `f`."""
    folder = tmp_path_factory.mktemp("runs")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "r", **HOW)
    train(data_dir, out_dir, "f", **HOW, ternary=False)
    return data_dir, out_dir


@pytest.fixture(scope="module")
def verified(runs, tmp_path_factory):
    """Return (the folder of an export of `r`, what --verify prints as JSON)."""
    data_dir, out_dir = runs
    out = tmp_path_factory.mktemp("verified") / "packed"
    flags = ["--format=hf", f"--out={out}", "--verify", f"--data_dir={data_dir}", "--eval_tokens=64"]
    text, _ = run("export.py", f"--ckpt={out_dir}/r", *flags)
    return out, json.loads(text.strip().split("\n")[-1])


def test_verify_finds_no_difference(verified):
    """transformers computes the logits, the greedy tokens and the loss of the run to the last bit."""
    _, found = verified
    assert found["max_difference"] == 0.0
    assert found["same"] == found["tokens"]
    assert found["val_loss"] == found["reader_val_loss"]
    assert found["val_tokens"] == 64


def test_an_export_has_the_score_of_its_run(runs, verified):
    """evaluate.py gives an export and its run one score, which is the loss of --verify."""
    out, found = verified
    flags = [f"--data_dir={runs[0]}", "--eval_tokens=64"]
    texts = [run("evaluate.py", f"--ckpt={ckpt}", *flags)[0] for ckpt in (out, f"{runs[1]}/r")]
    scores = [text.strip().split("\n")[-1] for text in texts]
    assert scores[0] == scores[1]
    assert json.loads(scores[0])["val_loss"] == pytest.approx(found["val_loss"], abs=1e-5)


def test_an_export_writes_the_text_of_its_run(runs, verified):
    """sample.py writes the same text from an export and from its run."""
    flags = ["--prompt=a", "--temperature=0", "--max_new_tokens=8"]
    texts = [run("sample.py", f"--ckpt={ckpt}", *flags)[0] for ckpt in (verified[0], f"{runs[1]}/r")]
    assert texts[0] == texts[1]


def test_the_card_has_the_losses_of_the_run_and_its_twin(runs, verified):
    """The model card shows the curve, the settings and the distance to the float twin, and no path."""
    out_dir = runs[1]
    card = open(verified[0] / "README.md", encoding="utf-8").read()
    losses, twin = (
        [row["val_loss"] for row in lines(f"{out_dir}/{name}", SCALARS) if "val_loss" in row] for name in "rf"
    )
    assert f"| 6 | {losses[-1]:.4f} |" in card
    assert "twin `f`" in card
    assert f"this one is {losses[-1] - twin[-1]:+.4f} from it" in card
    assert "max_steps = 6" in card
    assert os.path.dirname(out_dir) not in card


def test_weights_are_as_readable_as_the_rest(verified):
    """model.safetensors has the permissions of the other files."""
    out, _ = verified
    assert os.stat(out / "model.safetensors").st_mode == os.stat(out / "config.json").st_mode


@pytest.fixture
def packed(verified, tmp_path):
    """Return the folder of an earlier export, alone in tmp_path."""
    return shutil.copytree(verified[0], tmp_path / "packed")


def test_an_earlier_export_is_replaced_with_force_only(runs, packed):
    """An earlier export stays unless --force is given; with it, another one takes its place."""
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={packed}"]
    _, err = run("export.py", *flags, code=2)
    assert "exists already" in err
    assert "--force" in err
    assert "quantization_config" in (packed / "config.json").read_text()
    run("export.py", *flags, "--force", "--latent")
    assert "quantization_config" not in (packed / "config.json").read_text()
    assert os.listdir(packed.parent) == ["packed"]


def test_a_folder_with_a_file_of_the_user_stays(runs, packed):
    """--force replaces no folder that holds anything else than an export."""
    (packed / "notes.txt").write_text("mine")
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={packed}", "--force"]
    _, err = run("export.py", *flags, code=2)
    assert "not an earlier export" in err
    assert (packed / "notes.txt").exists()


def test_a_file_of_the_user_stays(runs, tmp_path):
    """--force replaces no file that is not an export."""
    path = tmp_path / "mine.gguf"
    path.write_text("mine")
    _, err = run("export.py", f"--ckpt={runs[1]}/r", "--format=gguf", f"--out={path}", "--force", code=2)
    assert "not an earlier export" in err
    assert path.read_text() == "mine"


@pytest.mark.parametrize("more", [[], ["--force"]])
def test_what_appears_while_an_export_is_written_stays(more, runs, tmp_path):
    """A folder that somebody makes at `out` meanwhile is not replaced, and nothing temporary remains."""
    folder = tmp_path / "mine"
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={folder}", *more]
    _, err = run("export.py", *flags, code=2, patch=export_faults.folder_meanwhile(str(folder)))
    assert "not an earlier export" in err
    assert os.listdir(folder) == ["diary.txt"]
    assert os.listdir(tmp_path) == ["mine"]


def test_what_was_there_before_stays_too(runs, tmp_path):
    """The same with --force holds for a folder that was there from the beginning."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "diary.txt").write_text("")
    _, err = run("export.py", f"--ckpt={runs[1]}/r", "--format=hf", f"--out={folder}", "--force", code=2)
    assert "not an earlier export" in err
    assert os.listdir(folder) == ["diary.txt"]


def test_a_rename_that_fails_costs_no_earlier_export(runs, packed):
    """If the new export cannot be renamed, the earlier one is put back."""
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={packed}", "--force"]
    _, err = run("export.py", *flags, code=1, patch=export_faults.stuck_rename(str(packed)))
    assert "cannot be written: stuck" in err
    assert hf.is_ours(str(packed))
    assert os.listdir(packed.parent) == ["packed"]


@pytest.mark.parametrize("format, module", [("hf", "hf"), ("gguf", "gguf_file")])
def test_ctrl_c_leaves_what_was_there(format, module, runs, packed):
    """Ctrl-C while an export is written keeps the earlier one and leaves no part of the new one."""
    out = {"hf": packed, "gguf": packed.parent / "new.gguf"}[format]
    flags = [f"--ckpt={runs[1]}/r", f"--format={format}", f"--out={out}", "--force"]
    run("export.py", *flags, code=130, patch=export_faults.interrupt_after_write(module))
    assert os.listdir(packed.parent) == ["packed"]
    assert hf.is_ours(str(packed))


@pytest.mark.parametrize(
    "flags", [["--format=hf", "--out=packed"], ["--format=gguf", "--out=x.gguf", "--type=f16"]]
)
def test_a_full_disk_leaves_what_was_there(flags, runs, packed):
    """A disk that fills up keeps the earlier export and leaves no part of the new one."""
    flags = [flag.replace("--out=", f"--out={packed.parent}/") for flag in flags]
    _, err = run(
        "export.py",
        f"--ckpt={runs[1]}/r",
        *flags,
        "--force",
        code=1,
        patch=export_faults.files_of_at_most(8000),
    )
    assert "cannot be written" in err
    assert os.listdir(packed.parent) == ["packed"]
    assert hf.is_ours(str(packed))


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_ctrl_c_after_the_rename_is_too_late(format, runs, tmp_path):
    """Ctrl-C after the export is renamed changes nothing: the command reports it and ends with 0."""
    out = f"{tmp_path}/x.gguf" if format == "gguf" else f"{tmp_path}/x"
    text, _ = run(
        "export.py",
        f"--ckpt={runs[1]}/r",
        f"--format={format}",
        f"--out={out}",
        patch=export_faults.interrupt_after_rename(out),
    )
    assert text.startswith(f"wrote {out}")


def test_all_missing_packages_are_named_at_one_time(runs, tmp_path):
    """One line names all packages that an export lacks."""
    gone = export_faults.not_installed("safetensors", "tokenizers", "gguf", "transformers")
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={tmp_path}/x"]
    _, err = run("export.py", *flags, "--verify", code=2, patch=gone)
    assert "pip install safetensors tokenizers transformers, or" in err
    assert '".[export,verify]"' in err
    assert err.count("\n") == 1
    _, err = run("export.py", *flags, code=2, patch=gone)
    assert "pip install safetensors tokenizers, or" in err
    assert '".[export]"' in err


def test_latent_weights_come_back(runs, tmp_path):
    """An export with --latent holds the master weights unchanged, and can begin a run."""
    data_dir, out_dir = runs
    ckpt, out = f"--ckpt={out_dir}/r", tmp_path / "latent"
    text, _ = run("export.py", ckpt, "--format=hf", f"--out={out}", "--latent", "--verify", "--eval_tokens=0")
    assert "good" in text
    assert "no loss is compared" in text
    before = checkpoint.load(checkpoint.locate(f"{out_dir}/r"))["model"]
    after = hf.read(str(out))["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    train(data_dir, str(tmp_path), "again", **HOW | dict(max_steps=1), init_from=out)


def test_a_gguf_file_has_a_type_that_fits(runs, tmp_path):
    """Without --type one that holds the model is taken, with a note on what reads it."""
    text, _ = run("export.py", f"--ckpt={runs[1]}/r", "--format=gguf", f"--out={tmp_path}/x.gguf")
    assert "q2_0, embedding q8_0" in text
    assert "needs a llama.cpp of 2026" in text


def test_an_export_becomes_the_gguf_file_of_its_run(runs, verified, tmp_path):
    """A GGUF file of a packed export has the tensors of that of its run, and the size printed for it."""
    gguf = pytest.importorskip("gguf", reason="writes GGUF files: requirements-dev.txt")
    tensors, sizes = [], []
    for i, ckpt in enumerate((verified[0], f"{runs[1]}/r")):
        path = tmp_path / f"{i}.gguf"
        out, _ = run("export.py", f"--ckpt={ckpt}", "--format=gguf", "--type=f16", f"--out={path}")
        sizes.append(out.partition(": ")[2])
        tensors.append({t.name: t.data for t in gguf.GGUFReader(path).tensors})
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():  # as numbers: -0.0 of a master weight was packed as 0
        assert (values == tensors[1][name]).all(), name
    assert sizes[0] == sizes[1]
    _, err = run("export.py", f"--ckpt={verified[0]}", "--format=hf", f"--out={tmp_path}/x", code=2)
    assert "is a folder for transformers already" in err


def test_a_type_that_cannot_hold_the_model_is_refused(runs, tmp_path):
    """A type whose blocks do not fit, or with codes for a float model, is an error that writes nothing."""
    flags = ["--format=gguf", f"--out={tmp_path}/y.gguf"]
    _, err = run("export.py", f"--ckpt={runs[1]}/r", *flags, "--type=tq2_0", code=2)
    assert "blocks of 256" in err
    assert "--type=q2_0" in err
    _, err = run("export.py", f"--ckpt={runs[1]}/f", *flags, "--type=q2_0", code=2)
    assert "this is a float model" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--format=onnx", "--out=z"], "format = 'onnx' is unknown"),
        (["--format=hf", "--out=z", "--type=f16"], "--type only applies together with --format=gguf"),
        (["--format=hf", "--out=no/z"], "make it first"),
        (["--format=hf"], "--out=... is missing"),
        (["--format=hf", "--out="], "is not a name"),
        (["--format=gguf", "--out=x"], "must end in .gguf"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, says, runs, tmp_path):
    """A flag of the other format, and a path that cannot be written, is an error."""
    assert says in run("export.py", f"--ckpt={runs[1]}/r", *flags, code=2, cwd=tmp_path)[1]


def test_only_what_export_wrote_is_replaced(tmp_path, capsys):
    """--force replaces what export wrote only: not a model that was trained further, or downloaded; weights
    that changed on the disk are reported before they begin a run."""
    gguf = pytest.importorskip("gguf")
    part, place, file = part_of(), str(tmp_path / "x"), str(tmp_path / "x.gguf")
    hf.write(part, place, latent=True)
    gguf_file.write(part, file, "f16", "f16")
    assert hf.is_ours(place)
    assert gguf_file.is_ours(file)
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
    assert not hf.is_ours(place)
    assert not gguf_file.is_ours(file)
    hf.read(place, to_train=True)
    assert "trained further, or damaged" in capsys.readouterr().out


def test_a_bit_of_a_scale_is_bad(tmp_path):
    """An export whose weights differ in the last bit of one scale is not good."""
    from safetensors.torch import load_file, save_file

    part = part_of()
    hf.write(part, str(tmp_path / "x"))
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(tensors | {name: tensors[name].nextafter(torch.tensor(9.0))}, path)
    assert not verify.hf(part, str(tmp_path / "x"))["good"]


@pytest.fixture
def reader():
    """Return (a part, logits, tokenize, write) of a reader that computes as we do, but writes other text."""
    part = part_of()
    part["config"]["sample_prompts"] = ["a cat"]
    tokenizer = make_tokenizer(part["tokenizer"])
    return part, restore(part, "cpu"), lambda text: encode_prompt(tokenizer, 0, text), lambda ids, n: [0] * n


@pytest.mark.parametrize("factor, good", [(1.0, True), (1.1, False)])
def test_a_loss_alone_can_be_bad(factor, good, reader):
    """A reader whose logits agree on the probe, and whose loss does not, is not good."""
    part, model, tokenize, write = reader
    x = torch.arange(12)[None]

    def logits(ids):
        return model(ids) * (1.0 if len(ids) == 2 else factor)

    found = verify.compare(part, [(x, x)], part, 0.0, "reader", logits, tokenize, write)
    assert found["max_difference"] == 0
    assert found["good"] == good


def test_another_tokenizer_ends_the_comparison(reader):
    """A reader that makes other ids of a text is an error with exit code 1."""
    part, model, tokenize, write = reader
    with pytest.raises(SystemExit) as end:
        verify.compare(part, [], part, 0.0, "reader", model, lambda text: tokenize(text)[1:], write)
    assert end.value.code == 1


def test_the_verdict_is_the_exit_code(runs, tmp_path):
    """export.py --verify exits with 1 if the export is not good."""
    flags = [f"--ckpt={runs[1]}/r", "--format=hf", f"--out={tmp_path}/y", "--verify"]
    run("export.py", *flags, code=1, patch=export_faults.bad_verdict())
