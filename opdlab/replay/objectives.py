"""The objectives of a replay."""

from collections.abc import Sequence

from opdlab.objectives import Objective, objective_registry
from opdlab.replay.plugins import Named, plugin_class, with_defaults


def objective_class(name: str) -> type[Objective]:
    """Return the objective class of a registered name or class path; see :func:`plugin_class`."""
    return plugin_class("--objectives", name, objective_registry(), Objective)  # type: ignore[type-abstract]


def chosen_objectives(chosen: Sequence[str | Named[Objective]], own: Objective) -> list[Named[Objective]]:
    """Return the run's own objective, and then the others; one of its class without options is the run's own.

    Args:
        chosen: registered names or class paths, whose options are the defaults; or objectives with options.
        own: the run's.

    Raises:
        UsageError: a name is unknown, or its class needs options.
    """
    registry = objective_registry()
    found = {"": Named(registry.name_of(type(own)) or type(own).__name__, own)}
    for each in chosen:
        if isinstance(each, str):
            cls = objective_class(each)
            if cls is not type(own):
                name = registry.name_of(cls) or cls.__name__
                found[name] = Named(name, with_defaults("--objectives", each, cls))
        elif type(each.plugin) is not type(own) or _options(each.plugin) != _options(own):
            found[each.name] = each
    return list(found.values())


def _options(objective: Objective) -> dict[str, object]:
    return {name: value for name, value in vars(objective).items() if name[0] != "_"}
