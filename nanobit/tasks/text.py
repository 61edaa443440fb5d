"""
The scores of the tasks that evaluate.py knows: arithmetic by exact answers, LAMBADA and BLiMP by the
log-likelihood of text. A score is a function of (model, tokenizer, bos, examples, batch_size) that returns
the fields for the JSON line and lines of text to print. Every text begins with bos, the token that begins a
text in training (tokenizer.bos_of).

data/<name>/ of LAMBADA and BLiMP holds no tokens but task.jsonl, one example a line, because each model
reads the text with its own tokenizer.
"""

import json
import math
import operator
import os
import re
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanobit.cli import fail
from nanobit.data_set import TEXT, fault, shown, whole
from nanobit.generate import generate
from nanobit.terminal import printable
from nanobit.tokenizer import encode_prompt

META = {"task": TEXT, "examples": whole(1, 2**40)}  # what a meta.json must hold, as in data_set.py
COLUMNS = {  # and a line of task.jsonl
    "lambada": {"text": TEXT},
    "blimp": dict.fromkeys(["sentence_good", "sentence_bad", "UID", "linguistics_term"], TEXT),
}
RESULT = {"+": operator.add, "-": operator.sub, "x": operator.mul}


def read(folder):
    """(task, examples) of a data set that is text to score: the lines of its task.jsonl, as dicts. Exits
    with 2 where it is not whole."""
    path, again = os.path.join(folder, "meta.json"), "make the data set again"
    if not os.path.exists(path):
        fail(f"data set {folder} is not complete (no meta.json); run its preparation again")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if wrong := fault(meta, META, ""):
            raise ValueError(wrong)
        path = os.path.join(folder, "task.jsonl")
        with open(path, encoding="utf-8") as file:
            examples = [json.loads(line) for line in file]
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {printable(error)}); {again}")
    task, n = meta["task"], meta["examples"]
    if len(examples) != n:
        fail(f"{path} has {len(examples):,} examples, meta.json says {n:,}; {again}")
    if task not in COLUMNS:
        fail(f"{folder}: task {shown(task)} is unknown; this version scores {', '.join(COLUMNS)}")
    for number, example in enumerate(examples, 1):
        if wrong := fault(example, COLUMNS[task], f"line {number}"):
            fail(f"{path} is damaged: {wrong}; {again}")
    return task, examples


def encode(tokenizer, bos, text, number):
    """ids of example `number`, bos first. Exits with 2 where the tokenizer lacks a character."""
    try:
        return encode_prompt(tokenizer, bos, text)
    except ValueError as error:
        fail(f"example {number:,} ({text[:40]!r}): {error}; this model cannot be scored on it")


@torch.no_grad()
def log_likelihoods(model, texts, batch_size):
    """{(ids, n): (nats, greedy)} for texts (tuple of ids, n): the log-likelihood of the last n ids given
    those before, summed in float64, and whether each of the n is the likeliest token.

    The model reads the last seq_len ids before the final one: earlier ones are cut. Exits with 2 where n is
    more than seq_len, which would cut what is to be scored. Texts are padded on the right, where causal
    attention does not look. A text that comes twice is scored once: two batches may differ in the last
    bits.
    """
    size, device, found = model.cfg.seq_len, model.embed.weight.device, {}
    texts = sorted(set(texts), key=lambda text: (-len(text[0]), text))  # like lengths: little padding
    most = max(n for _, n in texts)
    if most > size:
        fail(f"a text to score has {most:,} tokens, the model reads {size:,}: its seq_len is too short")
    bar = tqdm(total=len(texts), desc="texts", disable=not sys.stderr.isatty(), leave=False)
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        rows, counts = [ids[-size - 1 :] for ids, _ in some], [n for _, n in some]
        width = max(map(len, rows))
        padded = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
        place = torch.arange(1, width, device=device)  # of each target
        end = torch.tensor([len(row) for row in rows], device=device)[:, None]
        n = torch.tensor(counts, device=device)[:, None]
        scored = (place < end) & (place >= end - n)  # (B, T)
        logits, targets = model(padded[:, :-1])[scored], padded[:, 1:][scored]  # (all n, V), (all n,)
        nats = -F.cross_entropy(logits, targets, reduction="none").cpu().double()
        likeliest = (logits.argmax(-1) == targets).cpu()
        for text, part, hits in zip(some, nats.split(counts), likeliest.split(counts)):
            found[text] = (part.sum().item(), hits.all().item())
        bar.update(len(some))
    bar.close()
    return found


def exp(nats):
    """e^nats, finite however bad a model is"""
    return math.exp(min(nats, 700.0))


def lambada(model, tokenizer, bos, examples, batch_size):
    """LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of a passage, given all before it.
    examples: dicts with `text`.

    The word is " " and what follows the last space. Its ids are those of the whole text after the longest
    beginning that it shares with the ids of the context: a token that spans the border belongs to the word.
    accuracy: share of the words of which every token is the likeliest. perplexity: exp of the mean negative
    log-likelihood of a word (not of a token, as val_loss).
    """
    texts, spans, size = [], 0, model.cfg.seq_len
    for number, example in enumerate(examples, 1):
        ids = encode(tokenizer, bos, example["text"], number)
        context = encode(tokenizer, bos, example["text"].rpartition(" ")[0], number)
        shared = len(os.path.commonprefix([ids[:-1], context]))
        spans += shared < len(context)
        texts.append((tuple(ids), len(ids) - shared))
    found = log_likelihoods(model, texts, batch_size)
    nats, right = (math.fsum(found[text][i] for text in texts) for i in (0, 1))
    cut, tokens = sum(len(ids) > size + 1 for ids, _ in texts), sum(n for _, n in texts)
    result = dict(tokens=tokens, val_loss=-nats / tokens, perplexity=exp(-nats / len(texts)))
    result |= dict(accuracy=right / len(texts), n=len(texts), contexts_cut=cut)
    lines = [f"last word right: {result['accuracy']:.2%} of {len(texts):,} passages"]
    lines.append(f"perplexity {result['perplexity']:.3f} per word, {-nats / tokens:.4f} nats per token")
    if cut:
        lines.append(f"{cut:,} passages lost their beginning: they are longer than {size} tokens")
    if spans:
        lines.append(f"{spans:,} passages have a token across the border: it was scored with the word")
    return result, lines


def blimp(model, tokenizer, bos, examples, batch_size):
    """BLiMP (Warstadt et al. 2020, arXiv 1912.00582): of two sentences that differ in one point, the
    grammatical one should be the likelier as a whole; a tie counts half. examples: dicts with
    sentence_good, sentence_bad, UID (the paradigm) and linguistics_term (the phenomenon).

    accuracy is the mean over paradigms, that of a phenomenon the mean over its own. tokens, val_loss and
    perplexity (per token) are those of the good sentences.
    """
    pairs, shares = [], {}
    for number, example in enumerate(examples, 1):
        ids = [encode(tokenizer, bos, example[f"sentence_{kind}"], number) for kind in ("good", "bad")]
        pairs.append([(tuple(row), len(row) - 1) for row in ids])
    found = log_likelihoods(model, [text for pair in pairs for text in pair], batch_size)
    for example, pair in zip(examples, pairs):
        good, bad = (found[text][0] for text in pair)
        paradigm = shares.setdefault(example["linguistics_term"], {}).setdefault(example["UID"], [])
        paradigm.append(1.0 if good > bad else 0.5 if good == bad else 0.0)
    shares = {term: {uid: mean(hits) for uid, hits in of.items()} for term, of in sorted(shares.items())}
    by_paradigm = {uid: share for of in shares.values() for uid, share in sorted(of.items())}
    by_phenomenon = {term: mean(of.values()) for term, of in shares.items()}
    tokens = sum(n for (_, n), _ in pairs)
    loss = -math.fsum(found[good][0] for good, _ in pairs) / tokens
    result = dict(tokens=tokens, val_loss=loss, perplexity=exp(loss))
    result |= dict(accuracy=mean(by_paradigm.values()), n=len(pairs))
    result |= dict(accuracy_by_phenomenon=by_phenomenon, accuracy_by_paradigm=by_paradigm)
    lines = [f"{result['accuracy']:.2%} of {len(pairs):,} pairs, the mean of {len(by_paradigm)} paradigms"]
    return result, lines + [f"  {share:7.2%}  {term}" for term, share in by_phenomenon.items()]


def mean(values):
    return math.fsum(values) / len(values)


def problems(folder, size):
    """[(question, answer)] of the held-out problems of an arithmetic data set, whose problems.txt has so many
    bytes; '12+7=' is a question. Exits with 2 if one is damaged or its answer is wrong."""
    path, again = os.path.join(folder, "problems.txt"), "make the data set again"
    if not os.path.exists(path):
        fail(f"{path} is missing; {again}")
    with open(path, "rb") as file:
        content = file.read()
    if len(content) != size:
        fail(f"{path} is damaged: it has {len(content):,} bytes, the val split {size:,}; {again}")
    found = []
    for number, line in enumerate(content.decode("ascii", "backslashreplace").splitlines(), 1):
        parts = re.fullmatch(r"(([0-9]{1,20})([-+x])([0-9]{1,20})=)(-?[0-9]{1,40})", line)
        if not parts or RESULT[parts[3]](int(parts[2]), int(parts[4])) != int(parts[5]):
            fail(
                f"{path} is damaged: line {number} is {shown(line)}, expected a problem like 12+7=19; {again}"
            )
        found.append((parts[1], parts[5]))
    return found


def arithmetic(model, tokenizer, eot, problems, batch_size):
    """exact answers: the share of problems (question, answer) whose greedy answer is right to the last
    character, in all and by kind: +2 are additions whose longer operand has 2 digits. Only characters are
    tokens of such a data set, so that the end-of-text token begins a text, too."""
    by_length = {}  # prompts of one length make a batch
    for question, answer in problems:
        by_length.setdefault(len(question), []).append((question, answer))
    hits, wrong = {}, []
    bar = tqdm(total=len(problems), desc="problems", disable=not sys.stderr.isatty(), leave=False)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            some = group[start : start + batch_size]
            prompts = [encode_prompt(tokenizer, eot, question) for question, _ in some]
            idx = torch.tensor(prompts, device=model.embed.weight.device)
            longest = max(len(answer) for _, answer in some) + 1
            new = torch.cat(list(generate(model, idx, longest, temperature=0.0)), 1).tolist()
            for (question, answer), ids in zip(some, new):
                said = tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)
                hits.setdefault(kind_of(question), []).append(said == answer)
                if said != answer:
                    wrong.append(f"  wrong: {question}{said}, right is {answer}")
            bar.update(len(some))
    bar.close()
    by_kind = {kind: mean(right) for kind, right in sorted(hits.items())}
    result = dict(accuracy=1 - len(wrong) / len(problems), n=len(problems), accuracy_by_kind=by_kind)
    lines = [f"exact answers: {result['accuracy']:.2%} of {len(problems)} held-out problems"]
    return result, lines + [f"  {kind:>4}  {share:.2%}" for kind, share in by_kind.items()] + wrong[:5]


def kind_of(question):
    """'+2' for '12+7=': the operation and the digits of the longer operand"""
    op = next(char for char in question if not char.isdigit())
    return f"{op}{max(map(len, question.rstrip('=').split(op)))}"
