"""Common parts of the testers: laws as methods, and their checks."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from opdlab.errors import UsageError

Law = Callable[[], None]
T = TypeVar("T", bound="LawTester")


NO_PATH = "the class has no importable path, since it was defined inside a function or in a notebook"
"""Why ``yaml_round_trip`` is left out."""


class LawTester:
    """Base of testers: methods marked with :func:`law` are the laws, in the order of their definition."""

    def subject(self) -> object:
        """Return the plug-in that messages name."""
        raise NotImplementedError

    def laws(self) -> list[tuple[str, Law]]:
        """Return (name, law) for each law that applies; a law is called without arguments and raises if broken."""
        own = {name: value for cls in reversed(type(self).__mro__) for name, value in vars(cls).items()}
        return [(name, getattr(self, name)) for name, value in own.items() if hasattr(value, "is_law")]

    def left_out(self) -> dict[str, str]:
        """Return the laws that do not apply, each with the reason."""
        return {}

    def run(self) -> None:
        """Check every law, and print a line for each: those that hold, and those that do not apply.

        Raises:
            AssertionError: a law is broken; the message names the law, the plug-in and the values.
        """
        laws = self.laws()
        for name, each in laws:
            each()
            print(f"passed    {name}")
        left_out = self.left_out()
        for name, reason in left_out.items():
            print(f"left out  {name}: {reason}")
        rest = f", {len(left_out)} left out" if left_out else ""
        print(f"{type(self.subject()).__name__}: {len(laws)} laws passed{rest}")

    def _build(self, make: Callable[[], object], tester: str, argument: str, example: str) -> None:
        """Raise a UsageError if a function that builds the plug-in needs arguments."""
        try:
            make()
        except TypeError as error:
            raise UsageError(
                f"{tester} calls {argument} without arguments, which fails ({error}): give a function, for example "
                f"{tester}(lambda: {example})"
            ) from error


def law(method: Callable[[T], None]) -> Callable[[T], None]:
    """Mark a method of a tester as a law; its failures name the law and the plug-in."""

    @functools.wraps(method)
    def checked(self: T) -> None:
        try:
            method(self)
        except Exception as error:
            seen = str(error) if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {error}"
            raise AssertionError(f"law '{method.__name__}' does not hold for {self.subject()!r}: {seen}") from error

    checked.is_law = True  # type: ignore[attr-defined]
    return checked


def check(holds: bool, seen: str) -> None:
    """Raise an AssertionError with what was seen, unless the check holds."""
    if not holds:
        raise AssertionError(seen)


def check_equal(what: str, seen: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Check that two tensors of two dimensions agree: absolutely below 1, relatively above; NaN is never equal."""
    check(seen.shape == expected.shape, f"{what} shape {list(seen.shape)} instead of {list(expected.shape)}")
    wrong = ~((seen.double() - expected.double()).abs() <= tolerance * expected.double().abs().clamp(min=1))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        values = f"{seen[row, column].item()} instead of {expected[row, column].item()}"
        raise AssertionError(f"{what} at row {row}, column {column}: {values} ({int(wrong.sum())} positions differ)")


def class_path(cls: type) -> str | None:
    """Return the class path of an importable class, or None."""
    module = sys.modules.get(cls.__module__)
    found = cls.__module__ != "__main__" and getattr(module, cls.__qualname__, None) is cls
    return f"{cls.__module__}.{cls.__qualname__}" if found else None


def yaml_copy(plugin: Any, base: type, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the plug-in written to YAML (``class_path``, ``init_args``) and read again, and the YAML."""
    path = class_path(type(plugin))
    check(path is not None, f"no class path leads to {type(plugin).__qualname__}")
    text = yaml.safe_dump({"plugin": {"class_path": path, "init_args": dict(arguments)}})
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "plugin")
    # jsonargparse 4.49 renamed it.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    copy = instantiate(parser.parse_string(text))["plugin"]
    check(type(copy) is type(plugin), f"{path} was read as a {type(copy).__qualname__}")
    return copy, text
