"""The preparation of any number of documents as token files, on all cores.

Every few seconds, once the tokens are on the disk, progress.json is written: how many tokens each split has,
and where the source stood. A preparation that was killed continues from there, to the same bytes."""

import contextlib
import os
import re
import shutil
import signal
import sys
import time

from tqdm import tqdm

import config
from nanobit import files
from nanobit.cli import Flag, fail
from nanobit.files import read_json
from nanobit.prepare import chunks, hub, sources, token_files, vocab, workers
from nanobit.terminal import printable
from nanobit.tokenizer import spec_of

SAVE_SECONDS = 10.0  # between two states from which a killed preparation can continue
FLAGS = {
    "name": Flag("", "name of the data set"),
    "tokenizer": Flag(
        "",
        "sentencepiece: trained on this text | char | gpt2, cl100k_base, ...: an encoding of tiktoken | a "
        "tokenizer.model of SentencePiece, or a folder or a repository of the hub that holds one",
    ),
    "vocab_size": Flag(4096, "tokens of a sentencepiece tokenizer that is trained here", within="[1, inf)"),
    "max_documents": Flag(0, "documents to read at most, of a val_split too; 0 = all"),
    "val_fraction": Flag(0.0, "share of the documents to hold out, by a hash of their text", (), "[0, 1)"),
    "workers": Flag(0, "processes that tokenize; 0 = one per core"),
    "max_bad_rows": Flag(1000, "rows without a text (null, NaN, not UTF-8) to skip; empty rows do not count"),
}
NOT_WRITTEN = ("name", "workers", "max_bad_rows")  # flags that do not change what is written
NEWER = ("keep_crlf", "plain_quotes")  # flags that some data sets were made before: left out at the default
HUB_FLAGS = {
    "repo": Flag("", "data set of the Hugging Face hub, or a folder laid out like one"),
    "config": Flag("", "its config; '' = the default one"),
    "split": Flag("train", "its split to train on"),
    "val_split": Flag("", "its split to hold out; '' = a val_fraction", not_with="val_fraction"),
    "column": Flag("text", "its column that holds the text"),
    "revision": Flag("", "its branch, tag or commit; '' = the newest"),
}


def prepare(cfg, open_streams, options, paths=(), layout=(token_files.Writer, workers.encode_chunk)):
    """Write data_dir/name from the documents of open_streams() -> [Hub or Files, ...], or continue it.
    options: those that decide what is written; paths: files whose content decides it, too; layout: what
    writes the tokens, and the function of a worker that makes them. Exits with 2 for a user's mistake, with 1
    for a full disk or a lost hub, with 130 for Ctrl-C. What is written stays, for the same command to
    continue, as after kill -9; if nothing is, no file stays."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    source, stamp = source_now(folder, options, paths)
    if is_complete(cfg, folder):
        return
    before = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    token_files.open_data_set(cfg.data_dir, cfg.name, source, start_over=False)
    try:
        lock = files.lock(os.path.join(folder, ".lock"))
    except BlockingIOError as error:
        fail(f"{folder} is being written by {error.strerror}; wait for it, or choose another --name=")
    except OSError as error:
        fail(f"{folder} cannot be written ({error.strerror}); choose another --data_dir= or --name=")
    if is_complete(cfg, folder):  # the other process has just ended
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        progress = read_json(os.path.join(folder, "progress.json"))
        cfg.revision = progress.get("revision", getattr(cfg, "revision", ""))
        streams = open_streams()
        if not progress:
            progress = dict(source=source, stamp=stamp) | begin(cfg, folder, streams, open_streams)
        else:
            print(f"continuing after {sum(progress['documents'].values()):,} documents")
            if "stamp" in progress:
                progress["stamp"] = stamp
            else:  # an earlier version began it, which kept line ends
                cfg.keep_crlf = True
        writer = encode(cfg, folder, streams, progress, *layout)
        if "train" not in progress["tokens"]:  # the corrected command would find another data set here
            for name in ("progress.json", *progress["shards"], *progress.get("masks", ())):
                os.remove(os.path.join(folder, name))
            fail(too_few(cfg, progress))
    except (KeyboardInterrupt, SystemExit) as end:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for what follows
        lock.release()
        leave(folder, before, end)
    if "val" not in progress["tokens"]:
        print(f"warning: {too_few(cfg, progress)}")
    if cfg.tokenizer == "sentencepiece":
        vocab.warn_if_large(progress["vocab_size"], progress["tokens"]["train"], progress["bytes"]["train"])
    writer.write_meta()
    lock.release()
    for name in os.listdir(folder):
        if name.startswith((".lock", "progress.json", "meta.json.tmp")):
            os.remove(os.path.join(folder, name))
    summarize(folder)


def begin(cfg, folder, streams, open_streams):
    """Return the progress of a preparation that begins; make its tokenizer, which is written into folder."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, "meta.json"))  # no progress.json says where to continue
    if not getattr(cfg, "max_documents", 0):
        bytes_each = 2 if cfg.tokenizer == "char" else 0.4  # of tokens for a byte of text, at the least
        check_room(folder, bytes_each * sum(stream.size for stream in streams))
    spec, marks, vocab_size = vocab.pick(cfg, folder, chunks.texts(cfg, open_streams()))
    progress = dict(tokenizer=spec, **marks, vocab_size=vocab_size, revision=cfg.revision)
    progress |= dict(mark=chunks.START, tokens={}, shards={}, bytes={}, documents={}, seconds=0.0)
    return progress | dict(stream_began=[0, 0])  # tokens and bytes before the stream under way


def encode(cfg, folder, streams, progress, make_writer, make_tokens):
    """Tokenize all documents from progress on, and keep it up to date; return the Writer of the files."""
    writer = make_writer(folder, progress)
    rest = chunks.chunks(cfg, streams, progress["mark"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    spec = spec_of(progress, folder)
    results = workers.encoded(rest, cfg.workers or cores, spec, writer.dtype, make_tokens)
    began = saved = time.perf_counter()
    n_before = writer.n()
    done = sum(progress["bytes"].values())
    bar = tqdm(desc=cfg.name, initial=done, unit="B", unit_scale=True, disable=None)
    try:
        with bar, contextlib.closing(results):
            writer.save()
            for encoded, mark, share in results:
                if mark["stream"] != progress["mark"]["stream"]:
                    progress["stream_began"] = [writer.n(), bar.n]
                progress["mark"] = mark
                for split, part in encoded.items():
                    writer.add(split, *part)
                    bar.update(part[2])  # bytes of text
                now = time.perf_counter()
                speed = (writer.n() - n_before) / (now - began)
                bar.set_postfix_str(f"{writer.n():,} tokens, {speed:,.0f} tokens/s", refresh=False)
                n_began, bytes_began = progress["stream_began"]
                if share:
                    bar.total = int(bytes_began + (bar.n - bytes_began) / share)
                if now - saved > SAVE_SECONDS:
                    writer.save()
                    saved = time.perf_counter()
                    if share and share > 0.01:
                        tokens_left = (writer.n() - n_began) * (1 / share - 1)
                        check_room(folder, tokens_left * writer.dtype.itemsize)
            writer.finish()
    except OSError as error:
        reason = error.strerror or error
        fail(f"cannot write {folder}: {reason}; free some space, then the same command continues", code=1)
    finally:
        with contextlib.suppress(OSError):  # a full disk again
            writer.close()  # on Windows discard cannot remove what is open
    return writer


def leave(folder, before, end):
    """End an unfinished preparation with exit code 130 for Ctrl-C, or with that of `end`. If no token is
    written, remove what it has put into a folder that held the names `before`, and the folder if empty."""
    is_kept = bool(read_json(os.path.join(folder, "progress.json")).get("tokens"))
    for name in [] if is_kept else os.listdir(folder):
        is_ours = re.fullmatch(
            r"\.lock.*|(train|val)_\d{5}\.(bin|mask)\.partial|(meta|progress)\.json.*", name
        )
        if is_ours or (name.startswith("tokenizer.") and name not in before):
            os.remove(os.path.join(folder, name))
    if not os.listdir(folder):
        os.rmdir(folder)
    if isinstance(end, KeyboardInterrupt):
        state = "the same command continues" if is_kept else "nothing was written yet"
        print(f"\nstopped; {state}", file=sys.stderr)
        raise SystemExit(130) from None
    if is_kept and end.code == 2:
        print(f"{folder} keeps what is written: the same command continues, or delete it", file=sys.stderr)
    raise end


def source_now(folder, options, paths):
    """Return (meta.json's source: the options and a hash of the files' content, a hash of their sizes and
    times); files whose sizes and times are known are not read. Exits with 2 if folder has another."""
    known = [read_json(os.path.join(folder, name)) for name in ("meta.json", "progress.json")]
    known = list(filter(None, known))
    source, stamp = options, ""
    if paths:
        stamp, content = sources.stamp(paths), ""
        for former in known[:1]:  # an earlier version wrote the stamp in the place of the content's hash
            hashed = token_files.source_in(former).rpartition(" ")[2]
            if stamp in (hashed, former.get("stamp")):
                content = hashed
        source = f"{options} {content or sources.fingerprint(paths)}"
    for former in known:
        was = token_files.source_in(former)
        if was == source:
            continue
        fault = f" holds another data set ({printable(was)})"
        if paths and was.rpartition(" ")[0] == options:
            copied = ", or were copied (an earlier version made it, which compares only their times)"
            fault = f": the files have changed since it was made{copied * ('stamp' not in former)}"
        fail(f"{folder}{fault}; choose another --name=, or delete it")
    return source, stamp


def is_complete(cfg, folder):
    """Return whether the data set of a folder is complete, and print that."""
    meta = read_json(os.path.join(folder, "meta.json"))
    if not meta.get("complete"):
        return False
    older = "stamp" not in meta and getattr(cfg, "keep_crlf", True) is False
    note = " (an earlier version made it, with the line ends of the files)" * older
    print(f"{folder} is complete{note}; to make it again, delete it")
    summarize(folder)
    return True


def too_few(cfg, progress):
    """Return a line if no document was held out, or all, or if none has a text, with every remedy."""
    counts = progress["documents"]
    n = sum(counts.values())
    if not n:
        skipped = token_files.skipped(progress)
        fault = f"no text is left to train on; {chunks.counted(skipped)}"
        if "too long" in skipped:
            fault += f"; a window of {progress['window']} tokens holds no turn"
        return fault
    if "train" in counts:
        state, size, without = "held out", "larger", "train.py"
    else:
        state, size, without = "left to train on", "smaller", "--val_fraction=0 and train.py"
    remedy = f"a {size} --val_fraction= or more documents may change that"
    if getattr(cfg, "separator", ""):
        remedy += ", or a --separator= that occurs more often, or none: then the end of the text is held out"
    remedy += f"; without a validation set: {without} --eval_every=0 --patience=0"
    return f"val_fraction = {cfg.val_fraction}: no document was {state} of {n:,}; {remedy}"


def check_room(folder, need):
    """Exit with 1 if the disk has no room for so many more bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        fail(f"{folder} needs {need / 1e6:,.1f} MB more, the disk has {free / 1e6:,.1f} MB free", code=1)


def summarize(folder):
    """Print what a complete data set holds."""
    meta = read_json(os.path.join(folder, "meta.json"))
    for split, count in meta["tokens"].items():
        n, size = meta["documents"][split], meta["bytes"][split]
        ratio = f"{count / max(1, size):.4f} tokens per byte"
        line = f"{folder}: {split}: {n:,} documents, {count:,} tokens, {size:,} bytes of text, {ratio}"
        if "window" in meta:  # of conversations
            windows = f"{count // meta['window']:,} windows of {meta['window']:,} tokens"
            learned = f"{meta['counted'][split]:,} tokens to learn, {size:,} bytes of answers"
            line = f"{folder}: {split}: {n:,} conversations in {windows}, {learned}"
        print(line)
    if skipped := meta.get("skipped"):
        print(chunks.counted(skipped))
    if meta.get("cut"):
        print(
            f"longer than a window: {meta['cut']:,} conversations end after the last whole answer that fits"
        )
    total = sum(meta["tokens"].values())
    speed = f"{meta['seconds']:.1f} s, {total / meta['seconds']:,.0f} tokens/s"
    print(f"tokenizer: {meta['tokenizer']['kind']}, {meta['vocab_size']:,} tokens; {speed}")


def source_of(script, cfg, flags):
    """Return meta.json's source, of all flags that decide what is written."""
    names = [name for name in flags if name not in NOT_WRITTEN]
    names = [name for name in names if name not in NEWER or getattr(cfg, name) != flags[name][0]]
    return token_files.source_of(script, cfg, names)


def prepare_hub(doc, script, defaults):
    """Prepare a data set of the hub: the whole of a script, whose flags have these defaults."""
    flags = HUB_FLAGS | FLAGS
    flags["val_fraction"] = flags["val_fraction"]._replace(not_with="val_split")
    flags |= {name: flags[name]._replace(default=value) for name, value in defaults.items()}
    cfg = config.load(doc=doc, flags=flags, only=("data_dir",))

    splits = [(cfg.val_split, "val"), (cfg.split, "train")] if cfg.val_split else [(cfg.split, "")]
    source = source_of(script, cfg, flags)
    prepare(cfg, lambda: [hub.Hub(cfg, *names) for names in splits], source)
