"""Copy the record of a run to TensorBoard, Weights & Biases and trackio, each imported only if it is on.

A separate thread feeds each tracker: one that fails or hangs costs a warning, never a step of training. If a
run resumes from step k, TensorBoard hides the old values from k on; W&B and trackio draw them twice."""

import hashlib
import html
import math
import os
import queue
import sys
import textwrap
import threading
import time
from functools import partial

import config
from nanobit import record
from nanobit.terminal import printable

TIMEOUT = 60  # seconds that W&B may take to begin, and to end
HANGS = 100  # seconds without an answer that count as hanging


def mirrored(cfg, name, row):
    """Return (step, finite numbers or totals, texts of greedy samples) of a line of the record."""
    numbers = row
    texts = {}
    if name in (record.BITNET, record.ROUTER):
        base = os.path.basename(name).removesuffix(".jsonl")
        numbers = {f"{base}/{key}": value for key, value in row["total"].items()}
    elif name == record.SAMPLES:
        numbers = {}
        if row["mode"] == "greedy":
            number = cfg.sample_prompts.index(row["prompt"])
            texts = {f"sample/{number}": row["prompt"] + row["generated_text"]}
    known = {k: v for k, v in numbers.items() if record.is_number(v) and k not in ("step", "time")}
    return row["step"], known, texts


def open_tensorboard(cfg, run_dir, step):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=step)

    def log(step, numbers, texts):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        for name, text in texts.items():  # Markdown shows indented text unchanged
            writer.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)
        writer.flush()

    settings = config.settings_of(cfg).items()
    log(step, {}, {"settings": "\n".join(f"{name} = {value!r}" for name, value in settings)})
    for name, key in ((record.SCALARS, "loss"), (record.BITNET, "total"), (record.ROUTER, "total")):
        if row := record.last(run_dir, name, key, step=step):  # hidden by purge_step, but not logged again
            log(*mirrored(cfg, name, row))
    return log, writer.close


def panels(module, texts):
    """Return texts as HTML for W&B and trackio, with their line breaks."""
    return {name: module.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}


def open_wandb(cfg, run_dir, step):
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # otherwise it asks for a key, and writes to stdout at the end
    start = record.read(run_dir, record.EVENTS)[0]  # stays the same after a resume, differs in a branch
    run_id = hashlib.blake2b(f"{cfg.run_id} {start}".encode(), digest_size=8).hexdigest()
    names = dict(id=run_id, name=cfg.wandb_name or cfg.run_id, project=cfg.wandb_project)
    options = dict(resume="allow", dir=run_dir, config=config.settings_of(cfg), allow_val_change=True)
    settings = wandb.Settings(console="off", init_timeout=TIMEOUT, finish_timeout=TIMEOUT)
    run = wandb.init(**names, entity=cfg.wandb_entity or None, **options, settings=settings)
    if run.url:  # '' if it is offline
        print(f"wandb: {run.url}", file=sys.stderr)
    run.define_metric("step")  # our field: W&B drops lines whose built-in step decreases
    run.define_metric("*", step_metric="step")
    return lambda step, numbers, texts: run.log({"step": step} | numbers | panels(wandb, texts)), run.finish


def open_trackio(cfg, run_dir, step):
    import trackio

    resume = {"start": "never", "resume": "allow"}
    events = [row["event"] for row in record.read(run_dir, record.EVENTS) if row["event"] in resume]
    options = dict(config=config.settings_of(cfg), resume=resume[events[-1]], embed=False)
    run = trackio.init(cfg.wandb_project, cfg.wandb_name or cfg.run_id, **options)
    return lambda step, numbers, texts: run.log(numbers | panels(trackio, texts), step=step), run.finish


class Mirror(threading.Thread):
    """A tracker and its thread. connect() returns log(step, numbers, texts) and close(). The first error is
    reported by warn(text), in the caller's thread, and switches the tracker off."""

    def __init__(self, name, connect, warn):
        super().__init__(name=name, daemon=True)
        self.connect = connect
        self.warn = warn
        self.lines = queue.SimpleQueue()
        self.is_on = True
        self.fault = ""
        self.busy_since = time.monotonic()
        self.start()

    def run(self):
        try:
            log, close = self.connect()
            while True:
                self.busy_since = math.inf
                line = self.lines.get()
                self.busy_since = time.monotonic()
                if line is None:
                    return close()
                log(*line)
        except BaseException as error:  # also SystemExit: training continues after any error
            self.fault = printable(" ".join(f"{type(error).__name__}: {error}".split()))

    def check(self):
        """Switch the tracker off, with a warning, if it has failed or hangs."""
        hangs = time.monotonic() - self.busy_since > HANGS
        if self.is_on and (self.fault or hangs):
            self.is_on = False
            reason = self.fault or f"no answer for {HANGS} seconds"
            self.warn(f"warning: {self.name} is off for the rest of this run ({reason})")


def start(cfg, run_dir, step, warn):
    """Return a Mirror for each tracker that is on, for a run that begins or resumes at `step`."""
    connect = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}
    return [Mirror(name, partial(connect[name], cfg, run_dir, step), warn) for name in config.trackers(cfg)]


def mirror(mirrors, cfg, name, row):
    """Send a line of file `name` of the record to all trackers."""
    step, numbers, texts = mirrored(cfg, name, row)
    for one in mirrors:
        one.check()
        if one.is_on and (numbers or texts):
            one.lines.put((step, numbers, texts))


def finish(mirrors):
    """End all trackers; each has HANGS seconds to send the rest."""
    for one in mirrors:
        one.lines.put(None)
    for one in mirrors:
        one.join(HANGS if one.is_on else 0)
        if one.is_alive():
            one.busy_since = -math.inf
        one.check()
