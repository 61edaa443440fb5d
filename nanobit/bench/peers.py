"""Time nanoGPT's model and llama.cpp, and measure the memory of each twin alone, for bench.py --compare."""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import tempfile

import torch

import config
from nanobit import machine
from nanobit.bench import generation, timing
from nanobit.export import gguf_file, verify


def nanogpt(cfg, windows, device, dtype):
    """Return nanoGPT's model of the same depth and width, with its own vocabulary, as a Contestant."""
    spec = importlib.util.spec_from_file_location("nanogpt", cfg.nanogpt)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "dropout")}
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        model = module.GPT(module.GPTConfig(block_size=cfg.seq_len, **sizes))
    print(f"nanoGPT: {sum(p.numel() for p in model.parameters()):,} parameters with its own vocabulary")
    compiled, is_compiled = machine.compiled(model, cfg, device)
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=cfg.weight_decay)]
    groups += [dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)

    def loss(x, y):
        return compiled(x, y.contiguous())[1]

    flops_per_token = 6 * sum(p.numel() for p in model.parameters())
    is_replayed = machine.replays_micro_steps(cfg, device, dtype, flops_per_token)
    return timing.Contestant(
        cfg, "nanoGPT", model, loss, [optimizer], windows, device, dtype, is_compiled, is_replayed
    )


def memory_gb(cfg, ternary):
    """Return the peak memory of this process, after training steps of one twin."""
    device = machine.pick(cfg.device)
    if cfg.deterministic:
        machine.make_deterministic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        windows = timing.random_tokens(cfg, folder)
        timing.ours(cfg, ternary, windows, device, machine.training_dtype(cfg, device))
    return machine.peak_memory_gb(device)


def training(cfg, device, dtype):
    """Time training with nanoGPT, measure each twin's memory alone; return what the JSON line needs."""
    facts, step_ms, ratios = timing.training(cfg, device, dtype, peer=nanogpt)
    torch.cuda.empty_cache()  # the children need what the three models held
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        gb = {ternary: processes.submit(memory_gb, cfg, ternary).result() for ternary in (True, False)}
    print(f"peak memory of each alone: ternary {machine.gb(gb[True])}, float {machine.gb(gb[False])}")
    facts |= dict(nanogpt_step_ms=step_ms["nanoGPT"], float_peak_memory_gb=gb[False])
    return facts | dict(peak_memory_gb=gb[cfg.ternary], ratios=ratios)


def writers(cfg, device, prompt, n_new):
    """Return {name: function that yields n_new tokens after prompt (1, T)}: the experiment's model with the
    other heads, its twin, and on a CPU llama.cpp."""
    other_heads = [head for head in config.HEADS if head != cfg.head]
    choices = [*((cfg.ternary, head) for head in other_heads), (not cfg.ternary, cfg.head)]
    ours = dict(generation.writer(cfg, ternary, head, device, prompt, n_new) for ternary, head in choices)
    if device.type != "cpu":
        print("llama.cpp is left out: the binding computes on the CPU")
        return ours
    model = timing.build(cfg, cfg.ternary, device)
    tokenizer = dict(kind="char", sha256="", eot=0, chars="\0")
    part = dict(config=vars(cfg), tokenizer=tokenizer, model=model.state_dict(), step=0)
    # q2_0, which fits more widths, is too new for the binding
    dtype = "tq2_0" if gguf_file.default_type(part) == "tq2_0" else "f16"
    embed = "f16" if cfg.n_embd % gguf_file.BLOCK_SIZE["q8_0"] else "q8_0"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "model.gguf")
        gguf_file.write(part, path, dtype, embed)
        llama = verify.Llama(path, n_ctx=cfg.seq_len, n_threads=torch.get_num_threads())
    return ours | {f"llama.cpp {dtype}": lambda: llama.write(prompt[0].tolist(), n_new)}
