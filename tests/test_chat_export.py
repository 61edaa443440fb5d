"""
Conversations in other engines: the template of exports makes our ids, generation ends with an answer.

    python tests/test_chat_export.py runs/chat held_out.jsonl    the same of a checkpoint and these questions
"""

import importlib.util
import json
import sys
import tempfile
from collections import Counter

import pytest
import torch
from parts import CHAR, llama_folder, llama_like, part_of, sentencepiece, tiktoken

from nanobit import chat, weights
from nanobit.export import card, gguf_file, hf, tokenizer_files, verify
from nanobit.generate import write_on
from nanobit.infer.restore import restore
from nanobit.tasks import answers
from nanobit.tokenizer import bos_of, make_tokenizer

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
jinja2 = pytest.importorskip("jinja2")
cyllama = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="needs cyllama: requirements-dev.txt"
)
LETTERS = CHAR | dict(chars="\0\n\t" + "".join(map(chr, range(32, 127))))
KINDS = pytest.mark.parametrize("make", [lambda: LETTERS, sentencepiece, llama_like, tiktoken])
TEXTS = [
    "the cat",
    "two\nlines\n\n\tand  spaces",
    " spaces around it\n",
    "User: a name\nAssistant: and another",
    "</s> and <s>, <unk> or <|endoftext|><|endoftext|>",
    "<</s>> < /s> <|endoftext",
    "12 birds, 1212 cats",
]


def conversations():
    """Return conversations whose last message is of the user."""
    user = [{"role": "user", "content": text} for text in TEXTS]
    answers = [{"role": "assistant", "content": text} for text in TEXTS]
    system = [{"role": "system", "content": text} for text in TEXTS]
    single = [[message] for message in user]
    longer = [[system[i], user[i - 1], answers[i - 2], user[i]] for i in range(len(TEXTS))]
    return single + longer


def chat_spec(make):
    return make() | dict(chat=chat.FORMAT)


@KINDS
def test_transformers_makes_our_ids(make, tmp_path):
    """apply_chat_template gives the ids of sample.py and, with an answer, those of training; a special token
    that a text names is ordinary text."""
    spec = chat_spec(make)
    tokenizer = make_tokenizer(spec)
    tokenizer_files.write(spec, str(tmp_path), 64)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for messages in conversations():
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == chat.prompt_ids(tokenizer, spec, messages)
        n_answers = sum(message["role"] == "assistant" for message in messages)
        assert ids.count(spec["eot"]) == n_answers + (bos_of(spec) == spec["eot"])
        assert ids.count(bos_of(spec)) == 1 + n_answers * (bos_of(spec) == spec["eot"])
        whole = [*messages, {"role": "assistant", "content": TEXTS[0]}]
        ids = theirs.apply_chat_template(whole, return_dict=False)
        assert ids == chat.encode(tokenizer, spec, whole)[0]


class Sandbox:
    """The template of a GGUF file as llama.cpp uses it: rendered, without the first token, which it adds."""

    def __init__(self, path):
        self.llama = verify.Llama(path)
        self.vocab = self.llama.model.get_vocab()
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = env.from_string(self.llama.model.get_default_chat_template())

    def ids(self, messages):
        """Return the ids of a prompt."""
        names = [self.vocab.token_to_piece(i, special=True) for i in (self.vocab.token_bos(), self.eos())]
        marks = dict(zip(("bos_token", "eos_token"), names))
        text = self.template.render(messages=messages, add_generation_prompt=True, **marks)
        return self.vocab.tokenize(text.removeprefix(names[0]), True, True)

    def eos(self):
        return self.vocab.token_eos()


@cyllama
@KINDS
def test_llama_cpp_makes_our_ids(make, tmp_path):
    """The template of a GGUF file gives the ids of sample.py."""
    spec = chat_spec(make)
    tokenizer = make_tokenizer(spec)
    path = str(tmp_path / "x.gguf")
    gguf_file.write(part_of(spec, vocab_size=tokenizer.size), path, "f32", "f32")
    sandbox = Sandbox(path)
    for messages in conversations():
        assert sandbox.ids(messages) == chat.prompt_ids(tokenizer, spec, messages)


QUESTIONS = {"Is it day?": "Yes.", "Is it night?": "No, it is day."}


def message(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def trained():
    """Return the part of a small model that has learned the answers to QUESTIONS, and their ends."""
    part = part_of(LETTERS | dict(chat=chat.FORMAT), vocab_size=len(LETTERS["chars"]), n_layer=1)
    model = restore(part, "cpu").train()
    tokenizer = make_tokenizer(part["tokenizer"])
    rows = []
    for question, answer in QUESTIONS.items():
        whole = [*message(question), {"role": "assistant", "content": answer}]
        rows.append(torch.tensor([chat.encode(tokenizer, part["tokenizer"], whole)[0]]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        sum(model(row[:, :-1], row[:, 1:])[0] for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    part["model"] = {name: w.detach().clone() for name, w in model.state_dict().items()}
    part["model"]["head.weight"] = part["model"]["embed.weight"]
    return part


def test_answers_are_the_same_and_end_there(trained, tmp_path):
    """The greedy answer of sample.py is that of transformers' pipeline, which ends with the answer."""
    spec = trained["tokenizer"]
    tokenizer = make_tokenizer(spec)
    hf.write(trained, str(tmp_path / "x"))
    model = restore(trained, "cpu", packed=True)
    talk = transformers.pipeline("text-generation", model=str(tmp_path / "x"))
    for question, answer in QUESTIONS.items():
        ids = chat.prompt_ids(tokenizer, spec, message(question))
        ours = "".join(write_on(model, tokenizer, spec["eot"], ids, 20, temperature=0.0))
        assert ours == f" {answer}"
        with torch._dynamo.config.patch(disable=True):
            made = talk(message(question), max_new_tokens=20, do_sample=False)
        assert made[0]["generated_text"][-1] == {"role": "assistant", "content": f" {answer}"}


@cyllama
def test_llama_cpp_ends_at_the_end_of_an_answer(trained, tmp_path):
    """llama.cpp counts the token after an answer as the end of generation."""
    path = str(tmp_path / "x.gguf")
    gguf_file.write(trained, path, "f32", "f32")
    sandbox = Sandbox(path)
    tokenizer = make_tokenizer(trained["tokenizer"])
    for question, answer in QUESTIONS.items():
        new = list(sandbox.llama.write(sandbox.ids(message(question)), len(answer) + 2))
        assert tokenizer.decode(new[:-1]) == f" {answer}"
        assert sandbox.vocab.is_eog(new[-1])


def test_a_base_model_has_no_template(tmp_path):
    """The exports of a base model hold no template, and their card says that it does not answer."""
    tokenizer_files.write(LETTERS, str(tmp_path), 64)
    assert "chat_template" not in json.load(open(tmp_path / "tokenizer_config.json"))


def test_the_card_shows_how_to_talk(trained, tmp_path):
    """The model card of a chat model has messages in place of a prompt."""
    hf.write(trained, str(tmp_path / "x"))
    card.write(trained | dict(tokens=1), str(tmp_path / "x"), str(tmp_path / "x"))
    text = (tmp_path / "x" / "README.md").read_text()
    assert "--ckpt=FOLDER --chat --temperature=0" in text
    assert 'messages = [{"role": "user"' in text
    assert "does not answer" not in text


def test_a_foreign_template_is_ignored_with_one_line(trained, tmp_path, capsys):
    """A template of another origin is reported, and our own is not."""
    llama_folder(tmp_path / "llama")
    for name, content in (("tokenizer_config.json", '{"chat_template": "x"}'), ("chat_template.jinja", "x")):
        (tmp_path / "llama" / name).write_text(content)
        for read in (weights.initial, lambda path: weights.trained(path)[0]):
            assert "chat" not in read(str(tmp_path / "llama"))["tokenizer"]
            assert capsys.readouterr().err.count("its chat_template is ignored") == 1
        (tmp_path / "llama" / name).unlink()
    hf.write(trained, str(tmp_path / "ours"))
    assert weights.trained(str(tmp_path / "ours"))[0]["tokenizer"]["chat"] == chat.FORMAT
    assert "chat_template" not in capsys.readouterr().err


@torch.no_grad()
def plain_answer(model, ids, eot, n):
    """Return the n greedy tokens after ids, or fewer up to eot, each by a forward of the whole text."""
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + n and eot not in ids[start:]:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[start:]


@torch.no_grad()
def gap_at(model, ids, ours, theirs):
    """Return by how much the two tokens at which two answers part differ in the logits of the whole text."""
    n = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    logits = model(torch.tensor([ids + ours[:n]]))[0, -1]
    return (logits[ours[n]] - logits[theirs[n]]).abs().item()


def same_ids(tokenizer, spec, talks, folder):
    """Return Counter(prompts, and how many of them have our ids in transformers and in llama.cpp)."""
    theirs = transformers.AutoTokenizer.from_pretrained(f"{folder}/x")
    sandbox = Sandbox(f"{folder}/x.gguf")
    same = Counter()
    for messages in talks:
        for i in range(len(messages)):
            if messages[i]["role"] == "user":
                asked = messages[: i + 1]
                ids = chat.prompt_ids(tokenizer, spec, asked)
                made = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
                same += Counter(prompts=1, transformers=made == ids, llama_cpp=sandbox.ids(asked) == ids)
    return same


def same_answers(model, tokenizer, eot, prompts, folder, n=64):
    """Return Counter(answers, and how many are the same in transformers without caches and with caches) of
    greedy answers of at most n tokens, and the gaps (gap_at) of the others."""
    other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/x", dtype=torch.float32).eval()
    how = dict(max_new_tokens=n, do_sample=False)
    same = Counter(answers=len(prompts))
    gaps = []
    for ids in prompts:
        cached = list(ids)
        "".join(write_on(model, tokenizer, eot, cached, n, temperature=0.0))
        ours = dict(plain=plain_answer(model, ids, eot, n), cached=cached[len(ids) :])
        for name, answer in ours.items():
            with torch._dynamo.config.patch(disable=True):
                made = other.generate(torch.tensor([ids]), use_cache=name == "cached", **how)
            theirs = made[0, len(ids) :].tolist()
            same[name] += theirs == answer
            if theirs != answer:
                gaps.append(gap_at(model, ids, answer, theirs))
    return same, gaps


def main(ckpt, path, n="100"):
    """Print same_ids of all conversations of a file and same_answers of its first n questions."""
    part, _ = weights.trained(ckpt)
    spec = part["tokenizer"]
    tokenizer = make_tokenizer(spec)
    talks = [messages for _, messages in answers.read(path)]
    model = restore(part, "cpu", packed=part["config"]["ternary"])
    questions = [messages[:1] for messages in talks if messages[0]["role"] == "user"]
    prompts = [chat.prompt_ids(tokenizer, spec, messages) for messages in questions]
    prompts = [ids for ids in prompts if len(ids) + 64 <= model.cfg.seq_len][: int(n)]
    with tempfile.TemporaryDirectory() as folder:
        hf.write(part, f"{folder}/x")
        gguf_file.write(part, f"{folder}/x.gguf", "f32", "f32")
        print("the same ids:", dict(same_ids(tokenizer, spec, talks, folder)))
        same, gaps = same_answers(model, tokenizer, spec["eot"], prompts, folder)
    print("the same answers:", dict(same), "gaps of the others:", gaps)


if __name__ == "__main__":
    main(*sys.argv[1:])
