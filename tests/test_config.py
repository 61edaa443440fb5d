"""config/: which command lines are accepted, and which errors the others get."""

import glob
import json
import math
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT, run

import config
from model import Transformer
from nanobit import cli, schedule


def faults(capsys, *argv):
    """Return the error lines of a command line that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.load(list(argv))
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().split("\n")
    assert all(line.startswith("error: ") for line in errors)
    return errors


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
        (["--batch_size=16", "--seq_len=256", "--total_batch_size=10000"], ["10,000", "4,096", "use 8192"]),
        (["config/train_simple.py", "--batch_size=32"], ["768", "use 2048, or batch_size = 12"]),
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
    ],
)
def test_a_wrong_setting_is_named_with_its_value(capsys, argv, says):
    """An error names the setting, its value, and what is expected or near."""
    errors = "\n".join(faults(capsys, "--max_steps=10", *argv))
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
    assert len(faults(capsys, "--max_steps=10", *argv)) == 1


def test_a_remedy_works_as_it_is_shown(capsys):
    """The flag that an error suggests can be pasted into a shell."""
    (error,) = faults(capsys, "--max_steps=10", "--sample_prompts=a")
    flag = re.search(r"--sample_prompts=\S+ \S+?(?=,)", error)[0]
    assert config.load(["--max_steps=10", *shlex.split(flag)]).sample_prompts == ["a", "b"]


def test_names_of_other_projects_lead_to_settings():
    """Every alias from another project leads to a setting that exists."""
    of_sample = {"prompt", "temperature", "max_new_tokens"}
    assert set(cli.ALIASES.values()) <= config.assignments(config.DEFAULT).keys() | of_sample


def test_all_faults_are_reported_at_once(capsys):
    """All faults of a command line are reported together."""
    assert len(faults(capsys, "--lr=1", "--n_layer=x", "nowhere.py")) == 3
    assert len(faults(capsys, "--lr=1", "--n_head=5", "--dtype=x", "--n_embd=64")) == 4
    errors = faults(capsys, "--max_steps=10", "--schedule=x", "--dtype=y", "--n_head=5", "--n_kv_head=2")
    assert len(errors) == 4


def test_a_config_file_is_checked_too(capsys, tmp_path):
    """Names, types and syntax of a config file are checked as those of flags."""
    path = tmp_path / "mine.py"
    path.write_text("n_layr = 2\n_scratch = 1\nimport math\nmax_steps = '5'\n")
    errors = faults(capsys, str(path))
    assert len(errors) == 2
    assert "did you mean n_layer" in errors[0]
    assert "max_steps must be int" in errors[1]
    path.write_text("max_steps = = 5\n")
    assert "SyntaxError" in faults(capsys, str(path))[0]


def test_a_file_that_is_not_python_is_refused(capsys, tmp_path):
    """A JSON file, which Python would read without effect, is refused with the remedy."""
    path = tmp_path / "config.json"
    path.write_text('{"max_steps": 10}')
    (error,) = faults(capsys, str(path))
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
    (error,) = faults(capsys, "config/train_simple.py")
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


STATED = {
    "train_simple": 526_848,
    "train_arithmetic": 5_118_976,
    "train_tictactoe": 12_069_888,
    "train_tinystories": 12_194_688,
    "train_laptop": 787_584 + 128 * 4096,
    "train_text": 10_621_824 + 384 * 4096,  # with the vocabulary that prepare/text.py makes by default
    "train_baseline_95m": 95_367_936,
    "train_best_95m": 95_367_936,
    "train_dense_300m": 300_270_592,
    "train_moe_500m": 505_965_312,
}


CONFIGS = sorted(glob.glob(os.path.join(ROOT, "config", "train_*.py")))


FORMER = {  # learning_rate, stage2_lr and min_lr, when all three were rates
    "train_simple": (2e-3, 1.3e-3, 1.5e-5),
    "train_arithmetic": (2e-3, 1.3e-3, 1.5e-5),
    "train_tictactoe": (1.5e-3, 1e-3, 1.5e-5),
    "train_tinystories": (1.5e-3, 1e-3, 1.5e-5),
    "train_text": (1.5e-3, 1e-3, 1.5e-5),
    "train_laptop": (8e-3, None, None),  # it was written after the rates had become ratios
    "train_baseline_95m": (1.5e-3, 1e-3, 1.5e-5),
    "train_best_95m": (1.5e-3, 1e-3, 1.5e-5),
    "train_dense_300m": (6e-4, None, 6e-5),  # its schedule and that of the mixture have no stage 2
    "train_moe_500m": (1e-3, None, 1e-4),
}
ONE_ULP = {("train_simple", 1.3e-3), ("train_arithmetic", 1.3e-3), ("train_dense_300m", 6e-5)}


@pytest.mark.parametrize("path", CONFIGS)
def test_the_ratios_are_the_former_rates(path):
    """The shipped configs train at the rates that they were measured with."""
    cfg = config.load([path])
    peak, *former = FORMER[cfg.run_id]
    assert cfg.learning_rate == peak
    for rate, now in zip(former, schedule.final_rates(cfg)):
        if rate is not None:
            assert abs(now - rate) == math.ulp(rate) * ((cfg.run_id, rate) in ONE_ULP)


def test_former_rates_are_refused_with_their_ratio(capsys, tmp_path):
    """A rate of a former setting is refused with its fraction of the learning_rate beside it."""
    path = tmp_path / "mine.py"
    path.write_text("max_steps = 10\nstage2_lr = 1.3e-3\nlearning_rate = 2e-3\n")
    (error,) = faults(capsys, str(path), "--learning_rate=1")
    assert error.endswith("stage2_lr is now stage2_lr_ratio = stage2_lr / learning_rate; here 0.65")
    (error,) = faults(capsys, "--max_steps=10", "--min_lr", "1e-5", "--learning-rate=1e-3")
    assert error == "error: --min_lr: min_lr is now min_lr_ratio = min_lr / learning_rate; here 0.01"
    (error,) = faults(capsys, "--max_steps=10", "--min_lr=low")
    assert error.endswith("min_lr_ratio = min_lr / learning_rate")


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


def test_a_config_file_replaces_the_settings_of_a_run(tmp_path):
    """With a config file, the settings come from the file and not from the run that --resume names."""
    step = write_run(tmp_path / "r")
    assert config.load(["config/train_text.py", f"--resume={step}"]).seed == 1337


def test_a_resumed_run_can_be_made_longer(tmp_path):
    """Steps that were derived from total_tokens are derived again, so that another total_tokens counts."""
    write_run(tmp_path / "long", total_tokens=7680, max_steps=10)
    assert config.load([f"--resume={tmp_path}/long"]).max_steps == 10
    assert config.load([f"--resume={tmp_path}/long", "--total_tokens=15360"]).max_steps == 20


def test_wrong_settings_of_a_run_are_named(tmp_path, capsys):
    """A setting of a run with another type is named with its file; so is a run that does not exist."""
    write_run(tmp_path / "odd", n_layer="two")
    (error,) = faults(capsys, f"--resume={tmp_path}/odd")
    assert "odd/config.json: n_layer must be int, got str 'two'" in error
    (error,) = faults(capsys, "--resume=nowhere")
    assert "resume = 'nowhere' does not exist" in error


def test_the_best_step_is_resumed_with_the_settings_of_its_run(tmp_path):
    """--resume=RUN/best takes the settings of RUN; a run that is named best is a run."""
    write_run(tmp_path / "r")
    assert config.load([f"--resume={tmp_path}/r/best"]).run_id == "r"
    write_run(tmp_path / "best")
    assert config.load([f"--resume={tmp_path}/best"]).run_id == "best"


def test_what_belongs_to_one_command_is_not_repeated(tmp_path):
    """A resumed run does not verify its data again because its first command did."""
    write_run(tmp_path / "r", verify_data=True)
    assert config.load([f"--resume={tmp_path}/r"]).verify_data is False


@pytest.mark.parametrize("content", ["", "null", "{}", '{"settings": {"seed": 7}}', "[" * 100_000, None])
def test_a_run_without_its_settings_is_named_with_the_way_out(tmp_path, capsys, content):
    """If the settings of a run cannot be read, one fault names the file and how to resume."""
    write_run(tmp_path / "r")
    os.remove(tmp_path / "r" / "config.json")
    if content is not None:
        (tmp_path / "r" / "config.json").write_text(content)
    (error,) = faults(capsys, f"--resume={tmp_path}/r")
    assert f"{tmp_path}/r/config.json cannot be read (" in error
    assert "with --resume=auto" in error


@pytest.mark.parametrize("path", CONFIGS)
def test_half_the_batch_size_is_the_same_experiment(path):
    """Half the batch_size changes nothing but the accumulation."""
    cfg = config.load([path])
    half = config.load([path, f"--batch_size={cfg.batch_size // 2}"])
    differs = {name for name in vars(cfg) if getattr(cfg, name) != getattr(half, name)} - {"origin"}
    assert differs == {"batch_size", "accumulation"}
    assert half.accumulation == 2 * cfg.accumulation


@pytest.mark.parametrize("path", CONFIGS)
def test_every_shipped_config_builds(path):
    """Every shipped config loads, and its model has the size that its text states."""
    cfg = config.load([path])
    cfg.vocab_size = cfg.vocab_size or 4096
    with torch.device("meta"):
        assert Transformer(cfg).counts()["total"] == STATED[cfg.run_id]


def test_the_dense_model_is_the_plan():
    """The dense 300M model has the numbers of its plan."""
    cfg = config.load(["config/train_dense_300m.py"])
    plan = dict(max_steps=100_000, total_batch_size=512 * 2048, warmup_steps=2000, dropout=0.1, n_kv_head=16)
    plan |= dict(eval_every=1000, save_every=10_000, weight_decay=0.1, grad_clip=1.0, adam_eps=1e-8)
    assert {key: getattr(cfg, key) for key in plan} == plan
    assert cfg.patience > 0
    assert not cfg.ternary
    assert schedule.lr(cfg, 1999) == 6e-4
    assert abs(schedule.lr(cfg, 99_999) - 6e-5) < 1e-9
    with torch.device("meta"):
        assert Transformer(cfg).embed.weight.shape == (50_304, 1024)


def test_the_mixture_is_the_plan():
    """The mixture has the numbers of its plan, and the parameters of idle experts are not active."""
    cfg = config.load(["config/train_moe_500m.py"])
    with torch.device("meta"):
        counts = Transformer(cfg).counts()
    idle = 12 * 6 * 3 * 768 * 2048
    assert counts["active"] == counts["total"] - idle == 166_226_688
    assert counts["ternary"] == 0
    assert cfg.max_steps == -(-10_000_000_000 // cfg.total_batch_size)
    assert cfg.keep_last == 3
    assert schedule.lr(cfg, 999) == 1e-3
    assert schedule.final_rates(cfg)[1] == 1e-4


def test_baseline_is_the_plan():
    """The baseline has the numbers of its plan, and train_best_95m differs in the optimizer only."""
    cfg = config.load(["config/train_baseline_95m.py"])
    plan = dict(max_steps=400_000, accumulation=2, total_batch_size=8192, warmup_steps=375, log_every=100)
    plan |= dict(eval_every=5000, sample_every=5000, save_every=10_000, seq_len=256, batch_size=16)
    assert {key: getattr(cfg, key) for key in plan} == plan
    assert schedule.boundary_steps(cfg) == {199_999, 200_000}
    assert schedule.lr(cfg, 374) == 1.5e-3
    assert schedule.lr(cfg, 200_000) == 1e-3
    assert abs(schedule.lr(cfg, 399_999) - 1.5e-5) < 1e-8
    assert schedule.weight_decay(cfg, 199_999) == 0.1
    assert schedule.weight_decay(cfg, 200_000) == 0
    best = config.load(["config/train_best_95m.py"])
    differs = {name for name in vars(cfg) if getattr(cfg, name) != getattr(best, name)} - {"origin"}
    assert differs == {"run_id", "optimizer"}
    assert best.optimizer == "muon"


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
