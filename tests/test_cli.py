"""nanobit/cli.py: what a flag's row says is what the command line is checked against."""

import pytest

import config
from nanobit.cli import Flag

FLAGS = {
    "ckpt": Flag("", "a run", required=True),
    "prompt": Flag("", "a text", not_with="file", required=True, unless="file plan"),
    "file": Flag("", "a file of text"),
    "plan": Flag(False, "make a plan"),
    "format": Flag("", "hf | gguf", ("", "hf", "gguf")),
    "device": Flag("cpu", "cpu | cuda:1", ("cpu", "cuda:1")),
    "steps": Flag(10, "at least 0 by default", only_with="plan"),
    "share": Flag(0.5, "a fraction", within="(0, 1]"),
    "digits": Flag(2, "digits", within="[1, 9]"),
    "heat": Flag(1.0, "a temperature", within="[0, 0] or [0.01, inf)"),
    "type": Flag("f16", "a type", only_with="format=gguf"),
    "watts": Flag(0.0, "power", only_with="plan price"),
    "price": Flag(0.0, "price of power", only_with="plan watts"),
    "name": Flag("x", "a folder"),
    "try": Flag([], "a text", many=True),
}


def load(*argv):
    return config.load(list(argv), flags=FLAGS, only=())


@pytest.mark.parametrize(
    "argv",
    [
        ["--prompt=a", "--share=1", "--digits=9", "--heat=0"],
        ["--prompt=a", "--share=0.001", "--digits=1", "--heat=0.01", "--device=cuda:7"],
        ["--file=x", "--format=gguf", "--type=f32"],
        ["--plan", "--steps=0", "--watts=1", "--price=2"],
    ],
)
def test_what_the_rows_allow_is_accepted(argv):
    """Ends of intervals, choices, modes and replacements of a required flag are accepted."""
    cfg = load("--ckpt=x", *argv)
    assert cfg.ckpt == "x"


def test_a_flag_may_be_given_several_times():
    """The texts of such a flag are a list in their order, even those that look like numbers."""
    assert vars(load("--ckpt=x", "--plan", "--try=a=1", "--try", "3", "--try="))["try"] == ["a=1", "3", ""]
    assert vars(load("--ckpt=x", "--plan"))["try"] == []


@pytest.mark.parametrize(
    "argv, error",
    [
        (["--share=0"], "share = 0.0 must be more than 0 and at most 1"),
        (["--share=1.5"], "share = 1.5 must be more than 0 and at most 1"),
        (["--digits=10"], "digits = 10 must be at least 1 and at most 9"),
        (["--heat=0.001"], "heat = 0.001 must be 0 or at least 0.01"),
        (["--plan", "--steps=-1"], "steps = -1 must be at least 0"),
        (["--format=onnx"], "format = 'onnx' is unknown; choose one of hf, gguf"),
        (["--device=cuda:x"], "device = 'cuda:x' is unknown; choose one of cpu, cuda:1"),
        (["--steps=5"], "--steps only applies together with --plan"),
        (["--format=hf", "--type=f32"], "--type only applies together with --format=gguf"),
        (["--plan", "--watts=100"], "--watts only applies together with --price"),
        (["--file=x"], "--prompt and --file exclude each other; leave one out"),
        (["--name="], "name = '' is not the name of a folder; give a name without / and \\"),
        (["--name=a/b"], "name = 'a/b' is not the name of a folder; give a name without / and \\"),
    ],
)
def test_a_fault_names_the_value_and_the_remedy(capsys, argv, error):
    """Each fault is one line with the value, what is expected, and what to do."""
    with pytest.raises(SystemExit) as stop:
        load("--ckpt=x", "--prompt=a", *argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_all_faults_of_flags_are_reported_together(capsys):
    """Missing flags, ranges and combinations come in one run, one line each."""
    with pytest.raises(SystemExit):
        load("--share=2", "--steps=5", "--digits=x")
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "error: --digits=x: digits must be int, got str 'x'",
        "error: --ckpt=... is missing; --help explains it",
        "error: --prompt=... or --file or --plan is missing; --help explains it",
        "error: --steps only applies together with --plan",
        "error: share = 2.0 must be more than 0 and at most 1",
    ]


def test_paths_belong_to_commands_that_take_them(capsys):
    """Arguments that are not flags are kept in cfg.paths for a command that takes them."""
    flags = {"json": Flag(False, "print JSON")}
    cfg = config.load(["a", "--json", "b"], flags=flags, only=(), takes_paths=True)
    assert cfg.paths == ["a", "b"]
    assert cfg.json
    with pytest.raises(SystemExit):
        config.load(["a", "--json"], flags=flags, only=())
    assert "a: this script takes no file" in capsys.readouterr().err


def test_a_command_may_derive_settings_before_they_are_compared():
    """A command's own function sees the settings first, and its faults are reported with the others."""

    def derive(cfg):
        cfg.max_steps = 7
        return []

    assert config.load([], derive=derive).max_steps == 7
    with pytest.raises(SystemExit):
        config.load(["--max_steps=1"], derive=lambda cfg: ["a fault of the command"])
