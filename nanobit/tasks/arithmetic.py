"""Score a model on arithmetic by exact answers to the held-out problems of its data set."""

import operator
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch

from nanobit.cli import fail
from nanobit.data_set import shown
from nanobit.generate import generate
from nanobit.tasks.text import progress
from nanobit.tokenizer import encode_prompt

OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul}
PROBLEM = re.compile(r"(([0-9]{1,20})([-+x])([0-9]{1,20})=)(-?[0-9]{1,40})")


def read(folder, size):
    """Return [(question, answer)] from the problems.txt of a data set, of this size in bytes; a question is
    '12+7='. Exits with 2 if the file is damaged or an answer in it is not correct."""
    path = Path(folder, "problems.txt")
    if not path.exists():
        fail(f"{path} is missing; make the data set again")
    content = path.read_bytes()
    if len(content) != size:
        fail(f"{path} has {len(content):,} bytes, the val split {size:,}; make the data set again")
    problems = []
    for number, line in enumerate(content.decode("ascii", "backslashreplace").splitlines(), 1):
        parts = PROBLEM.fullmatch(line)
        if not parts or OPERATORS[parts[3]](int(parts[2]), int(parts[4])) != int(parts[5]):
            fail(f"{path}: line {number} is {shown(line)}, not like 12+7=19; make the data set again")
        problems.append((parts[1], parts[5]))
    return problems


def score(model, tokenizer, eot, problems, batch_size):
    """Return (results, lines of text): the share of problems (question, answer) whose greedy answer is exact,
    in total and by label: +2 are additions whose longer operand has 2 digits. eot also begins a text."""
    by_length, hits, mistakes = defaultdict(list), defaultdict(list), []
    for question, answer in problems:  # prompts of one length make a batch
        by_length[len(question)].append((question, answer))
    groups = by_length.values()
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    for batch in progress("problems", batches):
        prompts = [encode_prompt(tokenizer, eot, question) for question, _ in batch]
        idx = torch.tensor(prompts, device=model.embed.weight.device)
        longest = max(len(answer) for _, answer in batch) + 1
        new = torch.cat(list(generate(model, idx, longest, temperature=0.0)), 1).tolist()
        for (question, answer), ids in zip(batch, new):
            given = tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)
            _, a, op, b, _ = PROBLEM.fullmatch(question + answer).groups()
            hits[f"{op}{max(len(a), len(b))}"].append(given == answer)
            if given != answer:
                mistakes.append(f"  wrong: {question}{given}, right is {answer}")
    by_kind = {label: fmean(right) for label, right in sorted(hits.items())}
    accuracy = 1 - len(mistakes) / len(problems)
    lines = [f"exact answers: {accuracy:.2%} of {len(problems)} held-out problems"]
    lines += [f"  {label:>4}  {share:.2%}" for label, share in by_kind.items()]
    return dict(accuracy=accuracy, n=len(problems), accuracy_by_kind=by_kind), lines + mistakes[:5]
