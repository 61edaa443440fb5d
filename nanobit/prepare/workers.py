"""Worker processes that tokenize chunks of documents, on all cores, and give the tokens back in order."""

import collections
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from nanobit.cli import fail
from nanobit.tokenizer import make_tokenizer

PIECE_CHARS = 2**17  # characters of a document that are tokenized at a time, cut at a line end


def encoded(chunks, workers, spec, dtype, encode):
    """Yield (encode(pieces), mark, share) of chunks (pieces, mark, share), in their order. spec: spec_of the
    tokenizer; encode: encode_chunk, or another function that uses `worker`. Exits with 1 if a worker is
    killed. Close it to end the workers early."""
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, start_worker, (spec, dtype.str))
    waiting = collections.deque()
    try:
        for pieces, mark, share in chunks:
            waiting.append((submit(pool, encode, pieces), mark, share))
            if len(waiting) > 2 * workers + 2:
                future, *rest = waiting.popleft()
                yield future.result(), *rest
        for future, *rest in waiting:
            yield future.result(), *rest
    except BrokenProcessPool:
        fail("a worker process was killed, perhaps for lack of memory; the same command continues", code=1)
    except BaseException:  # nobody needs the other chunks any more
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def submit(pool, encode, pieces):
    """Return the future of encode(pieces). Ctrl-C waits meanwhile: a worker that starts here inherits
    that, and would print a traceback if it came before start_worker."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(encode, pieces)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode, pieces)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(spec, dtype):
    """Prepare a worker process: make its tokenizer, and let it end as soon as its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    load(spec, dtype)


def load(spec, dtype):
    """Make the tokenizer of this process."""
    global worker
    worker = make_tokenizer(spec), spec, np.dtype(dtype)


def encode_chunk(pieces):
    """Return {split: (ids, documents, bytes of text)} of pieces (split, text, first, last): each document
    ends with eot, the end-of-text token, and begins with bos if the spec has one."""
    tokenizer, spec, dtype = worker
    ids = collections.defaultdict(list)
    documents, size = collections.Counter(), collections.Counter()
    for split, text, first, last in pieces:
        if first and "bos" in spec:
            ids[split].append(np.array([spec["bos"]], dtype))
        for part, start in parts_of(text):
            encode = tokenizer.encode if first and start == 0 else tokenizer.encode_on
            ids[split].append(np.array(encode(part), dtype))
        if last:
            ids[split].append(np.array([spec["eot"]], dtype))
        documents[split] += last
        size[split] += len(text.encode())
    return {split: (np.concatenate(ids[split]), documents[split], size[split]) for split in ids}


def parts_of(text):
    """Yield (part, its place in text) of at most PIECE_CHARS, cut after a line end or before a space: time
    and memory of a tokenizer grow faster than its text."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + PIECE_CHARS) + 1
        end = end or text.rfind(" ", start + 1, start + PIECE_CHARS)
        if end <= start:
            end = start + PIECE_CHARS
        yield text[start:end], start
        start = end
    yield text[start:], start
