"""README.md and the pages of docs/: their commands run, and what they name exists."""

import json
import os
import re
import runpy
import shlex

import faults
import pytest
import torch
from conftest import ROOT, run
from documents import prepare, run_here
from parts import llama_folder

DOCS = [
    "README.md",
    *(f"docs/{name}" for name in sorted(os.listdir(os.path.join(ROOT, "docs"))) if name.endswith(".md")),
]
PAGES = ["README.md", "docs/experiments.md", "docs/data.md", "docs/how-it-works.md", "docs/chat.md"]
MODEL = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--ffn_dim=32"]
HUB = ["--repo={hub}", "--vocab_size=330", "--workers=1"]
SMALL = {  # what makes a command small enough for a test, without changing what it does
    "prepare/arithmetic.py": ["--train_problems=500", "--val_problems=20"],
    "prepare/tictactoe.py": ["--games=2000", "--val_fraction=0.1"],
    "prepare/tinystories.py": HUB,
    "prepare/fineweb_edu.py": [*HUB, "--config=", "--tokenizer=sentencepiece", "--val_fraction=0.2"],
    "prepare/text.py": ["--files={hub}/*.jsonl", "--vocab_size=330", "--workers=1", "--val_fraction=0.2"],
    "prepare/chat.py": ["--files={talks}/*.jsonl", "--val_fraction=0.2", "--workers=1"],
    "prepare/lambada.py": ["--files={tasks}/*.jsonl"],
    "prepare/blimp.py": ["--files={tasks}/*.jsonl"],
    "train.py": [
        "--max_steps=2",
        "--eval_tokens=640",
        "--sample_tokens=2",
        "--batch_size=2",
        "--total_batch_size=0",
        "--save_every=1",
        "--no-compile",
        "--out_dir={runs}",
    ],
    "bench.py": [
        "--pairs=1",
        "--warmup=1",
        *MODEL,
        "--no-compile",
        "--seq_len=16",
        "--vocab_size=300",
        "--total_batch_size=0",
    ],
    "evaluate.py": ["--eval_tokens=640", "--games=3"],
    "sample.py": ["--max_new_tokens=5"],
    "compare.py": ["--max_steps=2", "--eval_tokens=640", "--sample_every=0", "--seeds=1", "--out_dir={runs}"],
    "monitor.py": [],
    "export.py": [],
}


def text_of(page):
    """Return the text of a page, by its path in the repository."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        return file.read()


def commands_of(page):
    """Return every `python ...` of a page, in blocks and in the text."""
    text = text_of(page)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.strip().split("\n")]
    lines += re.findall(r"`(python [^`]+)`", text)
    return [line for line in lines if line.startswith("python ") and "--help" not in line]


def flag_of(command, name):
    """Return the value of --name=value in a command, or ''."""
    match = re.search(rf"--{name}=(\S+)", command)
    return match[1] if match else ""


def config_of(command):
    """Return the name of the config file in a command, or ''."""
    match = re.search(r"config/(\w+)\.py", command)
    return match[1] if match else ""


def made_by(command):
    """Return the folder that a command makes: "data/NAME", "runs/NAME", or ''."""
    script = command.split()[1]
    if script.startswith("prepare/"):
        return "data/" + (flag_of(command, "name") or script[len("prepare/") : -len(".py")])
    if script == "train.py" and "--resume=runs/" not in command:
        return "runs/" + (flag_of(command, "run_id") or config_of(command))
    return ""


def needed_by(command):
    """Return the folders that a command reads, or that it continues."""
    needed = re.findall(r"runs/\w+", command)
    data_set = flag_of(command, "dataset")
    if re.search(r" (train|compare)\.py config/", command) and not data_set:
        data_set = runpy.run_path(os.path.join(ROOT, "config", config_of(command) + ".py"))["dataset"]
    if data_set:
        needed.append(f"data/{data_set}")
    if "--resume=auto" in command:
        needed.append(made_by(command))
    return needed


DEMO = "python " + re.search(r"python (train.py .*)", text_of("Makefile"))[1]
COMMANDS = sorted({DEMO, *(command for page in PAGES for command in commands_of(page))})


class Session:
    """Runs the commands of the pages, each once, after those that make what it reads."""

    def __init__(self, folders):
        self.folders = folders
        self.outputs = {}  # {command: its stdout}
        self.makers = {}  # {folder: the command that makes it}
        for command in sorted(COMMANDS, key=lambda text: "--resume" in text):
            self.makers.setdefault(made_by(command), command)

    def run(self, command):
        """Return the stdout of a command."""
        if command not in self.outputs:
            for folder in needed_by(command):
                if self.makers[folder] != command:
                    self.run(self.makers[folder])
            self.outputs[command] = self.run_small(command, self.folders["out"])
        return self.outputs[command]

    def run_small(self, command, out):
        """Run a command with small settings. What it exports, draws, or reads by a plain name is in `out`."""
        script, *args = shlex.split(command)[1:]
        more = [flag.format(**self.folders) for flag in SMALL[script]]
        if script.startswith(("prepare/", "train.py", "evaluate.py", "compare.py")):
            more.append(f"--data_dir={self.folders['data']}")
        if re.search(r" (train|compare)\.py config/", command) and "--n_layer" not in command:
            more += MODEL
        if "--resume" in command:
            more.append("--max_steps=3")
        if command == "python monitor.py":
            more.append(f"--out_dir={self.folders['runs']}")
        args = [arg.replace("runs/", self.folders["runs"] + "/") for arg in args]
        args = [re.sub(r"=(\w+\.png)", rf"={out}/\1", arg) for arg in args]
        args = [re.sub(r"^--(out|ckpt|init_from)=(?!/|models/)", rf"--\1={out}/", arg) for arg in args]
        args = [arg.replace("--tokenizer=llama", f"--tokenizer={out}/llama") for arg in args]
        if script.startswith("prepare/"):
            return prepare(*args, *more, script=script[len("prepare/") : -len(".py")])[0]
        if script == "monitor.py" or "--verify" in args:  # what they import takes longer than what they do
            with torch._dynamo.config.patch(disable=True):  # parts of transformers' code are compiled
                return run_here(script, *args, *more)[0]
        patch = faults.forked_runs(0) if script == "compare.py" else ""
        return run(script, *args, *more, patch=patch)[0]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Return a Session, and make the texts that its preparations read."""
    folders = {
        name: str(tmp_path_factory.mktemp(name)) for name in ("runs", "data", "hub", "tasks", "talks", "out")
    }
    pair = dict(
        sentence_good="a dog sat", sentence_bad="a dog sit", UID="agreement", linguistics_term="verbs"
    )
    rows = [pair | dict(text=f"a story of a dog,\na cat and the bird number {i}") for i in range(300)]
    for folder, split, n in (("hub", "train", 300), ("hub", "validation", 300), ("tasks", "test", 10)):
        with open(os.path.join(folders[folder], f"{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[:n])
    talks = re.search(r"```json\n(.*?)```", text_of("docs/chat.md"), re.S)[1].splitlines()
    talks += [json.dumps(dict(prompt=f"a dog and {i} birds", completion="a cat")) for i in range(40)]
    with open(os.path.join(folders["talks"], "talks.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in talks)
    return Session(folders)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, session):
    """Every command of the pages runs."""
    session.run(command)


def test_the_page_on_exports(session, tmp_path, monkeypatch, capsys):
    """The commands and programs of docs/export.md run in their order, and all write the same text."""
    for name in ("transformers", "cyllama"):
        pytest.importorskip(name, reason="the readers of exports: requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    for name in ("train_text", "chat"):
        session.run(session.makers[f"runs/{name}"])
    llama_folder(tmp_path / "llama")  # in place of one that is downloaded
    outputs = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text_of("docs/export.md"), re.S):
        if language == "python":
            with torch._dynamo.config.patch(disable=True):
                exec(block, {})
            outputs.append(capsys.readouterr().out.strip())
            continue
        for command in block.strip().split("\n"):
            if command.startswith("python "):
                outputs.append(session.run_small(command, str(tmp_path)))
    assert len(outputs) == 20
    ours, theirs = [text for text in outputs if text.startswith("Once upon a time")][:2]
    assert len(theirs) > 16
    assert ours.startswith(theirs.rstrip()), outputs


def test_the_front_page_is_short():
    """README.md has at most 10,500 characters, and a picture."""
    text = text_of("README.md")
    assert len(text) <= 10_500
    assert re.search(r"!\[.+\]\(docs/\w+\.png\)", text)


def test_make_targets_exist():
    """Every make command of the pages is a target of the Makefile, and setup, demo and test are."""
    texts = "\n".join(text_of(page) for page in PAGES)
    targets = {"setup", *re.findall(r"(?:^|`)make (\w+)", texts, re.M)}
    assert {"demo", "test"} <= targets
    for name in targets:
        assert re.search(rf"^{name}:", text_of("Makefile"), re.M), name


@pytest.mark.parametrize("page", DOCS)
def test_named_files_exist(page):
    """The modules, pages and configs that a page names exist."""
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", text_of(page)):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for name in re.findall(r"`(train_\w+)`", text_of(page)):
        assert os.path.exists(os.path.join(ROOT, "config", f"{name}.py")), name


def anchors_of(text):
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCS)
def test_links_lead_somewhere(page):
    """The files, pictures and headings that a page links to exist."""
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text_of(page)):
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, target)), target
        if anchor:
            assert anchor in anchors_of(text_of(target)), f"{target}#{anchor}"


def test_every_config_stands_in_the_table():
    """The table of README.md has a row for each experiment of config/."""
    rows = re.findall(r"^\| `(\w+)` \|", text_of("README.md"), re.M)
    names = [name[:-3] for name in os.listdir(os.path.join(ROOT, "config")) if name.startswith("train_")]
    assert sorted(rows) == sorted(names)
