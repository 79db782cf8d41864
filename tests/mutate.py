"""Break the code a little, in one place after another, and see whether a test notices.

    python -m tests.mutate                       all files of TESTS
    python -m tests.mutate training/ema.py       some of them
    python -m tests.mutate --every 10            one mutant of ten

A mutant has one statement deleted, one operator or condition turned round, one number changed a
little, or one call such as `.clamp(min=0)` left out. It survives when the tests of its file pass.
Some survivors do the same as the original (1.1e-7 against a division by zero in place of 1e-7);
any other is a line that no test needs. outputs/mutants.jsonl holds the results: a second run tries
only what has changed, in a file or, for survivors, in its tests.

Works on a copy of the project. Needs Unix: a mutant is tried in a fork of this process, which has
imported torch already.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = {
    "scoring/metrics.py": ["metrics", "diagnosis"],
    "models/diffusion.py": ["diffusion", "samplers"],
    "sampling/samplers.py": ["samplers"],
    "utils/noise_scheduler.py": ["noise_scheduler", "diffusion"],
    "training/ema.py": ["ema"],
    "training/muon.py": ["muon"],
    "utils/checkpoint.py": ["checkpoint"],
    "sampling/draw.py": ["samplers", "fewstep"],
    "scoring/bits.py": ["likelihood"],
    "scoring/likelihood.py": ["likelihood"],
    "scoring/yardstick.py": ["yardstick"],
    "training/denoising.py": ["optimization"],
    "training/distillation.py": ["distillation"],
    "training/matching.py": ["distiller"],
    "training/optimization.py": ["optimization"],
    "training/tuning.py": ["distiller"],
}
SLOW = "fresh_digits or kill_9 or processes_that_write"  # tests that are left out
HEAVY = "diffusers matplotlib.pyplot scipy.linalg scipy.ndimage torch.utils.tensorboard".split()

SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq}
SWAPS |= {ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.And: ast.Or, ast.BitAnd: ast.BitOr}
SWAPS |= {there: here for here, there in SWAPS.items()} | {ast.Pow: ast.Mult, ast.FloorDiv: ast.Div}
NEGATING = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # by their swap
DELETABLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Break)
OPTIONAL = {"abs", "clamp", "clamp_", "double", "eval", "exp", "flip", "float", "log", "mean"}
OPTIONAL |= {"requires_grad_", "round", "sort", "sqrt", "square", "sum"}
UNTOUCHED = {"annotation", "returns", "decorator_list", "exc"}  # fields of a node
SMALL = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 1.1 or 0.1}


def changes(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Parts of a node, and what to put there; `inside` a function, where statements may go."""
    if isinstance(node, DELETABLE) and inside:
        yield node, ast.Pass()
    if isinstance(node, ast.Constant) and type(node.value) in SMALL:
        yield node, ast.Constant(SMALL[type(node.value)](node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in OPTIONAL and ast.unparse(node.func.value) != "torch":
            yield node, node.func.value
    for name, old in (("op", getattr(node, "op", None)), ("ops", getattr(node, "ops", [None])[0])):
        if type(old) in SWAPS:
            new, swapped = copy.copy(node), SWAPS[type(old)]()
            setattr(new, name, swapped if name == "op" else [swapped, *node.ops[1:]])
            yield node, new
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.UnaryOp):
        if not isinstance(getattr(node.test, "ops", [None])[0], NEGATING):
            yield node.test, ast.UnaryOp(ast.Not(), node.test)


def places(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What `changes` finds in this node and all below it."""
    yield from changes(node, inside)
    inside = inside or isinstance(node, ast.FunctionDef)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            checked = isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and name not in UNTOUCHED and not docstring | checked:
                yield from places(child, inside)


def mutants(source: str) -> dict[str, int]:
    """All texts that differ from `source` in one place, each with the number of its line."""
    data, starts, found = source.encode(), [0], {}
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, new in places(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
        found[(data[:start] + text.encode() + data[end:]).decode()] = node.lineno
    return dict(sorted(found.items(), key=lambda item: item[1]))


def passes(tests: str, seconds: int) -> bool:
    """Whether the tests in a file pass in a fork of this process, within `seconds`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            signal.alarm(seconds)  # which ends it
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", tests])
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests had started
    return status == 0


def results_of(name: str, every: int, log: Path) -> Iterator[dict]:
    """The result of each mutant of a file in the current folder, from `log` where it is there."""
    path, files = Path(name), [f"tests/test_{test}.py" for test in TESTS[name]]
    source, tests = path.read_text(), digest("".join(Path(file).read_text() for file in files))
    lines = log.read_text().splitlines() if log.exists() else []
    known = {result["text"]: result for result in map(json.loads, lines)}
    start = time.monotonic()
    if not all(passes(file, 600) for file in files):
        raise SystemExit(f"{name}: its tests fail before anything is changed")
    seconds = int(20 + 5 * (time.monotonic() - start))
    for second, (text, line) in enumerate(list(mutants(source).items())[::every]):
        result = known.get(digest(text))
        if result is None or result["survived"] and result["tests"] != tests:
            path.write_text(text)
            os.utime(path, (second, second))  # so that Python takes no other one's bytecode
            before, after = (t.splitlines()[line - 1].strip() for t in (source, text))
            survived = all(passes(file, seconds) for file in files)
            result = {"file": name, "line": line, "before": before, "after": after}
            result |= {"survived": survived, "text": digest(text), "tests": tests}
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
        yield result
    path.write_text(source)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="all of TESTS where none is given")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="try one mutant of K")
    args = parser.parse_args()
    if not set(args.files) <= TESTS.keys():
        parser.error(f"FILE: {args.files}: must be of {', '.join(TESTS)}")
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)  # a fork does not take the thread pool along
    for module in HEAVY:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "runs", "data")
        shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
        os.chdir(folder)
        sys.path[0] = folder
        del sys.modules["tests"]
        for name in args.files or TESTS:
            results = list(results_of(name, args.every, ROOT / "outputs" / "mutants.jsonl"))
            left = [result for result in results if result["survived"]]
            print(f"{name}: {len(left)} of {len(results)} survive", flush=True)
            for result in left:
                print("  {line}: {before}  ->  {after}".format(**result), flush=True)


if __name__ == "__main__":
    main()
