"""Functions of other packages that opdlab's are compared with: one decorator names the package and its function."""

import ast
import os
import pkgutil
import subprocess
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

F = TypeVar("F", bound=Callable[..., object])
LINES = (Path(__file__).parent / "packages.txt").read_text().splitlines()
VERSIONS = dict(line.split("==") for line in LINES if "==" in line)
"""The versions to compare with, by the package's name."""


def package_of(path: str) -> str:
    """The package of ``module.of.package:function``.

    Example:
        >>> package_of("liger_kernel.chunked_loss:LigerFusedLinearJSDLoss")
        'liger-kernel'
    """
    return path.partition(":")[0].partition(".")[0].replace("_", "-")


def against(*paths: str) -> Callable[[F], F]:
    """Run a test once for each function, which it gets as ``other``; `make test-conformance` alone runs these tests.

    A function of a package is ``module.of.package:function``, one of a repository ``owner/name@commit:path:function``.
    The test's id has package, version and function.
    """
    ids = [path if "@" in path else f"{package_of(path)} {VERSIONS[package_of(path)]} {path}" for path in paths]

    def decorate(test: F) -> F:
        marked: F = pytest.mark.conformance(pytest.mark.parametrize("other", paths, ids=ids, indirect=True)(test))
        return marked

    return decorate


def load(path: str) -> Any:
    """The function, from the version of its package that packages.txt names; the test fails without it."""
    if "@" in path:
        return from_repository(path)
    package = package_of(path)
    try:
        found = version(package)
    except PackageNotFoundError:
        pytest.fail(f"{package} is not installed: run `make test-conformance`")
    wanted = VERSIONS[package]
    if found != wanted:
        pytest.fail(f"{package} is {found}, but packages.txt has {wanted}: run `make test-conformance`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages announce when they are imported
        return pkgutil.resolve_name(path)


def from_repository(path: str) -> Any:
    """One function of a file in a git repository, compiled alone: the file's imports are not needed.

    Names that it reads are those of its file's other functions, torch, and verl's helpers, from which such files start.
    """
    repository, commit, file, name = path.replace("@", ":").split(":")
    folder = os.environ.get("OFFICIAL_CODE")
    if not folder:
        pytest.skip(
            f"papers' code is in no package: clone github.com/{repository} into a folder, OFFICIAL_CODE=FOLDER make ..."
        )
    where = Path(folder) / repository.rpartition("/")[2]
    command = ["git", "-C", str(where), "show", f"{commit}:{file}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if shown.returncode:
        pytest.fail(f"{' '.join(command)}: {shown.stderr.strip()}")
    tree = ast.parse(shown.stdout)
    (wanted,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    used = {node.id for node in ast.walk(wanted) if isinstance(node, ast.Name)}
    beside = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in used - {name}]
    functions = [*beside, wanted]
    for function in functions:
        function.decorator_list, function.returns = [], None
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            argument.annotation = None
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    if file.startswith("verl/"):
        names["verl_F"] = load("verl.utils.torch_functional:")
        names["agg_loss"] = load("verl.trainer.ppo.core_algos:agg_loss")
    exec(compile(ast.Module([*functions], []), file, "exec"), names)
    return names[name]
