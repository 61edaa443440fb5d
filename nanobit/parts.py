"""The two parts of a checkpoint, checkpoint.pt and trainer.pt: what they must hold, whoever wrote them."""

from types import SimpleNamespace

import config
from nanobit.cli import fail
from nanobit.terminal import printable
from nanobit.tokenizer import bos_of


def check_model(part):
    """Give the config of a checkpoint.pt the settings that an older one lacks. Raises an error unless the
    part holds what its users rely on, and sizes of which a model can be made on the device "meta", to compare
    the shapes."""
    defaults = config.assignments(config.DEFAULT)
    weights = part["model"]
    spec = part["tokenizer"]
    part["config"] = defaults | config.with_ratios(part["config"])
    cfg = SimpleNamespace(**part["config"])
    for key, default in defaults.items():
        config.coerce(key, getattr(cfg, key), type(default))
    for key, value, least, most in (
        ("n_layer", cfg.n_layer, 1, len(weights)),
        ("n_head", cfg.n_head, 1, cfg.n_embd),
        ("n_kv_head", cfg.n_kv_head, 1, cfg.n_head),
        ("n_expert_active", cfg.n_expert_active, 1, cfg.n_expert or cfg.n_expert_active),
        ("vocab_multiple", cfg.vocab_multiple, 1, 2**20),
        ("seq_len", cfg.seq_len, 1, 2**20),
        ("vocab_size", cfg.vocab_size, 1, 2**31),
        ("eot", spec["eot"], 0, cfg.vocab_size - 1),
        ("bos", bos_of(spec), 0, cfg.vocab_size - 1),
    ):
        if not least <= value <= most:
            raise ValueError(f"{key} = {value}, expected {least} to {most:,}")
    if cfg.n_embd % (2 * cfg.n_head) or cfg.n_head % cfg.n_kv_head:
        raise ValueError(f"n_embd = {cfg.n_embd}, n_head = {cfg.n_head}, n_kv_head = {cfg.n_kv_head}")
    if not (0 <= cfg.dropout < 1 and cfg.norm_eps >= 0 and cfg.rope_theta > 0):
        raise ValueError(f"dropout = {cfg.dropout}, norm_eps = {cfg.norm_eps}, rope_theta = {cfg.rope_theta}")
    if type(part["step"]) is not int or type(spec["kind"]) is not str or type(spec["sha256"]) is not str:
        raise ValueError(f"step = {part['step']!r}, tokenizer {spec['kind']!r} {spec['sha256']!r}")
    check_stored(weights)
    check_finite(weights)


def check_shapes(path, weights, needed, remedy="use another step folder, or the model.py of that run"):
    """Exit with 2 unless the tensors of a model have the names and shapes of `needed`, a state dict."""
    for name in sorted(weights.keys() | needed.keys()):
        in_file, expected = (tuple(t[name].shape) if name in t else "none" for t in (weights, needed))
        if in_file != expected:
            shapes = f"shape {in_file} in the file, {expected} by its settings and model.py"
            fail(f"{path}: {printable(name)}: {shapes}; {remedy}")


def check_trainer(part):
    """Raise an error unless a trainer.pt holds what resume relies on; check_states does the rest."""
    best = dict(step=0, val_loss=0.0) | part["best"]
    if {type(best["val_loss"]), *map(type, part["scaler"].values())} - {int, float}:
        raise ValueError(f"best = {best!r}, scaler = {part['scaler']!r}, expected numbers")
    skipped, reported = part["skipped"]
    counts = dict(step=part["step"], best=best["step"], stale_evals=part["stale_evals"], skipped=skipped)
    counts |= dict(reported=reported, routers=(part.get("routers") or [0, 0])[1]) | (part.get("counts") or {})
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**53:
            raise ValueError(f"{key} = {value!r}, expected a whole number from 0 to 2^53")


def check_states(optimizers, states, step):
    """Raise an error unless state dicts, saved after `step` updates, fit the parameters of optimizers."""
    if len(states) != len(optimizers) or (step and not any(saved["state"] for saved in states)):
        raise ValueError("optimizer lacks the state of the optimizers of this run")
    for optimizer, saved in zip(optimizers, states):
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("optimizer is not of the parameters of this model")
        params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        for i, entry in saved["state"].items():
            shapes = dict(step=(), exp_avg=params[i].shape, exp_avg_sq=params[i].shape)
            if "momentum" in groups[0]:  # of Muon
                shapes = dict(momentum_buffer=params[i].shape)
            stored = {key: value.shape for key, value in entry.items()}
            if stored != shapes or not 0 <= entry.get("step", 0) <= step:
                raise ValueError(f"optimizer: state of parameter {i} does not fit its shape or step {step}")
            check_stored(entry)


def check_stored(tensors):
    """Raise an error unless all of {name: tensor} are floats whose storage has a place for each element."""
    for name, w in tensors.items():
        is_stored = w.device.type == "cpu" and w.untyped_storage().nbytes() >= w.nbytes
        if not (w.is_floating_point() and is_stored):
            raise ValueError(f"{name} is {w.dtype} on {w.device}, expected floats with a place in the file")


def check_finite(weights):
    """Raise ValueError if a weight is NaN or infinite."""
    for name, w in weights.items():
        if not w.sum().isfinite() and not w.isfinite().all():  # a sum takes a tenth of the time
            raise ValueError(f"{name} holds NaN or infinity: the run has diverged")
