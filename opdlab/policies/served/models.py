"""The model that a server serves under a name."""

import json
from collections.abc import Mapping
from typing import Any

from opdlab.errors import require
from opdlab.policies.served.connection import Ask, BadAnswerError, Servers
from opdlab.policies.served.wire import MODELS_PATH
from opdlab.registry import suggestion


def find_model(servers: Servers, index: int, wanted: str | None, key: str, kind: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the model on a server, and what the server says of it.

    Args:
        servers: the servers.
        index: of the server that is asked.
        wanted: the model's name there; None for the only one.
        key: of the configuration, which gives ``wanted``; for messages.
        kind: what the server must be, in words; for messages.

    Raises:
        UsageError: the server does not answer, is of another kind, or has no such model.
    """
    mend = f"give the URL of {kind} in {key}.url"

    def read(content: bytes) -> dict[str, dict[str, Any]]:
        try:
            models = {str(each["id"]): each for each in json.loads(content)["data"]}
        except (ValueError, KeyError, TypeError):
            models = {}
        if not models:
            raise BadAnswerError(f"it lists no models: {mend}")
        return models

    models, url = servers.ask(Ask(MODELS_PATH, read, server=index, why=f": {mend}")), servers.urls[index]
    if wanted is None:
        require(
            len(models) == 1, f"{url} serves {len(models)} models, {', '.join(models)}: name one of them in {key}.model"
        )
    name = next(iter(models)) if wanted is None else wanted
    require(
        name in models,
        f"{key}.model is '{name}', but {url} serves {', '.join(models)}{suggestion(name, models) or ';'} "
        "give one of them, or leave model out",
    )
    return name, models[name]
