"""Score a model on conversations of a file: the loss on answers, and the last numbers of worked problems."""

import json
import math
import re
from collections import defaultdict
from statistics import fmean

from nanobit import chat
from nanobit.cli import fail
from nanobit.generate import write_on
from nanobit.tasks.text import exp, log_likelihoods, progress
from nanobit.terminal import printable

WORKED = re.compile(r"answer is \$?-?[\d,]*\.?\d+\D*\Z")  # the end of a worked problem: "The answer is 12."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LONGEST = 256  # tokens of an answer to a problem


def read(path):
    """Return [(source, messages)] of a file with one conversation a line, as prepare/chat.py reads them. The
    source is what stands before a colon in the field `source`. Exits with 2 if a line is not valid."""
    examples = []
    number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                text = line.decode("utf-8-sig")
                if text.strip():
                    row = json.loads(text)
                    messages = chat.messages_of(row)
                    chat.check(messages)
                    examples.append((str(row.get("source", "")).partition(":")[0], messages))
    except OSError as error:
        fail(f"conversations = {path!r} cannot be read: {error.strerror}; name a .jsonl file")
    except (ValueError, RecursionError) as error:
        place = f"conversations = {path!r}: line {number}"
        fail(f"{place}: {printable(str(error))}; expected a line as for prepare/chat.py")
    if not examples:
        fail(f"conversations = {path!r} is empty; name a file with one conversation a line")
    return examples


def answers_of(tokenizer, spec, messages):
    """Return [(ids, n)] of the answers of a conversation: the ids up to its end, of which n are its own."""
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            ids, _ = chat.encode(tokenizer, spec, messages[: i + 1])
            before = chat.prompt_ids(tokenizer, spec, messages[:i])
            answers.append((tuple(ids), len(ids) - len(before)))
    return answers


def encode(tokenizer, spec, examples, size):
    """Return ({source: [(ids, n) of an answer]}, the examples that can be read, lines on what is left out):
    conversations of other characters than the tokenizer's, and answers of more than `size` tokens. Exits with
    2 if nothing is left."""
    texts = defaultdict(list)
    readable = []
    fault = ""
    n_long = 0
    for source, messages in examples:
        try:
            answers = answers_of(tokenizer, spec, messages)
        except ValueError as error:
            fault = fault or f"the first: {error}"
            continue
        readable.append((source, messages))
        n_long += sum(n > size for _, n in answers)
        if short := [(ids, n) for ids, n in answers if n <= size]:
            texts[source] += short
    lines = []
    if fault:
        lines.append(f"{len(examples) - len(readable):,} conversations cannot be read; {fault}")
    if n_long:
        lines.append(f"{n_long:,} answers are longer than the context of {size} tokens")
    if not texts:
        fail(f"this model cannot be scored on the conversations: {'; '.join(lines)}")
    return texts, readable, [f"left out: {line}" for line in lines]


def last_number(text):
    """Return the last number of a text, without commas, or ''."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def exact_numbers(model, tokenizer, spec, examples):
    """Return {source: [whether the last number of the greedy answer is right]} of the worked problems."""
    hits = defaultdict(list)
    problems = [(source, messages) for source, messages in examples if WORKED.search(messages[-1]["content"])]
    for source, messages in progress("problems", problems):
        ids = chat.prompt_ids(tokenizer, spec, messages[:-1])
        answer = "".join(write_on(model, tokenizer, spec["eot"], ids, LONGEST, temperature=0.0))
        hits[source].append(last_number(answer) == last_number(messages[-1]["content"]))
    return hits


def score(model, tokenizer, spec, examples, batch_size):
    """Score conversations (source, messages). tokens, val_loss, perplexity: of answers with their ends, each
    given all before it in its conversation. accuracy: the share of worked problems, which end like "The
    answer is 12.", whose greedy answer has the same last number. Both are given by source, too."""
    texts, readable, lines = encode(tokenizer, spec, examples, model.cfg.seq_len)
    scores = log_likelihoods(model, [text for group in texts.values() for text in group], batch_size)
    nats = {source: math.fsum(-scores[text][0] for text in group) for source, group in texts.items()}
    tokens = {source: sum(n for _, n in group) for source, group in texts.items()}
    loss = math.fsum(nats.values()) / sum(tokens.values())
    losses = {source: nats[source] / tokens[source] for source in sorted(texts)}
    result = dict(tokens=sum(tokens.values()), val_loss=loss, perplexity=exp(loss), loss_by_source=losses)
    n_answers = sum(map(len, texts.values()))
    lines.append(f"loss on {n_answers:,} answers {loss:.4f} nats per token, perplexity {exp(loss):.3f}")
    lines += [f"  {losses[source]:.4f}  {source or '(no source)'}" for source in losses]
    hits = exact_numbers(model, tokenizer, spec, readable)
    if every := [hit for group in hits.values() for hit in group]:
        shares = {source: fmean(group) for source, group in sorted(hits.items())}
        result |= dict(accuracy=fmean(every), n=len(every), accuracy_by_source=shares)
        lines.append(f"last number right: {fmean(every):.2%} of {len(every):,} worked problems")
        lines += [f"  {share:7.2%}  {source or '(no source)'}" for source, share in shares.items()]
    return result, lines
