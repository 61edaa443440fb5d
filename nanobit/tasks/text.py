"""Score a model on text, LAMBADA and BLiMP, by the log-likelihood of tokens.

Both scores return (fields for the JSON line, lines of text to print). Every text begins with bos, the token
that begins a text in training. data/<name>/ holds task.jsonl, one example a line, and no tokens, because each
model reads text with its own tokenizer."""

import json
import math
import os
import sys
from collections import defaultdict
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanobit.cli import fail
from nanobit.data_set import TEXT, fault, shown, whole
from nanobit.terminal import printable
from nanobit.tokenizer import encode_prompt

META = {"task": TEXT, "examples": whole(1, 2**40)}  # what a meta.json must hold, as in data_set.py
COLUMNS = {  # and a line of task.jsonl
    "lambada": {"text": TEXT},
    "blimp": dict.fromkeys(["sentence_good", "sentence_bad", "UID", "linguistics_term"], TEXT),
}


def read(folder):
    """Return (task, examples as dicts) of a data set of text. Exits with 2 if it is damaged or incomplete."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        fail(f"data set {folder} is not complete (no meta.json); run its preparation again")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if damage := fault(meta, META, ""):
            raise ValueError(damage)
        path = os.path.join(folder, "task.jsonl")
        with open(path, encoding="utf-8") as file:
            examples = [json.loads(line) for line in file]
        columns = COLUMNS.get(meta["task"], {})
        for number, example in enumerate(examples, 1):
            if damage := fault(example, columns, f"line {number}"):
                raise ValueError(damage)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} is damaged ({printable(error) or type(error).__name__}); make the data set again")
    n = meta["examples"]
    if len(examples) != n:
        fail(f"{path} has {len(examples):,} examples, meta.json says {n:,}; make the data set again")
    if not columns:
        fail(f"{folder}: task {shown(meta['task'])} is unknown; this version scores {', '.join(COLUMNS)}")
    return meta["task"], examples


def encode(tokenizer, bos, text, number):
    """Return the ids of example `number`, bos first. Exits with 2 if the tokenizer lacks a character."""
    try:
        return encode_prompt(tokenizer, bos, text)
    except ValueError as error:
        fail(f"example {number:,} ({text[:40]!r}): {error}; this model cannot be scored on it")


def progress(desc, items, total=None):
    """Return items with a progress bar, which only a terminal shows."""
    return tqdm(items, total=total, desc=desc, disable=not sys.stderr.isatty(), leave=False)


@torch.no_grad()
def log_likelihoods(model, texts, batch_size):
    """Return {(ids, n): (nats, greedy)} for texts (tuple of ids, n): the log-likelihood of the last n ids
    given those before, summed in float64, and whether each of the n is the most likely token. The model reads
    the last seq_len ids before the final one. Exits with 2 if n is more. Equal texts are scored once, because
    two batches may differ in the last bits."""
    size, device = model.cfg.seq_len, model.embed.weight.device
    texts = sorted(set(texts), key=lambda text: (-len(text[0]), text))  # similar lengths need little padding
    if (most := max(n for _, n in texts)) > size:
        fail(f"a text to score has {most:,} tokens, the model reads {size:,}: its seq_len is too short")
    scores = {}
    for start in progress("texts", range(0, len(texts), batch_size)):
        batch = texts[start : start + batch_size]
        rows = [ids[-size - 1 :] for ids, _ in batch]
        counts = [n for _, n in batch]
        width = max(map(len, rows))
        # on the right, where causal attention does not look
        padded = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
        position = torch.arange(1, width, device=device)  # of each target
        end, n = torch.tensor([[len(row) for row in rows], counts], device=device)[..., None]  # each (B, 1)
        is_scored = (position < end) & (position >= end - n)  # (B, T)
        logits = model(padded[:, :-1])[is_scored]  # (all n, V)
        targets = padded[:, 1:][is_scored]  # (all n,)
        nats = -F.cross_entropy(logits, targets, reduction="none").cpu().double()
        is_top = (logits.argmax(-1) == targets).cpu()
        for text, text_nats, text_tops in zip(batch, nats.split(counts), is_top.split(counts)):
            scores[text] = (text_nats.sum().item(), text_tops.all().item())
    return scores


def exp(nats):
    """Return e^nats, finite for every model."""
    return math.exp(min(nats, 700.0))


def lambada(model, tokenizer, bos, examples, batch_size):
    """Score LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of a passage, given all before it.
    The word is " " and what follows the last space; a token that spans the border belongs to it. accuracy:
    share of words whose tokens are all the most likely ones. perplexity: per word (val_loss is per token)."""
    texts = []
    spans = 0
    for number, example in enumerate(examples, 1):
        ids = encode(tokenizer, bos, example["text"], number)
        context = encode(tokenizer, bos, example["text"].rpartition(" ")[0], number)
        shared = len(os.path.commonprefix([ids[:-1], context]))
        spans += shared < len(context)
        texts.append((tuple(ids), len(ids) - shared))
    scores = log_likelihoods(model, texts, batch_size)
    nats = math.fsum(scores[text][0] for text in texts)
    n_cut = sum(len(ids) > model.cfg.seq_len + 1 for ids, _ in texts)
    tokens = sum(n for _, n in texts)
    accuracy = fmean(scores[text][1] for text in texts)
    result = dict(tokens=tokens, val_loss=-nats / tokens, perplexity=exp(-nats / len(texts)))
    result |= dict(accuracy=accuracy, n=len(texts), contexts_cut=n_cut)
    lines = [f"last word right: {accuracy:.2%} of {len(texts):,} passages"]
    lines.append(f"perplexity {result['perplexity']:.3f} per word, {-nats / tokens:.4f} nats per token")
    if n_cut:
        lines.append(f"{n_cut:,} passages lost their beginning: the model reads {model.cfg.seq_len} tokens")
    if spans:
        lines.append(f"{spans:,} passages have a token across the border: it was scored with the word")
    return result, lines


def blimp(model, tokenizer, bos, examples, batch_size):
    """Score BLiMP (Warstadt et al. 2020, arXiv 1912.00582): of two sentences that differ in one point, the
    grammatical one should be the more likely as a whole; a tie counts half. accuracy is the mean over
    paradigms (UID), that of a phenomenon (linguistics_term) the mean over its own. tokens, val_loss and
    perplexity (per token) are those of the good sentences."""
    pairs = []
    for number, example in enumerate(examples, 1):
        rows = [encode(tokenizer, bos, example[f"sentence_{which}"], number) for which in ("good", "bad")]
        pairs.append([(tuple(ids), len(ids) - 1) for ids in rows])
    scores = log_likelihoods(model, [text for pair in pairs for text in pair], batch_size)
    points = defaultdict(list)  # {(phenomenon, paradigm): [1.0, 0.5 or 0.0 of each pair]}
    for example, (good, bad) in zip(examples, pairs):
        point = ((scores[good][0] > scores[bad][0]) + (scores[good][0] >= scores[bad][0])) / 2
        points[example["linguistics_term"], example["UID"]].append(point)
    by_paradigm = {}
    of_phenomenon = defaultdict(list)
    for (phenomenon, uid), hits in sorted(points.items()):
        by_paradigm[uid] = fmean(hits)
        of_phenomenon[phenomenon].append(by_paradigm[uid])
    by_phenomenon = {phenomenon: fmean(accuracies) for phenomenon, accuracies in of_phenomenon.items()}
    tokens = sum(n for (_, n), _ in pairs)
    loss = -math.fsum(scores[good][0] for good, _ in pairs) / tokens
    accuracy = fmean(by_paradigm.values())
    result = dict(tokens=tokens, val_loss=loss, perplexity=exp(loss), accuracy=accuracy, n=len(pairs))
    result |= dict(accuracy_by_phenomenon=by_phenomenon, accuracy_by_paradigm=by_paradigm)
    lines = [f"{accuracy:.2%} of {len(pairs):,} pairs, the mean of {len(by_paradigm)} paradigms"]
    return result, lines + [f"  {share:7.2%}  {term}" for term, share in by_phenomenon.items()]
