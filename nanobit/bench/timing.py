"""
What bench.py times: training steps of an experiment, its twin and a peer, the writing of text, and what a run
does once in a while.
"""

import concurrent.futures
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from model import Transformer
from nanobit import checkpoint, data, machine, optim
from nanobit.bench import planner
from nanobit.experts import router_loss
from nanobit.export import gguf_file, verify
from nanobit.generate import generate
from nanobit.infer.restore import lighten_head, pack
from nanobit.metrics import mean_loss


def random_tokens(cfg, folder):
    """a data set of random tokens for a hundred micro-steps; returns its Windows"""
    n = 1 + 100 * cfg.batch_size * cfg.seq_len
    meta = dict(complete=True, dtype="uint32", shards={"train_00000.bin": {"tokens": n}}, tokens={"train": n})
    meta["vocab_size"] = cfg.vocab_size
    os.mkdir(os.path.join(folder, "random"))
    ids = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=n, dtype=np.uint32)
    ids.tofile(os.path.join(folder, "random", "train_00000.bin"))
    return data.Windows(SimpleNamespace(**vars(cfg) | dict(data_dir=folder, dataset="random")), meta, "train")


def build(cfg, ternary, device):
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        return Transformer(SimpleNamespace(**vars(cfg) | dict(ternary=ternary)))


class Contestant:
    """a model with all that a training step needs. loss(x, y) is what is differentiated; ms, the times of its
    steps; parts, those of the parts of steps that were timed part by part"""

    def __init__(self, cfg, name, model, loss, optimizers, windows, device, dtype):
        self.cfg, self.name, self.model, self.loss, self.optimizers = cfg, name, model, loss, optimizers
        self.windows, self.device, self.dtype = windows, device, dtype
        self.n, self.ms, self.parts = 0, [], {}
        if cfg.compile:
            print(f"{name}: compiling, which takes a minute or so", file=sys.stderr, flush=True)
        began = time.perf_counter()
        self.step()
        self.first_seconds = time.perf_counter() - began
        for _ in range(cfg.warmup - 1):
            self.step()
        what = ", with compiling" if cfg.compile else ""
        print(f"{name}: {self.first_seconds:.1f} s for the first step{what}", flush=True)
        self.ms.clear()

    def step(self, by_parts=False):
        """one optimizer step of cfg.accumulation micro-steps"""

        def mark(part):
            if by_parts:
                machine.synchronize(self.device)
                now = time.perf_counter()
                spent[part] = spent.get(part, 0.0) + 1e3 * (now - clock[0])
                clock[0] = now

        spent, cfg = {}, self.cfg
        machine.synchronize(self.device)
        began = time.perf_counter()
        clock = [began]
        for _ in range(cfg.accumulation):
            batch = self.windows.batch(self.n * cfg.batch_size, cfg.batch_size, self.device)
            self.n += 1
            mark("data")
            with machine.autocast(self.device, self.dtype):
                loss = self.loss(*batch)
            mark("forward")
            (loss / cfg.accumulation).backward()
            mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mark("optimizer")
        machine.synchronize(self.device)
        if not by_parts:
            self.ms.append(1e3 * (time.perf_counter() - began))
        for part, ms in spent.items():
            self.parts.setdefault(part, []).append(ms)


def ours(cfg, ternary, windows, device, dtype):
    """(Contestant of the experiment's model, whether it is compiled)"""
    model = build(cfg, ternary, device)
    compiled, is_compiled = machine.compiled(model, cfg.compile, device)
    optimizers = optim.make_optimizers(cfg, model, machine.matrix_dtype(device))

    def loss(x, y):
        value, router = compiled(x, y)
        return value + router_loss(cfg, router)

    name = "ternary" if ternary else "float"
    return Contestant(cfg, name, model, loss, optimizers, windows, device, dtype), is_compiled


def nanogpt(cfg, windows, device, dtype):
    """nanoGPT's model of the same depth and width, with its own vocabulary, from a clone of its repository;
    its optimizer is our fused AdamW"""
    spec = importlib.util.spec_from_file_location("nanogpt", cfg.nanogpt)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("n_layer", "n_head", "n_embd", "dropout")
    size = module.GPTConfig(block_size=cfg.seq_len, **{name: getattr(cfg, name) for name in names})
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        model = module.GPT(size)
    print(
        f"nanoGPT: {sum(p.numel() for p in model.parameters()):,} parameters, its own vocabulary among them"
    )
    compiled, _ = machine.compiled(model, cfg.compile, device)
    groups = [[p for p in model.parameters() if (p.dim() < 2) == is_vector] for is_vector in (False, True)]
    groups = [dict(params=groups[0], weight_decay=cfg.weight_decay), dict(params=groups[1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    return Contestant(
        cfg,
        "nanoGPT",
        model,
        lambda x, y: compiled(x, y.contiguous())[1],  # random ids of ours are ids of its larger vocabulary
        [optimizer],
        windows,
        device,
        dtype,
    )


def twin_memory_gb(cfg, ternary):
    """peak memory of one model alone, in a process of its own"""
    device = machine.pick(cfg.device)
    if cfg.deterministic:
        machine.make_deterministic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is open
        ours(cfg, ternary, random_tokens(cfg, folder), device, machine.pick_dtype(cfg.dtype, device))
    return machine.peak_memory_gb(device)


def matmul_flops(device, dtype):
    """FLOP/s of a large square matrix product, the median of nine"""
    n, seconds = 8192 if device.type == "cuda" else 1024, []
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(12):
        machine.synchronize(device)
        began = time.perf_counter()
        a @ a
        machine.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[3:])


def compared(ours, theirs):
    """(ratio of the medians, quartiles of the ratios pair by pair) of two lists that were measured in turn"""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    quartiles = ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]
    return statistics.median(ours) / statistics.median(theirs), quartiles


def ratio_line(one, other):
    """the two compared, and the ratio of their medians"""
    ratio, (low, high) = compared(one.ms, other.ms)
    print(
        f"{one.name} / {other.name}: {ratio:.3f} by the medians of {len(one.ms)} pairs; pair by pair "
        f"{low:.3f} to {high:.3f} (quartiles)"
    )
    return ratio


def training(cfg, device, dtype, alone=False):
    """time and print steps of the experiment, and unless alone of its twin and peers; what there is for the
    JSON line"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        windows = random_tokens(cfg, folder)
        first, is_compiled = ours(cfg, cfg.ternary, windows, device, dtype)
        peak_memory_gb = machine.peak_memory_gb(device)  # before the others take their share
        others = [] if alone else [ours(cfg, not cfg.ternary, windows, device, dtype)[0]]
        if cfg.compare:
            others.append(nanogpt(cfg, windows, device, dtype))
        everyone = [first, *others]
        for i in tqdm(range(cfg.pairs), desc="steps", disable=not sys.stderr.isatty(), leave=False):
            for contestant in everyone[:: 1 if i % 2 == 0 else -1]:
                contestant.step()
        for _ in range(max(1, cfg.pairs // 3)):
            first.step(by_parts=True)
    print(f"{cfg.total_batch_size:,} tokens a step = {cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}")
    for each in everyone:
        median = statistics.median(each.ms)
        spread = f"({min(each.ms):.1f} to {max(each.ms):.1f})"
        speed = 1e3 * cfg.total_batch_size / median
        print(f"{each.name:8} {median:9.1f} ms a step {spread}, {speed:9,.0f} tokens/s")
    ratios = {each.name: ratio_line(first, each) for each in others}
    parts = {name: statistics.median(ms) for name, ms in first.parts.items()}
    shares = ", ".join(f"{name} {ms / sum(parts.values()):.1%}" for name, ms in parts.items())
    print(f"time of a step: {shares}")
    step_ms = statistics.median(first.ms)
    tokens_per_sec = 1e3 * cfg.total_batch_size / step_ms
    flops, peak = tokens_per_sec * first.model.flops_per_token(), machine.peak_flops(device, dtype)
    reached = matmul_flops(device, dtype)
    known = f"{flops / peak:.1%} of the known peak of {peak / 1e12:.0f}, " if peak else ""
    print(f"MFU: {known}{flops / reached:.1%} of the {reached / 1e12:.3g} TFLOP/s of a large product here")
    planned = planner.memory_gb(first.model.cfg, first.model.counts(), cfg.batch_size, dtype.itemsize)
    print(
        f"peak memory {machine.gb(peak_memory_gb)}, of the process on a CPU; planned, without that: "
        f"{machine.gb(planned)}"
    )
    found = dict(
        step_ms=step_ms,
        float_step_ms=next((statistics.median(each.ms) for each in everyone if each.name == "float"), None),
        tokens_per_sec=tokens_per_sec,
        mfu=flops / peak if peak else None,
        mfu_measured=flops / reached,
        peak_memory_gb=peak_memory_gb,
        parts_ms=parts,
        compile_seconds=first.first_seconds,
        compile=is_compiled,
    )
    if cfg.compare:
        nanogpt_step_ms = statistics.median(others[1].ms)
        del first, others, everyone  # their memory, which the next ones may need
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as alone_in:
            gb = [alone_in.submit(twin_memory_gb, cfg, ternary).result() for ternary in (True, False)]
        print(f"peak memory of each alone: ternary {machine.gb(gb[0])}, float {machine.gb(gb[1])}")
        found |= dict(nanogpt_step_ms=nanogpt_step_ms, float_peak_memory_gb=gb[1])
        found |= dict(peak_memory_gb=gb[0 if cfg.ternary else 1], ratios=ratios)
    return found


def writers(cfg, device, prompt, n_new):
    """{name: function that begins to write n_new tokens after prompt (1, T)} of what is to be timed: the
    experiment's model, and to compare it with the same with a lighter head, the twin, and llama.cpp"""

    def named(ternary, head):
        kind = ("ternary" if cfg.packed else "ternary, master weights") if ternary else "float"
        return kind + (", bfloat16 head" if head == "bfloat16" else "")

    def ours(ternary, head):
        model = build(cfg, ternary, device).eval()
        if ternary and cfg.packed:
            pack(model)
        if head == "bfloat16":
            lighten_head(model)
        return lambda: generate(model, prompt, n_new, temperature=0.0, cuda_graph=cfg.cuda_graph)

    def theirs(folder):
        model = build(cfg, cfg.ternary, device)
        tokenizer = dict(kind="char", sha256="", eot=0, chars="\0")
        part = dict(config=vars(cfg), tokenizer=tokenizer, model=model.state_dict(), step=0)
        # q2_0, which fits more widths, is too new for the binding
        kind = "tq2_0" if gguf_file.smallest(part) == "tq2_0" else "f16"
        embed = "f16" if cfg.n_embd % gguf_file.BLOCK_SIZE["q8_0"] else "q8_0"
        path = os.path.join(folder, "model.gguf")
        gguf_file.write(part, path, kind, embed)
        llama = verify.Llama(path, n_ctx=cfg.seq_len, n_threads=torch.get_num_threads())
        return f"llama.cpp {kind}", lambda: llama.write(prompt[0].tolist(), n_new)

    if cfg.cuda_graph:
        machine.check_cuda_graph(device, cfg.n_expert)
    wanted = [(cfg.ternary, cfg.head)]
    if cfg.compare:
        other = "float32" if cfg.head == "bfloat16" else "bfloat16"
        wanted += [(cfg.ternary, other), (not cfg.ternary, cfg.head)]
    found = {named(*each): ours(*each) for each in wanted}
    if cfg.compare and device.type != "cpu":
        print("llama.cpp is left out: the binding computes on the CPU")
    elif cfg.compare:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            name, write = theirs(folder)
        found[name] = write
    return found


@torch.inference_mode()
def sampling(cfg, device, dtype):
    """time and print reading a prompt of half the context, and writing at most 128 tokens after it, batch 1;
    what there is for the JSON line"""
    prompt = torch.randint(cfg.vocab_size, (1, max(1, cfg.seq_len // 2)), device=device)
    n_new = max(2, min(128, cfg.seq_len - prompt.shape[1]))
    everyone = writers(cfg, device, prompt, n_new)
    memory = machine.peak_memory_gb(device)
    prefill, decode = ({name: [] for name in everyone} for _ in range(2))
    rounds = 1 + max(3, cfg.pairs // 2)
    for i in tqdm(range(rounds), desc="texts", disable=not sys.stderr.isatty(), leave=False):
        for name, write in list(everyone.items())[:: 1 if i % 2 == 0 else -1]:
            clock = [time.perf_counter()]
            with machine.autocast(device, dtype):
                for _ in write():
                    machine.synchronize(device)
                    clock.append(time.perf_counter())
            if i:  # the first round warms up
                prefill[name].append(prompt.shape[1] / (clock[1] - clock[0]))
                decode[name].append((n_new - 1) / (clock[-1] - clock[1]))
    first = next(iter(everyone))
    width = max(map(len, everyone))
    for name, speeds in decode.items():
        ratio, (low, high) = compared(speeds, decode[first])
        times = "" if name == first else f", {ratio:.2f} of {first} ({low:.2f} to {high:.2f})"
        print(
            f"{name:{width}}  prefill of {prompt.shape[1]} tokens {statistics.median(prefill[name]):9,.1f}, "
            f"decode {statistics.median(speeds):7,.1f} ({min(speeds):,.1f} to {max(speeds):,.1f}) "
            f"tokens/s{times}"
        )
    found = {name: statistics.median(speeds) for name, speeds in decode.items()}
    result = dict(prefill_tokens_per_sec=statistics.median(prefill[first]), peak_memory_gb=memory)
    return result | dict(decode_tokens_per_sec=found[first]) | (dict(decode=found) if cfg.compare else {})


def once_seconds(cfg, device, dtype):
    """seconds of one evaluation and one round of samples, of which a part is timed, and of one checkpoint"""
    model = build(cfg, cfg.ternary, device).eval()
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len), device=device)
    took = []
    with machine.autocast(device, dtype):
        for _ in range(2):
            began = time.perf_counter()
            mean_loss(model, [(x, x)])
            took.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in generate(model, x[:1, :4], 8, temperature=0.0):
            pass
        machine.synchronize(device)
        per_token = (time.perf_counter() - began) / 8
    evaluation = took[1] * (cfg.eval_tokens or cfg.val_tokens) / x.numel()
    where = cfg.out_dir if os.path.isdir(cfg.out_dir) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        weights = model.state_dict()
        moments = [{name: w.clone() for name, w in weights.items()} for _ in range(2)]
        began = time.perf_counter()
        checkpoint.save(folder, 0, dict(model=weights), dict(optimizer=moments))
        save = time.perf_counter() - began
    return evaluation, per_token * 3 * len(cfg.sample_prompts) * cfg.sample_tokens, save
