"""config/ with the settings of a run, which --resume continues or --init_from takes the shape of."""

import json
import os

import pytest
from conftest import errors_of

import config


def write_run(folder, **changes):
    """Write the config.json of a run that was moved to this folder; return the folder of a step in it."""
    values = config.settings_of(config.load(["config/train_simple.py", "--seed=7"])) | changes
    os.makedirs(folder / "checkpoints" / "step_000010")
    settings = {name: dict(value=value, origin="x") for name, value in values.items()}
    (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
    return folder / "checkpoints" / "step_000010"


def test_a_run_is_resumed_with_its_own_settings(tmp_path):
    """--resume takes the settings of the run where it is now, without init_from; flags override them."""
    step = write_run(tmp_path / "moved", out_dir="elsewhere", init_from="other", vocab_size=15)
    (step / "checkpoint.pt").write_text("")
    for path in (step, step / "checkpoint.pt", tmp_path / "moved"):
        cfg = config.load([f"--resume={path}", "--dropout=0.5"])
        assert (cfg.run_id, cfg.out_dir, cfg.init_from, cfg.resume) == ("moved", str(tmp_path), "", str(path))
        assert (cfg.seed, cfg.n_embd, cfg.dropout, cfg.max_steps) == (7, 128, 0.5, 4000)
        assert cfg.origin["seed"].endswith("moved/config.json")
        assert cfg.origin["dropout"] == "--dropout=0.5"
    assert config.load(["--resume", str(step), "--run_id=branch"]).run_id == "branch"


def test_the_best_step_is_resumed_with_the_settings_of_its_run(tmp_path):
    """--resume=RUN/best takes the settings of RUN; a run that is named best is a run."""
    write_run(tmp_path / "r")
    assert config.load([f"--resume={tmp_path}/r/best"]).run_id == "r"
    write_run(tmp_path / "best")
    assert config.load([f"--resume={tmp_path}/best"]).run_id == "best"


def test_a_config_file_replaces_the_settings_of_a_run(tmp_path):
    """With a config file, the settings come from the file and not from the run that --resume names."""
    step = write_run(tmp_path / "r")
    assert config.load(["config/train_text.py", f"--resume={step}"]).seed == 1337


def test_a_resumed_run_can_be_made_longer(tmp_path):
    """Steps that were derived from total_tokens are derived again, so that another total_tokens counts."""
    write_run(tmp_path / "long", total_tokens=7680, max_steps=10)
    assert config.load([f"--resume={tmp_path}/long"]).max_steps == 10
    assert config.load([f"--resume={tmp_path}/long", "--total_tokens=15360"]).max_steps == 20


def test_what_belongs_to_one_command_is_not_repeated(tmp_path):
    """A resumed run does not verify its data again because its first command did."""
    write_run(tmp_path / "r", verify_data=True)
    assert config.load([f"--resume={tmp_path}/r"]).verify_data is False


def test_the_shape_is_that_of_the_run(tmp_path):
    """A run that begins with the weights of another has its shape and seq_len, and nothing else, unless they
    are set; a path without a run is reported by whoever reads the weights."""
    step = write_run(tmp_path / "base", vocab_size=15, seq_len=64, n_embd="many")
    for path in (step, tmp_path / "base", tmp_path / "base" / "best"):
        cfg = config.load([f"--init_from={path}", "--max_steps=1", "--n_layer=3"])
        assert (cfg.n_head, cfg.vocab_size, cfg.seq_len, cfg.ffn_dim) == (4, 15, 64, 512)
        assert cfg.n_layer == 3
        assert (cfg.seed, cfg.learning_rate, cfg.max_steps, cfg.n_embd) == (1337, 1.5e-3, 1, 768)
        assert cfg.origin["n_head"] == f"init_from {path}"
    assert config.load(["--init_from=nothing", "--max_steps=1"]).n_layer == 8


def test_wrong_settings_of_a_run_are_named(tmp_path, capsys):
    """A setting of a run with another type is named with its file; so is a run that does not exist."""
    write_run(tmp_path / "odd", n_layer="two")
    (error,) = errors_of(capsys, f"--resume={tmp_path}/odd")
    assert "odd/config.json: n_layer must be int, got str 'two'" in error
    (error,) = errors_of(capsys, "--resume=nowhere")
    assert "resume = 'nowhere' does not exist" in error


@pytest.mark.parametrize("content", ["", "null", "{}", '{"settings": {"seed": 7}}', "[" * 100_000, None])
def test_a_run_without_its_settings_is_named_with_the_way_out(tmp_path, capsys, content):
    """If the settings of a run cannot be read, one fault names the file and how to resume."""
    write_run(tmp_path / "r")
    os.remove(tmp_path / "r" / "config.json")
    if content is not None:
        (tmp_path / "r" / "config.json").write_text(content)
    (error,) = errors_of(capsys, f"--resume={tmp_path}/r")
    assert f"{tmp_path}/r/config.json cannot be read (" in error
    assert "with --resume=auto" in error


@pytest.mark.parametrize(
    "peak, rate, ratio, is_kept",
    [
        (1.5e-3, 1e-3, 2 / 3, False),
        (6e-4, 6e-5, 0.1, True),  # 0.1 of 6e-4 is one ulp less
        (0.0, 1e-3, 1.0, True),
    ],
)
def test_saved_rates_become_ratios_if_nothing_is_lost(peak, rate, ratio, is_kept):
    """Rates of a former run become ratios; a rate stays if its ratio does not give the same float."""
    found = config.with_ratios(dict(learning_rate=peak, min_lr=rate, n_layer=2))
    assert found["min_lr_ratio"] == pytest.approx(ratio)
    assert found["n_layer"] == 2
    assert found.get("min_lr") == (rate if is_kept else None)
    assert is_kept or found["min_lr_ratio"] * peak == rate
    assert config.with_ratios(found) == found, "what has ratios stays as it is"
