"""config/: which command lines and config files are accepted, and which errors the others get."""

import os
import re
import shlex

import pytest
import torch
from conftest import ROOT, errors_of, run

import config
from nanobit import cli


def test_order_is_default_file_flag_wherever_it_stands():
    """A flag overrides a config file, which overrides default.py, in whatever order they are written."""
    cfg = config.load(["--n-layer=5", "config/train_simple.py", "--n_head", "8", "--n_kv_head=8"])
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.beta1) == (5, 8, 128, 0.9)
    assert cfg.origin["n_layer"] == "--n-layer=5"
    assert cfg.origin["n_embd"] == "config/train_simple.py"
    assert cfg.origin["beta1"] == "default"
    assert cfg.run_id == "train_simple"


def test_values_take_the_type_of_the_default():
    """A value takes the type of the setting's default: 1 becomes 1.0, 1e5 an int, and the name 123 a
    string."""
    cfg = config.load(
        ["--max_steps=1e5", "--learning_rate=1", "--run_id=123", "--sample_prompts=['a=b', 'c']"]
    )
    assert (cfg.max_steps, cfg.learning_rate, cfg.run_id) == (100000, 1.0, "123")
    assert type(cfg.max_steps) is int
    assert type(cfg.learning_rate) is float
    assert cfg.sample_prompts == ["a=b", "c"]
    for text, want in (("--no-ternary", False), ("--ternary", True), ("--ternary=false", False)):
        assert config.load(["--max_steps=1", text]).ternary is want
    assert config.load(["--max_steps=1", "--ternary", "False"]).ternary is False


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--learning_rat=1"], ["learning_rat", "did you mean learning_rate"]),
        (["--no-eval"], ["no_eval", "--eval_every=0"]),
        (["--block_size=64"], ["no setting named block_size; did you mean seq_len?"]),
        (["--max-iters", "5000"], ["no setting named max_iters; did you mean max_steps?"]),
        (["--weight_tying"], ["did you mean tie_embeddings?"]),
        (["--learning_rate", "=", "1e-3"], ["without spaces around =: --learning_rate=1e-3"]),
        (["--learning_rate", "=1e-3"], ["without spaces around =: --learning_rate=1e-3"]),
        (["--learning_rate", "=", "-1e-3"], ["without spaces around =: --learning_rate=-1e-3"]),
        (["--learning_rate=", "1e-3"], ["without spaces around =: --learning_rate=1e-3"]),
        (["config"], ["config is a folder", "--resume=config"]),
        (["--n_layer=two"], ["n_layer must be int, got str 'two'"]),
        (["--n_layer={[]: 1}"], ["n_layer must be int, got str '{[]: 1}'"]),  # no literal: a list as a key
        (["--ternary=3"], ["ternary must be bool (True or False), got int 3"]),
        (["--sample_prompts=[1]"], ["sample_prompts must be a list of strings"]),
        (["--batch_size=16", "--seq_len=256", "--total_batch_size=10000"], ["10,000", "4,096", "= 8192"]),
        (["config/train_simple.py", "--batch_size=32"], ["768", "= 2048, or batch_size = 12"]),
        (["--n_embd=100", "--n_head=3", "--n_kv_head=3"], ["n_embd = 100", "n_head = 3"]),
        (["--n_embd=12", "--n_head=4", "--n_kv_head=4"], ["= 3 is odd"]),
        (["--n_head=12", "--n_kv_head=5"], ["n_head = 12", "n_kv_head = 5"]),
        (["--ffn_dim=132105"], ["ffn_dim = 132105", "at most 132,104 inputs"]),
        (["--schedule=step"], ["schedule = 'step'", "two_stage"]),
        (["--dtype=int8"], ["dtype = 'int8'", "bfloat16"]),
        (["--device=gpu"], ["device = 'gpu'", "cuda:1"]),
        (["--optimizer=sgd"], ["optimizer = 'sgd'", "adamw"]),
        (["--learning_rate=-1"], ["learning_rate = -1.0"]),
        (["--min_lr_ratio", "-0.1"], ["min_lr_ratio = -0.1"]),
        (["--dropout=1"], ["dropout = 1.0"]),
        (["--total_tokens=100"], ["max_steps = 10, total_tokens = 100"]),
        (["--max_steps=0"], ["has no length", "config/train_simple.py"]),
        (["--run_id=../x"], ["run_id = '../x'"]),
        (["--run_id=a\x1b[2J\nb"], ["run_id = 'a\\x1b[2J\\nb'", "control character"]),
        (["--patience=2", "--eval_every=0"], ["patience = 2", "eval_every"]),
        (["--log_every"], ["--log_every needs a value"]),
        (["--run_id", "--resume=auto"], ["--run_id needs a value"]),
        (["--learning_rate=1e400"], ["learning_rate = inf"]),
        (["--learning_rate=1" + 400 * "0"], ["learning_rate = inf"]),
        (["--batch_size=1e18"], ["batch_size = 1" + 18 * "0", "at most 1048576"]),
        (["--batch_size=1e18", "--total_batch_size=1" + 18 * "0"], ["at most 1048576"]),
        (["--seed=99999999999999999999"], ["seed = 99999999999999999999"]),
        (["--out_dir="], ["out_dir = ''"]),
        (["n_layer=3"], ["did you mean --n_layer=3"]),
        (["config/train_simpel.py"], ["train_simpel.py does not exist", "train_simple.py"]),
        (["config/chta.py"], ["did you mean config/chat.py?"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(capsys, argv, says):
    """An error names the setting, its value, and what is expected or near."""
    errors = "\n".join(errors_of(capsys, "--max_steps=10", *argv))
    for text in says:
        assert text in errors, errors


def test_the_widest_ternary_layer():
    """A ternary layer may have as many inputs as the error of a wider one names."""
    assert config.load(["--max_steps=10", "--ffn_dim=132104"]).ffn_dim == 132_104


@pytest.mark.parametrize(
    "argv", [["--lr", "1e-3"], ["--lr", "-1"], ["--dropout", "=", "0.1"], ["--run_id=", "x"]]
)
def test_a_value_is_not_taken_for_a_config_file(capsys, argv):
    """The value of an unknown or misspelled flag is not reported as a missing config file."""
    assert len(errors_of(capsys, "--max_steps=10", *argv)) == 1


@pytest.mark.parametrize(
    "flag, given, hint",
    [
        ("ckpt", "runs/demo", "did you mean --ckpt=runs/demo?"),
        ("ckpt", "demo", "did you mean --ckpt=runs/demo?"),
        ("files", "a.txt", "did you mean --files=a.txt?"),
        ("ckpt", "runs/other", "--help lists them"),
    ],
)
def test_a_path_without_its_flag_is_explained(tmp_path, monkeypatch, capsys, flag, given, hint):
    """A path alone is answered with the flag for it, if there is such a file or run."""
    os.makedirs(tmp_path / "runs" / "demo")
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        config.load([given], flags={flag: cli.Flag("", "a path")}, only=())
    assert hint in capsys.readouterr().err


def test_a_remedy_works_as_it_is_shown(capsys):
    """The flag that an error suggests can be pasted into a shell."""
    (error,) = errors_of(capsys, "--max_steps=10", "--sample_prompts=a")
    flag = re.search(r"--sample_prompts=\S+ \S+?(?=,)", error)[0]
    assert config.load(["--max_steps=10", *shlex.split(flag)]).sample_prompts == ["a", "b"]


def test_names_of_other_projects_lead_to_settings():
    """Every alias from another project leads to a setting that exists."""
    of_sample = {"prompt", "temperature", "max_new_tokens"}
    assert set(cli.ALIASES.values()) <= config.assignments(config.DEFAULT).keys() | of_sample


def test_former_rates_are_refused_with_their_ratio(capsys, tmp_path):
    """A rate of a former setting is refused with its fraction of the learning_rate beside it."""
    path = tmp_path / "mine.py"
    path.write_text("max_steps = 10\nstage2_lr = 1.3e-3\nlearning_rate = 2e-3\n")
    (error,) = errors_of(capsys, str(path), "--learning_rate=1")
    assert error.endswith("stage2_lr is now stage2_lr_ratio = stage2_lr / learning_rate; here 0.65")
    (error,) = errors_of(capsys, "--max_steps=10", "--min_lr", "1e-5", "--learning-rate=1e-3")
    assert error == "error: --min_lr: min_lr is now min_lr_ratio = min_lr / learning_rate; here 0.01"
    (error,) = errors_of(capsys, "--max_steps=10", "--min_lr=low")
    assert error.endswith("min_lr_ratio = min_lr / learning_rate")


def test_all_faults_are_reported_at_once(capsys):
    """All faults of a command line are reported together."""
    assert len(errors_of(capsys, "--lr=1", "--n_layer=x", "nowhere.py")) == 3
    assert len(errors_of(capsys, "--lr=1", "--n_head=5", "--dtype=x", "--n_embd=64")) == 4
    errors = errors_of(capsys, "--max_steps=10", "--schedule=x", "--dtype=y", "--n_head=5", "--n_kv_head=2")
    assert len(errors) == 4


def test_a_config_file_is_checked_too(capsys, tmp_path):
    """Names, types and syntax of a config file are checked as those of flags."""
    path = tmp_path / "mine.py"
    path.write_text("n_layr = 2\n_scratch = 1\nimport math\nmax_steps = '5'\n")
    errors = errors_of(capsys, str(path))
    assert len(errors) == 2
    assert "did you mean n_layer" in errors[0]
    assert "max_steps must be int" in errors[1]
    path.write_text("max_steps = = 5\n")
    assert "SyntaxError" in errors_of(capsys, str(path))[0]


def test_a_file_that_is_not_python_is_refused(capsys, tmp_path):
    """A JSON file, which Python would read without effect, is refused with the remedy."""
    path = tmp_path / "config.json"
    path.write_text('{"max_steps": 10}')
    (error,) = errors_of(capsys, str(path))
    assert "is not Python" in error
    assert f"--resume={tmp_path} takes the settings of that run" in error


def test_a_config_file_may_begin_with_another(tmp_path):
    """`from config.NAME import *` works in a config file of any folder."""
    (tmp_path / "mine.py").write_text("from config.train_simple import *\nn_layer = 3\n")
    cfg = config.load([str(tmp_path / "mine.py")])
    assert (cfg.n_layer, cfg.n_embd, cfg.max_steps) == (3, 128, 4000)


def test_from_another_folder_the_place_of_a_config_is_named(capsys, tmp_path, monkeypatch):
    """From another folder, the error for a shipped config file gives its full path."""
    monkeypatch.chdir(tmp_path)
    (error,) = errors_of(capsys, "config/train_simple.py")
    assert "relative to the current folder" in error
    assert error.endswith(os.path.join(ROOT, "config/train_simple.py"))


def test_every_setting_is_documented_and_typed():
    """Every setting of default.py has a comment, and a default that is not None."""
    values = config.assignments(config.DEFAULT)
    rows = {name: flag for section in config.sections().values() for name, flag in section.items()}
    assert list(rows) == list(values)
    assert all(flag.comment for flag in rows.values())
    assert None not in values.values()


def test_help_names_every_setting():
    """--help needs no torch, no terminal and no valid command line, and lists every setting."""
    for script in ("train.py", "bench.py", "sample.py", "evaluate.py", "prepare/arithmetic.py"):
        out, _ = run(script, "--help", "--nonsense")
        if script != "evaluate.py":  # whose settings are those of the run
            assert "python " + script in out
            assert "--seed=" in out
    out, _ = run("train.py", "--help")
    assert all(f"--{name}=" in out for name in config.assignments(config.DEFAULT))


def test_a_cuda_device_has_its_number(monkeypatch):
    """A CUDA device always has an index, and it is the current device."""
    from nanobit import kernels, machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 6))
    monkeypatch.setattr(kernels, "multiplies_int8", lambda device: True)
    assert machine.pick("auto") == machine.pick("cuda") == torch.device("cuda", 0)
    assert machine.pick("cuda:1") == torch.device("cuda", 1) == current[-1]
    with pytest.raises(SystemExit):
        machine.pick("cuda:2")
    monkeypatch.setattr(machine, "WORLD", 2)
    monkeypatch.setattr(machine, "LOCAL_RANK", 1)
    assert machine.pick("auto") == torch.device("cuda", 1)
