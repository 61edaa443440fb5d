"""
Documents of any number to token files, on all cores: in order, in chunks, to worker processes; their tokens
in the same order into train_00000.bin.partial, ...; and every few seconds, once these are on the disk,
progress.json: how many tokens of each split are written and where the source then stood. What is killed
continues from there, to the same bytes. After progress.json, never before it, comes a meta.json that is not
complete: what it lists is never taken back, so that training may read it (data.py).
"""

import collections
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

import config
from nanobit import files
from nanobit.cli import fail
from nanobit.files import write_bytes
from nanobit.prepare import sources, token_files, vocab
from nanobit.terminal import command_line, printable
from nanobit.tokenizer import make_tokenizer, with_content

CHUNK_CHARS = 2**20  # characters of text that a worker gets at a time
PIECE_CHARS = 2**17  # characters of a document that are tokenized at a time, cut at a line end
START = dict(stream=0, state=None)  # the mark before the first document
SAVE_SECONDS = 10.0  # between two states from which a killed preparation can continue
SHOWN = 3  # rows without text that are shown of each kind
FLAGS = {
    "name": ("", "name of the data set"),
    "tokenizer": (
        "",
        "sentencepiece: trained on this text | char | gpt2, cl100k_base, ...: an encoding of tiktoken | a "
        "tokenizer.model of SentencePiece, or a folder or a repository of the hub that holds one",
    ),
    "vocab_size": (4096, "tokens of a sentencepiece tokenizer that is trained here"),
    "max_documents": (0, "documents to read at most, of a val_split too; 0 = all"),
    "val_fraction": (0.0, "share of the documents that is held out, by a hash of their text"),
    "workers": (0, "processes that tokenize; 0 = one per core"),
    "max_bad_rows": (
        1000,
        "rows without a text (null, NaN, half a surrogate pair, not UTF-8) that are skipped and counted "
        "before it ends; empty rows do not count",
    ),
}
NOT_WRITTEN = ("name", "workers", "max_bad_rows")  # flags that do not change what is written
NEWER = ("keep_crlf", "plain_quotes")  # flags that some data sets were made before
HUB_FLAGS = {
    "repo": ("", "data set of the Hugging Face hub, or a folder laid out like one"),
    "config": ("", "its config; '' = the default one"),
    "split": ("train", "its split to train on"),
    "val_split": ("", "its split that is held out, whole; '' = a val_fraction of the documents"),
    "column": ("text", "its column that holds the text"),
    "revision": ("", "its branch, tag or commit; '' = the newest"),
}


def start_worker(spec, marks, dtype):
    """make a worker process ready: its tokenizer, and an end when the parent has ended, however it did"""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    worker = make_tokenizer(spec), marks, np.dtype(dtype)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def submit(pool, pieces):
    """Return the future of encode_chunk(pieces). Ctrl-C waits meanwhile: a worker that starts here inherits
    that, and would print a traceback if it came before start_worker."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(encode_chunk, pieces)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_chunk, pieces)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_chunk(pieces):
    """Return {split: (ids, documents, bytes of text)} of pieces (split, text, first, last): each document
    ends with the end-of-text token and, if the marks {eot, bos} have one, begins with bos."""
    tokenizer, marks, dtype = worker
    found = {}
    for split, text, first, last in pieces:
        ids, documents, size = found.setdefault(split, ([], 0, 0))
        if first and "bos" in marks:
            ids.append(np.array([marks["bos"]], dtype))
        for part, start in cut(text):
            encode = tokenizer.encode if first and not start else tokenizer.encode_on
            ids.append(np.array(encode(part), dtype))
        if last:
            ids.append(np.array([marks["eot"]], dtype))
        found[split] = ids, documents + last, size + len(text.encode())
    return {split: (np.concatenate(ids), n, size) for split, (ids, n, size) in found.items()}


def cut(text):
    """yield (part, its place in text) of at most PIECE_CHARS characters, cut after a line end, or before a
    space: a tokenizer's time and memory for a text without an end grow faster than the text"""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + PIECE_CHARS) + 1
        end = end or text.rfind(" ", start + 1, start + PIECE_CHARS)
        end = end if end > start else start + PIECE_CHARS
        yield text[start:end], start
        start = end
    yield text[start:], start


def split_of(text, val_fraction):
    """'train' or 'val', by a hash of the text: the same text goes the same way, however often it comes"""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


def texts(cfg, streams):
    """the texts of the training documents (for the char tokenizer, of all), piece by piece, from the start"""
    for pieces, _, _ in chunks(cfg, streams, START):
        for split, text, _, _ in pieces:
            if split == "train" or cfg.tokenizer == "char":
                yield text


def chunks(cfg, streams, mark):
    """Yield (pieces, the mark behind them, the share of the stream that is behind): chunks of about
    CHUNK_CHARS, from a mark {stream, state, skipped} on; skipped is {why: rows without text so far}. A source
    that fails for lack of a network is opened again at the last mark, after a wait."""
    for number in range(mark["stream"], len(streams)):
        if number > mark["stream"]:
            mark = mark | dict(stream=number, state=None)
        waits, going = [5, 15, 60, 120, 300], True
        while going:
            pieces, size, skipped = [], 0, collections.Counter(mark.get("skipped", {}))
            try:
                for split, text, first, last in streams[number].pieces(mark["state"]):
                    if split is None:
                        skip(cfg, skipped, why=text, place=first)
                        continue
                    pieces.append((split or split_of(text, cfg.val_fraction), text, first, last))
                    size += len(text)
                    if size >= CHUNK_CHARS:
                        mark = dict(stream=number, state=streams[number].state(), skipped=dict(skipped))
                        yield pieces, mark, streams[number].fraction()
                        pieces, size, waits = [], 0, [5, 15, 60, 120, 300]
                going = False
            except Exception as error:
                if not sources.is_network(error):
                    raise
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                if not waits:
                    fail(f"the hub does not answer ({what}); the same command continues later", code=1)
                print(f"the hub does not answer ({what}); again in {waits[0]} s", file=sys.stderr)
                time.sleep(waits.pop(0))
        if pieces or skipped != mark.get("skipped", {}):
            mark = dict(stream=number, state=streams[number].state(), skipped=dict(skipped))
            yield pieces, mark, 1.0


def skip(cfg, skipped, why, place):
    """Count a row that holds no text in `skipped`, and show the first of each kind. Exits with 2 if they are
    more than max_bad_rows; empty rows do not count."""
    skipped[why] += 1
    bad = skipped.total() - skipped["empty"]
    if skipped[why] <= SHOWN:
        show_once(f"skipped: {place} ({why})")
    if why != "empty" and bad > cfg.max_bad_rows:
        how = "mend them, name another --column=, or allow more with --max_bad_rows="
        fail(f"max_bad_rows = {cfg.max_bad_rows:,}: {counted(skipped)} up to {place}; {how}")


@functools.cache
def show_once(line):
    """Print a line on stderr, beside a bar; once, though a text is read twice if a tokenizer is trained."""
    tqdm.write(line, file=sys.stderr)


def counted(skipped):
    """Return skipped rows {why: n} in words."""
    kinds = [f"{n:,} {why}" for why, n in sorted(skipped.items()) if n]
    return f"rows without text: {', '.join(kinds) or 'none'}"


def prepare(cfg, open_streams, options, paths=()):
    """Write data_dir/name from the documents of open_streams() -> [Hub or Files, ...], or continue it where
    an earlier process was stopped; ends with a summary. options: those that decide what is written; paths:
    files whose content decides it, too.

    Exits with 2 for a user's mistake, with 1 for a full disk or a lost hub, with 130 for Ctrl-C. What is
    written by then stays, for the same command to continue, as after kill -9; if that is nothing, no file
    stays.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    check_flags(cfg)
    folder = os.path.join(cfg.data_dir, cfg.name)
    meta_path, progress_path = (os.path.join(folder, name) for name in ("meta.json", "progress.json"))
    source, stamp = source_now(folder, options, paths)
    if is_complete(cfg, folder):
        return
    before = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    token_files.open_data_set(cfg.data_dir, cfg.name, source, anew=False)
    try:
        lock = files.lock(os.path.join(folder, ".lock"))
    except BlockingIOError as error:
        fail(f"{folder} is being written by {error.strerror}; wait for it, or choose another --name=")
    if is_complete(cfg, folder):  # the other process has just ended
        return
    progress = read_json(progress_path)
    if not progress and os.path.exists(meta_path):  # nothing says where to continue
        os.remove(meta_path)
    try:
        cfg.revision = progress.get("revision", getattr(cfg, "revision", ""))
        if progress and "stamp" not in progress:  # an earlier version began it, which kept line ends
            cfg.keep_crlf = True
        streams = open_streams()
        if not progress:
            if not cfg.max_documents:
                check_room(cfg, folder, sum(stream.size for stream in streams))
            spec, marks, vocab_size = vocab.pick(cfg, folder, texts(cfg, open_streams()))
            progress = dict(source=source, stamp=stamp, tokenizer=spec, **marks, vocab_size=vocab_size)
            progress |= dict(mark=START, tokens={}, bytes={}, documents={}, seconds=0.0)
            progress["revision"] = streams[0].revision
            progress["stream_began"] = [0, 0]  # tokens and bytes before the stream under way
            token_files.write_file(progress_path, json.dumps(progress).encode())
        else:
            print(f"continuing after {sum(progress['documents'].values()):,} documents")
        if "stamp" in progress:
            progress["stamp"] = stamp
        splits = encode(cfg, folder, streams, progress)
        progress["shards"] = finished(splits, progress)
        if "train" not in splits:  # the corrected command would find another data set here
            for name in ("progress.json", *progress["shards"]):
                os.remove(os.path.join(folder, name))
            fail(too_few(cfg, progress))
    except KeyboardInterrupt:
        lock.release()
        kept = bool(read_json(progress_path).get("tokens"))
        if not kept:
            discard(folder, before)
        what = "the same command continues, its last seconds again" if kept else "nothing was written yet"
        print(f"\nstopped; {what}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as end:
        lock.release()
        if not read_json(progress_path).get("tokens"):
            discard(folder, before)
        elif end.code == 2:
            print(
                f"{folder} keeps what is written: the same command continues, or delete it", file=sys.stderr
            )
        raise
    if "val" not in splits:
        print(f"warning: {too_few(cfg, progress)}")
    if cfg.tokenizer == "sentencepiece":
        vocab.warn_if_large(progress["vocab_size"], progress["tokens"]["train"], progress["bytes"]["train"])
    write_meta(folder, progress)
    lock.release()
    for name in os.listdir(folder):
        if name.startswith((".lock", "progress.json", "meta.json.tmp")):
            os.remove(os.path.join(folder, name))
    summarize(folder, read_json(meta_path))


def source_now(folder, options, paths):
    """Return (meta.json's source: the options and a hash of the files' content, a hash of their sizes and
    times). The files are not read if these are the same as when a folder was written. Exits with 2 if the
    folder holds something else."""
    known = [read_json(os.path.join(folder, name)) for name in ("meta.json", "progress.json")]
    known = [found for found in known if found]
    source, stamp = options, ""
    if paths:
        stamp, content = sources.stamp(paths), ""
        for found in known[:1]:  # an earlier version wrote the stamp in the place of the content's hash
            content = token_files.source_in(found).rpartition(" ")[2]
            content = content if stamp in (content, found.get("stamp")) else ""
        source = f"{options} {content or sources.fingerprint(paths)}"
    for found in known:
        was, how = token_files.source_in(found), "choose another --name=, or delete it"
        if paths and was != source and was.rpartition(" ")[0] == options:
            since = "the files have changed since it was made"
            if "stamp" not in found:
                since += ", or were copied (an earlier version made it, which compares only their times)"
            fail(f"{folder}: {since}; {how}")
        if was != source:
            fail(f"{folder} holds another data set ({printable(was)}); {how}")
    return source, stamp


def is_complete(cfg, folder):
    """Return whether the data set of a folder is complete, and print it then."""
    meta = read_json(os.path.join(folder, "meta.json"))
    if meta.get("complete"):
        older = "stamp" not in meta and getattr(cfg, "keep_crlf", True) is False
        note = " (an earlier version made it, with the line ends of the files)" if older else ""
        print(f"{folder} is complete{note}; to make it again, delete it")
        summarize(folder, meta)
    return meta.get("complete")


def too_few(cfg, progress):
    """Return a line on documents of which none was held out, or all, or of which there are none, with every
    way out."""
    n, counts = sum(progress["documents"].values()), progress["documents"]
    if not n:
        return f"there is no text to train on; {counted(progress['mark'].get('skipped', {}))}"
    what, size, without = "held out", "larger", "train.py --eval_every=0 --patience=0"
    if "train" not in counts:
        what, size, without = "left to train on", "smaller", f"--val_fraction=0 and {without}"
    change = f"a {size} --val_fraction= or more documents may change that"
    if getattr(cfg, "separator", ""):
        change += ", or a --separator= that occurs more often, or none: then the end of the text is held out"
    what = f"no document was {what} of {n:,}"
    return f"val_fraction = {cfg.val_fraction}: {what}; {change}; without a validation set: {without}"


def finished(splits, progress):
    """{file: {tokens, sha256}} of the finished shards; those that progress holds are not read again"""
    known = progress.get("shards", {})
    return {name: entry for split in splits.values() for name, entry in split.shards(known).items()}


def write_meta(folder, progress, **extra):
    """meta.json of what is in progress"""
    sizes = {name: (n, progress["bytes"][name]) for name, n in progress["tokens"].items()}
    spec, eot, vocab_size = progress["tokenizer"], progress["eot"], progress["vocab_size"]
    keys = ("documents", "seconds", "revision", "bos", "stamp")
    extra |= {key: progress[key] for key in keys if key in progress}
    extra["skipped"] = progress["mark"].get("skipped", {})
    token_files.write_meta(
        folder, spec, eot, vocab_size, sizes, progress["shards"], progress["source"], **extra
    )


def encode(cfg, folder, streams, progress):
    """the loop: tokenize all documents from progress on, and keep progress.json; returns {split: its
    finished token_files.Split}"""
    dtype, began = token_files.dtype_of(progress["vocab_size"]), time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cfg.workers or cores
    spec = with_content(progress["tokenizer"], folder)
    splits = {name: token_files.Split(folder, name, dtype, n) for name, n in progress["tokens"].items()}
    spent, saved, before = progress["seconds"], began, sum(progress["tokens"].values())
    waiting = collections.deque()  # (tokens to come, mark behind them, fraction), in order

    def written():
        return sum(split.n for split in splits.values())

    def save():
        for split in splits.values():
            split.sync()
        progress["tokens"] = {name: split.n for name, split in splits.items()}
        progress["shards"] = finished(splits, progress)
        progress["seconds"] = spent + time.perf_counter() - began
        write_bytes(os.path.join(folder, "progress.json"), json.dumps(progress).encode())
        write_meta(folder, progress, complete=False, command=command_line(["python", *sys.argv]))

    def take():
        nonlocal saved
        future, mark, fraction = waiting.popleft()
        found = future.result()
        if mark["stream"] != progress["mark"]["stream"]:
            progress["stream_began"] = [written(), bar.n]
        progress["mark"] = mark
        for name, (ids, documents, size) in found.items():
            if name not in splits:
                splits[name] = token_files.Split(folder, name, dtype, 0)
                if "bos" not in progress:  # the end of a text precedes the first document, too
                    splits[name].write(np.array([progress["eot"]], dtype))
            splits[name].write(ids)
            for key, more in (("documents", documents), ("bytes", size)):
                progress[key][name] = progress[key].get(name, 0) + more
            bar.update(size)
        speed = (written() - before) / (time.perf_counter() - began)
        bar.set_postfix_str(f"{written():,} tokens, {speed:,.0f} tokens/s", refresh=False)
        n_began, bytes_began = progress["stream_began"]
        if fraction:
            bar.total = int(bytes_began + (bar.n - bytes_began) / fraction)
        if time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
            if fraction and fraction > 0.01:
                check_room(cfg, folder, 0, (written() - n_began) * dtype.itemsize * (1 / fraction - 1))

    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    args = (spec, {key: progress[key] for key in ("eot", "bos") if key in progress}, dtype.str)
    with progress_bar(cfg.name, sum(progress["bytes"].values())) as bar:
        pool = ProcessPoolExecutor(workers, context, start_worker, args)
        try:
            save()
            for pieces, mark, fraction in chunks(cfg, streams, progress["mark"]):
                waiting.append((submit(pool, pieces), mark, fraction))
                while len(waiting) > 2 * workers + 2:
                    take()
            while waiting:
                take()
            save()
            for split in splits.values():
                split.finish()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one does not wait for what follows
            for process in multiprocessing.active_children():  # whose chunks nobody needs any more
                process.kill()
            raise
        except BrokenProcessPool:
            fail(
                "a worker process was killed, perhaps for lack of memory; the same command continues", code=1
            )
        except OSError as error:
            if sources.is_network(error):
                raise
            how = "free some, then the same command continues" if progress["tokens"] else "free some"
            fail(f"cannot write {folder}: {error.strerror or error}; {how}", code=1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for split in splits.values():
                with contextlib.suppress(OSError):  # a full disk again
                    split.file.close()  # on Windows discard cannot remove what is open
    return splits


def check_flags(cfg):
    """exit with 2 and a line for each flag out of range"""
    faults = []
    if not 0 <= cfg.val_fraction < 1:
        faults.append(f"val_fraction = {cfg.val_fraction} must be at least 0 and less than 1")
    for key, zero in (("max_documents", "all"), ("workers", "all"), ("max_bad_rows", "none")):
        if getattr(cfg, key) < 0:
            faults.append(f"{key} = {getattr(cfg, key)} must not be negative; 0 = {zero}")
    if cfg.vocab_size < 1:
        faults.append(f"vocab_size = {cfg.vocab_size} must be at least 1")
    if faults:
        fail(*faults)


def check_room(cfg, folder, text_bytes, need=0):
    """exit with 1 where the disk has no room for `need` more bytes, or for the tokens of so much text: 2
    bytes for every 5 at the least, or for each where characters are tokens"""
    need = need or text_bytes * (2 if cfg.tokenizer == "char" else 0.4)
    free = shutil.disk_usage(folder).free
    if need > free:
        fail(
            f"{folder} needs about {need / 1e6:,.1f} MB more, the disk has {free / 1e6:,.1f} MB free", code=1
        )


def read_json(path):
    """Return the object that a JSON file holds; {} if it does not exist or is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def discard(folder, before):
    """remove what this preparation has put into a folder that held the names `before`, and the folder where
    nothing is left"""
    for name in os.listdir(folder):
        is_ours = re.fullmatch(r"\.lock.*|(train|val)_\d{5}\.bin\.partial|(meta|progress)\.json.*", name)
        if is_ours or (name.startswith("tokenizer.") and name not in before):
            os.remove(os.path.join(folder, name))
    if not os.listdir(folder):
        os.rmdir(folder)


def summarize(folder, meta):
    """print what a data set holds"""
    for split, count in meta["tokens"].items():
        n, size = meta["documents"][split], meta["bytes"][split]
        print(
            f"{folder}: {split}: {n:,} documents, {count:,} tokens, {size:,} bytes of text, "
            f"{count / max(1, size):.4f} tokens per byte"
        )
    if skipped := meta.get("skipped"):
        print(f"skipped: {counted(skipped)}")
    total, seconds = sum(meta["tokens"].values()), meta["seconds"]
    kind = meta["tokenizer"]["kind"]
    print(
        f"tokenizer: {kind}, {meta['vocab_size']:,} tokens; {seconds:.1f} s, {total / seconds:,.0f} tokens/s"
    )


def progress_bar(desc, done=0):
    """a bar of bytes of text, on a terminal"""
    return tqdm(desc=desc, initial=done, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def source_of(script, cfg, flags):
    """Return meta.json's source: the script and every flag that decides what it writes. A flag that is newer
    than some data sets is left out at its default, so that they are recognised."""
    given = [key for key in flags if key not in NOT_WRITTEN]
    given = [key for key in given if key not in NEWER or getattr(cfg, key) != flags[key][0]]
    return " ".join([script, *(f"--{key}={getattr(cfg, key)}" for key in given)])


def prepare_hub(argv, doc, script, defaults):
    """the whole of a script that prepares a data set of the hub: its flags with these defaults, then
    prepare"""
    flags = {
        key: (defaults.get(key, default), text) for key, (default, text, *_) in (HUB_FLAGS | FLAGS).items()
    }
    cfg = config.load(argv, doc, flags, only=("data_dir",))
    if cfg.val_split and cfg.val_fraction:
        fail(
            f"val_split = {cfg.val_split!r} and val_fraction = {cfg.val_fraction} exclude each other: set one"
        )

    def open_streams():
        if not cfg.val_split:
            return [sources.Hub(cfg, cfg.split, "")]
        return [sources.Hub(cfg, cfg.val_split, "val"), sources.Hub(cfg, cfg.split, "train")]

    prepare(cfg, open_streams, source_of(script, cfg, flags))
