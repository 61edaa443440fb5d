"""The import rules, read from the sources: imports run one way, and training loads little."""

import ast
import glob
import os
import sys

import faults
import pytest
from conftest import ROOT, run, train

FLAT = [os.path.basename(path)[:-3] for path in glob.glob(f"{ROOT}/nanobit/[!_]*.py")]
FOLDERS = [os.path.basename(os.path.dirname(path)) for path in glob.glob(f"{ROOT}/nanobit/*/__init__.py")]
ROOT_FILES = [os.path.basename(path)[:-3] for path in glob.glob(f"{ROOT}/*.py")]
COMMANDS = [name for name in ROOT_FILES if name not in ("model", "quant")]


def path_of(module):
    """Return the file of a module of this repository, or None."""
    base = os.path.join(ROOT, *module.split("."))
    for path in (base + ".py", os.path.join(base, "__init__.py")):
        if os.path.isfile(path):
            return path
    return None


def names_in(node):
    """Return the modules that an import statement may load: `from a import b` may load a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports(module, lazy=True):
    """Return the modules that a module imports: those of this repository by their full name, others by their
    first part; without `lazy`, only what it imports when it is imported itself."""
    with open(path_of(module), encoding="utf-8") as file:
        nodes = [ast.parse(file.read())]
    loaded = set()
    while nodes:
        node = nodes.pop()
        loaded.update(names_in(node))
        if lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes.extend(ast.iter_child_nodes(node))
    ours = {name for name in loaded if path_of(name)} - {"nanobit"}
    others = {name.split(".")[0] for name in loaded} - {name.split(".")[0] for name in ours} - {"nanobit"}
    return ours | others


def ours(module, lazy=True):
    """Return the modules of this repository that a module imports."""
    return {name for name in imports(module, lazy) if path_of(name)} - {module}


def all_modules():
    """Return the name of each module of the repository, without config files and tests."""
    paths = [*glob.glob(f"{ROOT}/*.py"), *glob.glob(f"{ROOT}/prepare/*.py"), f"{ROOT}/config/__init__.py"]
    paths += glob.glob(f"{ROOT}/nanobit/**/*.py", recursive=True)
    names = [os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".") for path in paths]
    return {name.removesuffix(".__init__") for name in names}


def test_there_is_no_cycle():
    """No module imports itself, through whatever others, at the time it is imported."""
    waiting = {module: ours(module, lazy=False) for module in all_modules()}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert waiting == {}


@pytest.mark.parametrize(
    "name, allowed", [("cli", {"nanobit.terminal"}), ("files", set()), ("kernels", {"nanobit.kernels_cuda"})]
)
def test_the_lowest_modules_import_nothing_of_ours(name, allowed):
    """cli, files and kernels can be read, and used, alone."""
    assert ours(f"nanobit.{name}") <= allowed


def test_terminal_imports_nothing_of_ours():
    """cli imports terminal, which is below all others."""
    assert ours("nanobit.terminal") == set()


def test_quant_imports_torch_and_kernels_only():
    """The method can be copied into another project with one more file."""
    assert imports("quant") - sys.stdlib_module_names == {"torch", "nanobit.kernels"}


def test_config_imports_the_command_line_and_files_only():
    """The settings are read before torch is imported, and know no part of training."""
    lowest = {"nanobit.cli", "nanobit.files", "nanobit.terminal"}
    assert ours("config", lazy=False) <= lowest
    assert ours("config") <= lowest | {"nanobit.export", "nanobit.export.llama"}


@pytest.mark.parametrize("name", FLAT)
def test_flat_modules_import_no_command(name):
    """What training needs imports no script."""
    scripts = {module for module in all_modules() if module.startswith("prepare.")}
    assert ours(f"nanobit.{name}") & {*COMMANDS, *scripts} == set()


@pytest.mark.parametrize("name", FLAT)
def test_flat_modules_import_no_folder(name):
    """What training needs loads nothing that only one command needs."""
    tops = {module.split(".")[1] for module in ours(f"nanobit.{name}", lazy=False) if "." in module}
    assert tops & set(FOLDERS) == set()


# from below to above, after the other flat modules
METHOD = ["quant", "nanobit.experts", "model"]
USERS = ["nanobit.kept_codes", "nanobit.metrics", "nanobit.generate", "nanobit.weights", "nanobit.resume"]


@pytest.mark.parametrize("name", sorted({f"nanobit.{name}" for name in FLAT} - {*METHOD, *USERS}))
def test_other_flat_modules_are_below_the_method(name):
    """Only what uses a model imports quant, experts or model."""
    assert ours(name, lazy=False) & {*METHOD, *USERS} == set()


@pytest.mark.parametrize("name", METHOD)
def test_the_method_is_read_in_one_order(name):
    """quant knows no experts, experts know no model, and the model knows none of its users."""
    above = METHOD[METHOD.index(name) + 1 :] + USERS
    assert ours(name) & set(above) == set()


def test_nanobit_is_a_plain_folder():
    """nanobit/__init__.py is empty."""
    assert os.path.getsize(path_of("nanobit")) == 0


def test_the_root_shows_the_commands_and_the_two_hero_files():
    """The root holds the commands, model.py and quant.py, and nothing else."""
    wanted = set("train sample evaluate export bench monitor compare model quant".split())
    assert set(ROOT_FILES) == wanted


def loaded(err):
    """Return the names of modules that faults.print_modules has printed on stderr."""
    (line,) = [line for line in err.splitlines() if line.startswith("modules: ")]
    return set(line.split()[1:])


def test_a_step_of_training_loads_nothing_of_the_commands(data_dir, out_dir):
    """One step of train.py, evaluated, sampled and saved, loads no module of nanobit/*/ and no tracker."""
    changes = dict(max_steps=1, eval_every=1, sample_every=1)
    _, err = train(data_dir, out_dir, "r", patch=faults.print_modules(), **changes)
    modules = {name for name in loaded(err) if name.startswith("nanobit.")}
    assert "nanobit.schedule" in modules
    assert "nanobit.trackers" not in modules
    assert {name for name in modules if name.split(".")[1] in FOLDERS} == set()


def test_init_from_a_checkpoint_loads_nothing_of_the_commands(data_dir, out_dir):
    """Training that begins with the weights of a run loads no reader of exported folders."""
    train(data_dir, out_dir, "r", max_steps=1)
    flags = dict(max_steps=1, init_from=f"{out_dir}/r", patch=faults.print_modules())
    _, err = train(data_dir, out_dir, "x", **flags)
    names = [name.split(".") for name in loaded(err)]
    assert not [name for name in names if name[0] == "nanobit" and len(name) > 1 and name[1] in FOLDERS]


def test_help_of_a_preparation_is_quick():
    """prepare/tictactoe.py --help imports no torch."""
    _, err = run("prepare/tictactoe.py", "--help", patch=faults.print_modules_at_exit())
    assert "torch" not in loaded(err)
