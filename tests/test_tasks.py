"""nanobit/tasks/text.py and arithmetic.py, evaluate.py, and the preparations of text to score."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CHARS, ROOT, run, settings, train, write_data

from model import Transformer
from nanobit.prepare import examples, token_files
from nanobit.tasks import arithmetic
from nanobit.tasks import text as tasks
from nanobit.tokenizer import make_tokenizer

CHAR = make_tokenizer({"kind": "char", "chars": CHARS})
PAIR = dict(
    sentence_good="a cat sits", sentence_bad="a cat sit", UID="agreement_1", linguistics_term="agreement"
)


class Bigram:
    """A model whose probabilities of the next token depend on the last one alone: {(last, next):
    probability}; the rest of each 1 is spread evenly over the other tokens."""

    def __init__(self, chances, ids, seq_len=64):
        table = torch.full((len(ids), len(ids)), float("nan"))
        for last, row in ids.items():
            given = {ids[b]: chance for (a, b), chance in chances.items() if a == last}
            table[row] = (1 - sum(given.values())) / (len(ids) - len(given))
            for column, chance in given.items():
                table[row, column] = chance
        self.logits = table.log() + 3.0  # not normalised
        self.cfg, self.embed = SimpleNamespace(seq_len=seq_len), SimpleNamespace(weight=self.logits)

    def __call__(self, idx, cache=None):
        assert idx.shape[1] <= self.cfg.seq_len
        if cache is None:
            return self.logits[idx]
        cache.length += idx.shape[1]
        return self.logits[idx][:, -1:]


def plain_score(model, ids, n):
    """Return (nats, greedy) of the last n ids, one at a time, nothing padded."""
    ids, nats, greedy = torch.tensor(ids)[-model.cfg.seq_len - 1 :], 0.0, True
    logits = model(ids[None, :-1])[0].double()
    for place in range(len(ids) - n, len(ids)):
        nats += logits[place - 1].log_softmax(-1)[ids[place]].item()
        greedy &= logits[place - 1].argmax().item() == ids[place].item()
    return nats, greedy


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@torch.no_grad()
def test_log_likelihoods_equal_a_plain_loop(batch_size):
    """Batched scores equal those of a plain loop, whatever the lengths, the padding and the batch size."""
    torch.manual_seed(0)
    model, texts = Transformer(settings(ternary=False)).eval(), []
    for length in (2, 3, 9, 9, 16, 17, 18, 40):
        ids = torch.randint(28, (length,)).tolist()
        texts += [(tuple(ids), n) for n in {1, min(length - 1, 5), min(length - 1, 16)}]
        ids[-1] = model(torch.tensor([ids[-17:-1]]))[0, -1].argmax().item()
        texts.append((tuple(ids), 1))
    found = tasks.log_likelihoods(model, texts, batch_size)
    want = [plain_score(model, *text) for text in texts]
    assert {greedy for _, greedy in want} == {False, True}
    for text, (nats, greedy) in zip(texts, want):
        assert found[text] == (pytest.approx(nats, abs=1e-4), greedy)


def test_what_is_scored_is_never_cut(capsys):
    """A text whose scored tokens do not fit the context is refused."""
    model, ids = Bigram({}, CHAR.ids, seq_len=8), tuple(CHAR.encode("\nabcdefgh"))
    assert tasks.log_likelihoods(model, [(ids, 8)], 1)[ids, 8][0] == pytest.approx(-8 * math.log(28))
    with pytest.raises(SystemExit):
        tasks.log_likelihoods(model, [(ids + ids, 9)], 1)
    assert "has 9 tokens, the model reads 8" in capsys.readouterr().err


def test_lambada_by_hand():
    """LAMBADA's accuracy and perplexity are per word, with the space, as worked out by hand."""
    model = Bigram({("a", " "): 0.5, (" ", "b"): 0.6, ("b", "c"): 0.3, ("b", "d"): 0.4}, CHAR.ids)
    texts = ["q a b", "q a bd", "q a bc"]  # the last: d is likelier
    result, lines = tasks.lambada(model, CHAR, 0, [dict(text=text) for text in texts], 2)
    nats = [math.log(0.5 * 0.6 * last) for last in (1, 0.4, 0.3)]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["n"] == 3
    assert result["perplexity"] == pytest.approx(math.exp(-sum(nats) / 3), rel=1e-6)
    assert result["tokens"] == 8
    assert result["val_loss"] == pytest.approx(-sum(nats) / 8, rel=1e-6)
    assert result["contexts_cut"] == 0
    assert len(lines) == 2


def test_lambada_tells_how_many_contexts_were_cut():
    """A context is cut on the left only if it does not fit, and the cuts are counted."""
    model = Bigram({("a", " "): 0.5}, CHAR.ids, seq_len=8)
    # what is read: the end-of-text token and the text but its last character
    for text, cut in (("xxxxa b", 0), ("xxxxxa b", 0), ("xxxxxxa b", 1), ("x" * 40 + "a b", 1)):
        result, lines = tasks.lambada(model, CHAR, 0, [dict(text=text)], 2)
        assert result["contexts_cut"] == cut
        assert len(lines) == 2 + cut
        assert result["perplexity"] == pytest.approx(28 / 0.5, rel=1e-6)


class Pieces:
    """A tokenizer whose tokens may span a space: always the longest piece that fits."""

    def __init__(self, *pieces):
        self.ids = {piece: i for i, piece in enumerate(pieces)}

    def encode(self, text):
        if not text:
            return []
        piece = max((piece for piece in self.ids if text.startswith(piece)), key=len)
        return [self.ids[piece], *self.encode(text[len(piece) :])]


def test_lambada_scores_a_token_across_the_border_with_the_word():
    """A token that spans the border between context and word is scored with the word."""
    pieces = Pieces("\n", "a", "b", " ", "c", "b c", "d")
    model = Bigram({("a", "b c"): 0.25, ("b c", "d"): 0.5, ("b", "d"): 0.9}, pieces.ids)
    result, lines = tasks.lambada(model, pieces, 0, [dict(text="ab cd")], 1)
    assert result["tokens"] == 2
    assert result["perplexity"] == pytest.approx(8, rel=1e-6)
    assert any("1 passages have a token across the border" in line for line in lines)


def pair(good, bad, paradigm, phenomenon):
    return dict(sentence_good=good, sentence_bad=bad, UID=paradigm, linguistics_term=phenomenon)


def test_blimp_by_hand():
    """BLiMP compares sums of log-likelihoods, a tie counts half, and paradigms have equal weight."""
    model = Bigram({("a", "b"): 0.5, ("\n", "z"): 0.01}, CHAR.ids)
    examples = [
        pair("ab", "ac", "one", "x"),  # right
        pair("ac", "ab", "one", "x"),  # wrong
        pair("ad", "ac", "one", "x"),  # a tie
        pair("ad", "ad", "one", "x"),  # a tie
        pair("ac", "abc", "two", "x"),  # right as a whole: the shorter; per token the other is likelier
        pair("zc", "ac", "three", "y"),  # wrong by the first token, after the end of a text
    ]
    result, lines = tasks.blimp(model, CHAR, 0, examples, 4)
    assert result["accuracy_by_paradigm"] == dict(one=0.5, two=1.0, three=0.0)
    assert result["accuracy_by_phenomenon"] == dict(x=0.75, y=0.0)
    assert result["accuracy"] == 0.5
    assert result["n"] == 6
    assert result["tokens"] == 12
    assert len(lines) == 3


def test_a_text_has_one_score_whatever_its_batch():
    """A text that occurs twice is scored once, so that equal sentences tie."""
    torch.manual_seed(0)
    model = Transformer(settings()).eval()
    examples = [pair("the same", "the same", "one", "x"), pair("a", "a longer one", "one", "x")]
    assert tasks.blimp(model, CHAR, 0, examples, 2)[0]["accuracy"] in (0.25, 0.75)
    asked = []
    model.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    tasks.blimp(model, CHAR, 0, examples, 2)
    assert sum(asked) == 3


def test_arithmetic_by_hand():
    """An answer counts only if it is right to the last character and ends there, and is counted under its
    kind."""
    chars = "\n+=0123456789"
    tokenizer = make_tokenizer({"kind": "char", "chars": chars})
    model = Bigram({("=", "1"): 0.5, ("1", "2"): 0.5, ("2", "\n"): 0.5}, tokenizer.ids)  # says 12 to all
    problems = [("5+7=", "12"), ("7+5=", "12"), ("10+2=", "12"), ("1+0=", "1"), ("10+113=", "123")]
    result, lines = arithmetic.score(model, tokenizer, 0, problems, 2)
    assert result["accuracy"] == 3 / 5
    assert result["n"] == 5
    assert result["accuracy_by_kind"] == {"+1": 2 / 3, "+2": 1.0, "+3": 0.0}
    assert "  wrong: 1+0=12, right is 1" in lines
    assert "  wrong: 10+113=12, right is 123" in lines


def write_lines(path, *rows):
    os.makedirs(path.parent, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_task(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta, [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]


def test_tasks_from_local_files(tmp_path):
    """All files are read in order, only the columns of the score are kept, and another data set is not
    replaced."""
    write_lines(tmp_path / "b.jsonl", dict(text="two words", id=7))
    write_lines(tmp_path / "a.jsonl", dict(text=" \u00e9t\u00e9 last\n"), dict(text="one two"))
    run("prepare/lambada.py", f"--files={tmp_path}/*.jsonl", f"--data_dir={tmp_path}/data")
    meta, rows = read_task(tmp_path / "data/lambada")
    assert [row["text"] for row in rows] == ["\u00e9t\u00e9 last", "one two", "two words"]
    assert meta["task"] == "lambada"
    assert meta["examples"] == 3
    assert meta["complete"] is True
    write_lines(tmp_path / "pairs/x.jsonl", PAIR | dict(field="syntax"))
    where = (f"--files={tmp_path}/pairs/x.jsonl", f"--data_dir={tmp_path}/data")
    run("prepare/blimp.py", *where, "--name=pairs")
    assert read_task(tmp_path / "data/pairs") == (meta | read_task(tmp_path / "data/pairs")[0], [PAIR])
    _, err = run("prepare/blimp.py", *where, "--name=lambada", code=2)
    assert "holds another data set" in err
    assert read_task(tmp_path / "data/lambada")[0] == meta


@pytest.mark.parametrize(
    "script, content, says",
    [
        (
            "lambada",
            '{"text": "a b"}\n{"txt": "a b"}\n',
            "x.jsonl, line 2: no text in column 'text'; it has txt",
        ),
        ("lambada", '{"text": " "}\n', "line 1: no text in column 'text'"),
        ("lambada", '{"text": 3}\n', "line 1: no text in column 'text'"),
        ("lambada", '["a b"]\n', "line 1: no text in column 'text'; it is ['a b']"),
        ("lambada", '{"text": "alone "}\n', "line 1: 'alone' is one word"),
        ("lambada", '{"text": "a b"}\n{"text": "a\n', "x.jsonl, line 2: not JSON"),
        ("lambada", '{"text": "a \u00e9"}\n'.encode("latin-1"), "x.jsonl, line 1: not JSON"),
        ("lambada", "", "no text in 1 file"),
        ("lambada", None, "matches no file"),
        ("blimp", json.dumps(PAIR | dict(UID="")), "line 1: no text in column 'UID'"),
        ("blimp", '{"sentence_good": "a"}', "no text in column 'sentence_bad'; it has sentence_good"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, script, content, says):
    """A row that cannot be scored stops the preparation with one line, and nothing is written."""
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    where = (f"--files={tmp_path}/x.jsonl", f"--data_dir={tmp_path}/data")
    _, err = run(f"prepare/{script}.py", *where, code=2)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert says in err, err
    assert not os.path.exists(tmp_path / "data")


def test_flags_that_exclude_each_other_are_refused():
    """--files excludes the flags of the hub; --help works from a child process."""
    _, err = run("prepare/blimp.py", "--files=x", "--repo=y", "--config=z", "--name=", code=2)
    assert err.count("error: ") == 3
    assert "--repo and --files exclude each other" in err
    for script in ("prepare/lambada.py", "prepare/blimp.py"):
        shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert f"python {script}" in shown.stdout, shown.stderr
        assert "--revision=" in shown.stdout, shown.stderr


def local_hub(folder, kind, **configs):
    """Write a folder laid out as a repository of the hub: {config: (split, rows)}."""
    import datasets

    readme = "---\nconfigs:\n"
    for name, (split, rows) in configs.items():
        readme += f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/*.{kind}\n"
        os.makedirs(folder / name)
        table = datasets.Dataset.from_list(rows)
        (table.to_json if kind == "jsonl" else table.to_parquet)(folder / name / f"0.{kind}")
    (folder / "README.md").write_text(readme + "---\n")


def test_tasks_from_a_folder_like_the_hub(tmp_path, capsys):
    """All paradigms, the given split and configuration are read, without a bar in a log."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    patch = f"import os; os.environ |= dict(HF_HUB_OFFLINE='1', HF_HOME={str(tmp_path / 'home')!r})"
    words, where = [dict(text="un deux"), dict(text="trois quatre")], f"--data_dir={tmp_path}/data"
    local_hub(tmp_path / "words", "jsonl", en=("test", [dict(text="one two")]), fr=("test", words))
    _, err = run("prepare/lambada.py", f"--repo={tmp_path}/words", "--config=fr", where, patch=patch)
    assert read_task(tmp_path / "data/lambada")[1] == words
    assert err == ""
    assert "--revision=" in read_task(tmp_path / "data/lambada")[0]["source"]
    with pytest.raises(SystemExit):
        examples.rows(SimpleNamespace(repo=str(tmp_path / "words"), split="test", revision=""), "it")
    assert "error: config = 'it' of" in capsys.readouterr().err
    other, more = PAIR | dict(UID="agreement_2"), dict(field="syntax")
    local_hub(tmp_path / "pairs", "parquet", one=("train", [PAIR, PAIR]), two=("train", [other | more]))
    run("prepare/blimp.py", f"--repo={tmp_path}/pairs", where, patch=patch)
    assert read_task(tmp_path / "data/blimp")[1] == [PAIR, PAIR, other]
    assert examples.config_names(SimpleNamespace(config="two")) == ["two"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return data_dir, out_dir of a tiny run."""
    folder = tmp_path_factory.mktemp("trained")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "r", max_steps=4, eval_every=0, sample_every=0, prepare="python prepare/x.py")
    return data_dir, out_dir


def evaluate(trained, *args, code=0):
    """Return (the JSON line, stdout, stderr) of evaluate.py on the tiny run."""
    out, err = run("evaluate.py", f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}", *args, code=code)
    return code == 0 and json.loads(out.strip().split("\n")[-1]), out, err


def change_meta(data_dir, name, **changes):
    path = os.path.join(data_dir, name, "meta.json")
    with open(path, encoding="utf-8") as file:
        meta = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(meta | changes, file)


def test_evaluate_reads_any_split_and_data_set(trained):
    """The split and data set of the flags are read; a task is scored on its val split only."""
    result = evaluate(trained, "--split=train")[0]
    assert result["tokens"] == 31 * 16
    assert result["split"] == "train"
    assert "accuracy" not in result
    write_data(trained[0], "other", n_val=400)
    change_meta(trained[0], "other", task="tictactoe")  # a score belongs to what is held out
    assert "accuracy" not in evaluate(trained, "--dataset=other", "--split=train")[0]


def test_bits_per_byte_count_the_bytes_of_the_text(trained):
    """bits_per_byte uses the bytes of the split, which are not its tokens."""
    write_data(trained[0], "bytes", n_val=400)
    change_meta(trained[0], "bytes", bytes=dict(train=500, val=1600))
    other = evaluate(trained, "--dataset=bytes", "--eval_tokens=64")[0]
    assert other["dataset"] == "bytes"
    assert other["split"] == "val"
    assert other["tokens"] == 64
    assert other["bits_per_byte"] == pytest.approx(other["val_loss"] / math.log(2) / 4)


def test_evaluate_refuses_another_tokenizer(trained):
    """A data set of another vocabulary, or with another token at the beginning of texts, is refused."""
    write_data(trained[0], "foreign", vocab_size=3)
    change_meta(trained[0], "foreign", tokenizer=token_files.char_tokenizer("\nab"))
    assert "has another tokenizer" in evaluate(trained, "--dataset=foreign", code=2)[2]
    write_data(trained[0], "begins", n_val=400)
    change_meta(trained[0], "begins", bos=5)  # the same ids, but each text after another one
    err = evaluate(trained, "--dataset=begins", code=2)[2]
    assert "its texts begin with token 5, the model's with 0" in err


def test_evaluate_scores_a_rounded_head(trained):
    """With --head=int8 the loss of the rounded head stands beside the exact one."""
    exact = evaluate(trained)[0]["val_loss"]
    rounded = evaluate(trained, "--head=int8")[0]
    assert rounded["head"] == "int8"
    assert rounded["exact_val_loss"] == exact
    assert 0 < abs(rounded["val_loss"] - exact) < 0.01


def test_flags_of_evaluate_reach_the_model(trained):
    """--packed and --dtype arrive at the model."""
    spy = """
import torch; from nanobit import metrics
real = metrics.mean_loss
def mean_loss(of, batches):
    packed = any(type(layer).__name__ == "PackedLinear" for layer in of.modules())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else "float32"
    print("packed", packed, dtype)
    return real(of, batches)
metrics.mean_loss = mean_loss
"""
    flags = [f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}"]
    assert "packed True float32" in run("evaluate.py", *flags, patch=spy)[0]
    out, _ = run("evaluate.py", *flags, "--packed=False", "--dtype=float16", patch=spy)
    assert "packed False torch.float16" in out


def test_evaluate_refuses_what_is_not_there(trained):
    """A missing data set is answered with its own preparation, a wrong number with its range."""
    for flag, says in (
        ("--dataset=lambada", "make it: python prepare/lambada.py --data_dir="),
        ("--games=0", "games = 0 must be at least 1"),
    ):
        err = evaluate(trained, flag, code=2)[2]
        assert err.splitlines()[-1].startswith("error: "), err
        assert says in err, err


def test_a_loss_that_is_not_finite_fails(trained):
    """evaluate.py never reports a loss of null with exit code 0."""
    flags = [f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}"]
    patch = "from nanobit import metrics; metrics.mean_loss = lambda *_: float('nan')"
    out, err = run("evaluate.py", *flags, patch=patch, code=1)
    assert "error: val_loss is nan: what this model computes is too large for float32" in err
    assert "val_loss" not in out


def test_evaluate_scores_text(trained, tmp_path):
    """A task of text is scored from its task.jsonl, and has the split val only."""
    where, long = f"--data_dir={trained[0]}", dict(text="a context far too long for it")
    write_lines(tmp_path / "words.jsonl", dict(text="some words here"), long)
    write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR | dict(sentence_good="the end"))
    run("prepare/lambada.py", f"--files={tmp_path}/words.jsonl", where, "--name=words")
    run("prepare/blimp.py", f"--files={tmp_path}/pairs.jsonl", where, "--name=pairs")
    words, out, err = evaluate(trained, "--dataset=words", "--batch_size=1")
    assert words["n"] == 2
    assert words["contexts_cut"] == 1
    assert words["step"] == 4
    assert err == "using run r, step 4\n"
    assert words["tokens"] == len(" here it")
    assert 20 < math.exp(words["val_loss"]) < 40
    assert "2 examples" in out
    assert "1 passages lost their beginning" in out
    pairs = evaluate(trained, "--dataset=pairs")[0]
    assert pairs["n"] == 2
    assert pairs["accuracy_by_phenomenon"] == dict(agreement=pairs["accuracy"])
    assert "has the split val only" in evaluate(trained, "--dataset=pairs", "--split=train", code=2)[2]


def test_half_a_task_is_not_scored(tmp_path, capsys):
    """A damaged or incomplete task is refused; an unknown character names its example."""
    write_lines(tmp_path / "words.jsonl", dict(text="some words"))
    run("prepare/lambada.py", f"--files={tmp_path}/words.jsonl", f"--data_dir={tmp_path}")
    folder, path = str(tmp_path / "lambada"), tmp_path / "lambada/task.jsonl"
    assert tasks.read(folder) == ("lambada", [dict(text="some words")])
    for damage, says in (
        (lambda: change_meta(tmp_path, "lambada", task="chess"), "task 'chess' is unknown"),
        (lambda: os.truncate(path, 5), "task.jsonl is damaged"),
        (lambda: os.truncate(path, 0), "has 0 examples, meta.json says 1"),
        (lambda: (tmp_path / "lambada/meta.json").write_text("{"), "meta.json is damaged"),
        (lambda: os.remove(tmp_path / "lambada/meta.json"), "is not complete (no meta.json)"),
    ):
        damage()
        with pytest.raises(SystemExit) as stop:
            tasks.read(folder)
        assert says in capsys.readouterr().err
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        tasks.lambada(Bigram({}, CHAR.ids), CHAR, 0, [dict(text="a b"), dict(text="a B")], 1)
    assert "example 2 ('a B'): the tokenizer has no character 'B'" in capsys.readouterr().err


def test_a_damaged_example_is_one_line(tmp_path, capsys):
    """Each kind of damage to a task gives one printable line before anything is scored."""
    for name, rows in (("lambada", [dict(text="a b")]), ("blimp", [PAIR])):
        for line in ("[1]", '{"text": 3, "UID": ""}', "{}", "[" * 100_000, "\xff", '"\x1b[2J"'):
            folder = tmp_path / name
            write_lines(folder / "task.jsonl", *rows)
            with open(folder / "task.jsonl", "ab") as file:
                file.write(line.encode("latin-1") + b"\n")
            (folder / "meta.json").write_text(json.dumps(dict(task=name, examples=2)))
            with pytest.raises(SystemExit) as stop:
                tasks.read(str(folder))
            error = capsys.readouterr().err
            assert stop.value.code == 2
            assert "task.jsonl is damaged" in error
            assert error[:-1].isprintable()
    for meta in ("[]", '{"task": 3, "examples": 2}', '{"task": "blimp", "examples": "2"}', "[" * 100_000):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(SystemExit):
            tasks.read(str(folder))
        assert "meta.json is damaged" in capsys.readouterr().err


def test_damaged_problems_are_one_line(tmp_path, capsys):
    """problems.txt is refused, with one line, if its size, format or an answer is wrong."""
    path, content = tmp_path / "problems.txt", b"12+7=19\n3-10=-7\n12x12=144\n"
    path.write_bytes(content)
    assert arithmetic.read(str(tmp_path), len(content)) == [
        ("12+7=", "19"),
        ("3-10=", "-7"),
        ("12x12=", "144"),
    ]
    for damaged, says in (
        (content.replace(b"19", b"18"), "line 1 is '12+7=18'"),
        (content.replace(b"3-", b"\xff-"), "line 2 is"),
        (content.replace(b"-10", b" 10"), "line 2 is"),
        (content.replace(b"=19\n", b"=19 "), "line 1 is"),
        (content[:8], "has 8 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as stop:
            arithmetic.read(str(tmp_path), len(content))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert says in error, error
        assert error.count("\n") == 1, error


def test_evaluate_verifies_the_data(trained):
    """--verify_data finds a byte that changed while the size and time of the file stayed."""
    write_data(trained[0], "rotten")
    evaluate(trained, "--dataset=rotten")
    path = os.path.join(trained[0], "rotten", "val_00000.bin")
    stat = os.stat(path)
    with open(path, "r+b") as file:
        low = file.read(1)[0]
        file.seek(0)
        file.write(bytes([0 if low else 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _, _, err = evaluate(trained, "--dataset=rotten", "--verify_data", code=2)
    assert "val_00000.bin has changed" in err


def test_an_unknown_task_is_refused(trained):
    """A task that this version cannot score is an error, not a missing score."""
    write_data(trained[0], "strange")
    change_meta(trained[0], "strange", task="arithmetik")
    assert "task 'arithmetik' is unknown" in evaluate(trained, "--dataset=strange", code=2)[2]
