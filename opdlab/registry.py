"""Registry of plug-ins by name: a decorator that registers a class, and a lookup that suggests the nearest name."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from opdlab.errors import UsageError, first_line

T = TypeVar("T")
C = TypeVar("C", bound=type)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known name, or an empty string.

    Example:
        >>> suggestion("blok64", ["block64", "span"])
        "; did you mean 'block64'?"
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _options_of(cls: type) -> set[str]:
    """Return the keyword arguments of a class, with those that it passes on to its bases through ``**options``."""
    names: set[str] = set()
    for each in cls.__mro__:
        if "__init__" in vars(each):
            parameters = list(inspect.signature(each.__init__).parameters.values())[1:]  # type: ignore[misc]
            names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return names


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: name of the kind in messages, for example ``gate``.
        base: the class that every entry must extend.
        builtin: the module whose import registers the built-in entries. They register like third-party plug-ins. They
            are imported on the first lookup, so this package does not depend on them.
        entry_point_group: installed packages that declare this entry-point group are imported on the first lookup.
    """

    def __init__(self, kind: str, base: type[T], builtin: str, entry_point_group: str) -> None:
        self.kind = kind
        self._base = base
        self._builtin = builtin
        self._group = entry_point_group
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that registers the class as ``name``."""

        def decorate(cls: C) -> C:
            if not issubclass(cls, self._base):
                raise UsageError(f"{self.kind} '{name}': {cls.__name__} must extend {self._base.__name__}")
            known: type | None = self._classes.get(name)
            # A notebook cell that runs again redefines the class under the same qualified name, and replaces it.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UsageError(
                    f"{self.kind} '{name}' is registered already, by {known.__module__}.{known.__qualname__}: "
                    "choose another name"
                )
            self._classes[name] = cls
            return cls  # type: ignore[return-value] # issubclass narrows the type, but the class is returned as given

        return decorate

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """Return the class registered as ``name``; raise :class:`UsageError` with the nearest name otherwise."""
        self._load()
        if name not in self._classes:
            known = self.names()
            hint = suggestion(name, known) or ";"
            raise UsageError(f"unknown {self.kind} '{name}'{hint} registered: {', '.join(known)}")
        return self._classes[name]

    def name_of(self, cls: type) -> str | None:
        """Return the name under which ``cls`` is registered, or None."""
        self._load()
        return next((name for name, known in self._classes.items() if known is cls), None)

    def build(self, name: str, **options: Any) -> T:
        """Return an instance of the class registered as ``name``; raise :class:`UsageError` for an unknown option."""
        cls = self.get(name)
        try:
            return cls(**options)
        except TypeError as error:
            found = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
            if found is None or found[1] not in options:
                raise
            known = sorted(_options_of(cls) - {found[1]})
            raise UsageError(
                f"{self.kind} '{name}' has no option '{found[1]}'{suggestion(found[1], known) or ';'} its options: "
                f"{', '.join(known) or 'none'}"
            ) from error

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports, because they call this registry
        try:
            import_module(self._builtin)
            for entry in entry_points(group=self._group):
                try:
                    entry.load()
                except (Exception, SystemExit) as error:
                    package = entry.dist.name if entry.dist is not None else "a package"
                    raise UsageError(
                        f"{package} declares the {self.kind} '{entry.name}', but importing {entry.value} fails "
                        f"({type(error).__name__}: {first_line(error)}): mend or uninstall it"
                    ) from error
        except BaseException:
            self._loaded = False  # an incomplete registry would report known names as unknown
            raise
