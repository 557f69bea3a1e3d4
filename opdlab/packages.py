"""Checks of optional packages: one line with the fix if a package is missing, broken, or has a wrong version."""

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from opdlab.errors import UsageError, first_line

# Names in transformers that hold the lowest supported version. A name that no longer exists is skipped.
_LOWEST = {
    "accelerate": ("transformers.utils.import_utils", "ACCELERATE_MIN_VERSION"),
    "bitsandbytes": ("transformers.utils.import_utils", "BITSANDBYTES_MIN_VERSION"),
    "gguf": ("transformers.utils.import_utils", "GGUF_MIN_VERSION"),
    "peft": ("transformers.integrations.peft", "MIN_PEFT_VERSION"),
}
# Modules whose distribution name differs by more than underscores.
_DISTRIBUTIONS = {"PIL": "pillow", "google": "protobuf", "sklearn": "scikit-learn", "yaml": "pyyaml"}
_REQUIREMENT = re.compile(r"Requirement '([^']+)' not met")  # lightning_utilities' RequirementCache
_COMMAND = re.compile(r"pip install (?:-U |--upgrade )?(?:'[^']+'|\"[^\"]+\"|[\w\-.\[\],<>=~!]*[\w\]])")


def require_package(name: str, why: str, extra: str) -> None:
    """Import an optional package, or raise :class:`UsageError`.

    Args:
        name: name of its module, which is also the name of its distribution.
        why: the key or file that needs it; the message begins with it.
        extra: the extra of opdlab that installs it.

    Raises:
        UsageError: the package is missing, cannot be imported, or transformers requires another version.

    Example:
        >>> require_package("no_such_package", "model.student.adapter", "peft")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: model.student.adapter needs no-such-package, which is not installed: pip install
        'opdlab[peft]'
    """
    command = f"pip install 'opdlab[{extra}]'"
    if not is_installed(name):
        raise UsageError(f"{why} needs {_distribution(name)}, which is not installed: {command}")
    try:
        import_module(name)
    except Exception as error:  # libraries that cannot be loaded raise OSError, RuntimeError, …
        missing = isinstance(error, ModuleNotFoundError) and (error.name or name).partition(".")[0] != name
        mend = command if missing else f"pip install --force-reinstall --no-deps {name}"
        said = f"importing {name} {_version(name)} fails ({first_line(error)})"
        raise UsageError(f"{why} needs {name}, but {said}: {mend}") from error
    if (reason := refusal(name)) is not None:
        raise UsageError(f"{why}: {reason}: {command}, which takes a pair that works")


def is_installed(name: str) -> bool:
    """True if a module can be found; a folder of the same name, such as ``wandb/`` with runs, does not count."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # ValueError: an entry of sys.modules without a spec
        return False
    return spec is not None and spec.origin is not None


def refusal(name: str) -> str | None:
    """Return why transformers rejects the installed version of a package, or None.

    Example:
        >>> refusal("torch") is None  # transformers keeps no lowest version of it where opdlab looks
        True
    """
    lowest = None
    with suppress(ImportError, AttributeError, KeyError):
        module, constant = _LOWEST[name]
        lowest = str(getattr(import_module(module), constant))
    return _refused(name, lowest) if lowest is not None else None


def _refused(name: str, lowest: str) -> str | None:
    installed = _version(name)
    with suppress(InvalidVersion):
        if installed and Version(installed) < Version(lowest):
            return f"transformers {_version('transformers')} refuses {name} {installed} (it asks for {lowest} or newer)"
    return None


@contextmanager
def working_pair(name: str, why: str, extra: str) -> Iterator[None]:
    """Require a package, and raise one clear error if transformers and the package fail together inside the block.

    :func:`require_package` compares versions through a private name of transformers, which may disappear. Two versions
    may also satisfy the comparison and still not work together.

    Args:
        name: see :func:`require_package`.
        why: see :func:`require_package`.
        extra: see :func:`require_package`.

    Raises:
        UsageError: as :func:`require_package`; or the block fails because a name is missing or a version is rejected.
    """
    require_package(name, why, extra)
    try:
        yield
    except UsageError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        line = first_line(error)
        if isinstance(error, ValueError) and not ("version" in line and name in line.lower()):
            raise
        lowest = re.search(r">= ?(\d[\w.]*)", line)
        reason = _refused(name, lowest[1].rstrip(".")) if lowest else None
        pair = f"transformers {_version('transformers')} and {name} {_version(name)}"
        reason = reason or f"{pair} do not work together ({line})"
        raise UsageError(f"{why}: {reason}: pip install 'opdlab[{extra}]', which takes a pair that works") from error


def package_trouble(error: BaseException) -> str | None:
    """Return the message of the failed import that caused an error, with the command that fixes it, or None.

    Args:
        error: the error; its causes are searched too.

    Example:
        >>> package_trouble(ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package"))
        'needs no-such-package, which is not installed: pip install no-such-package'
        >>> package_trouble(ImportError("Using X requires Y: `pip install 'Y>=2'`"))
        "needs a package (Using X requires Y): pip install 'Y>=2'"
    """
    seen: list[BaseException] = []  # `raise error from error` makes a cycle
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, ImportError) and (said := _message(cause)) is not None:
            return said
        seen.append(cause)
        cause = cause.__cause__
    return None


def _message(error: ImportError) -> str | None:
    """Return the message for a failed import, with the command that fixes it; None if its cause is unknown."""
    top = (error.name or "").partition(".")[0]
    if top == "opdlab":  # a bug in opdlab
        return None
    line = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and top and not is_installed(top):
        missing, required = _distribution(top), []
        with suppress(importlib.metadata.PackageNotFoundError):  # opdlab is read from a checkout
            required = [line for line in importlib.metadata.requires("opdlab") or [] if "extra ==" not in line]
        wanted = "opdlab" if any(Requirement(line).name == missing for line in required) else missing
        return f"needs {missing}, which is not installed: pip install {wanted}"
    with suppress(TypeError, InvalidRequirement):
        requirement = Requirement(_REQUIREMENT.search(line)[1])  # type: ignore[index] # TypeError if nothing matches
        if (installed := _version(requirement.name)) is None:
            return f"needs {requirement.name}, which is not installed: pip install {requirement.name}"
        return f"needs {requirement}, but {installed} is installed: pip install -U '{requirement}'"
    if command := _COMMAND.search(line):
        reason = line[: command.start()].rstrip(" `:'\"")
        return f"needs a package ({reason}): {command[0]}"
    installed = _version(top) if top else None
    if installed is None:
        return None
    return f"needs {top}, but importing {top} {installed} fails ({line}): pip install --upgrade {_distribution(top)}"


def _distribution(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module.replace("_", "-"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(_distribution(name))
    except importlib.metadata.PackageNotFoundError:
        return None
