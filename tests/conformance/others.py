"""Functions of other packages that opdlab's are compared with: one decorator names the package and its function."""

import pkgutil
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pytest

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
    return path.partition(".")[0].replace("_", "-")


def against(*paths: str) -> Callable[[F], F]:
    """Run a test once for each function, which it gets as ``other``; `make test-conformance` alone runs these tests.

    The test's id has package, version and function.
    """
    ids = [f"{package_of(path)} {VERSIONS[package_of(path)]} {path}" for path in paths]

    def decorate(test: F) -> F:
        return pytest.mark.conformance(pytest.mark.parametrize("other", paths, ids=ids, indirect=True)(test))

    return decorate


def load(path: str) -> Any:
    """The function, from the version of its package that packages.txt names; the test fails without it."""
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
