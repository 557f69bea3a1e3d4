"""Model card of a distilled student: inputs, settings and results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented, yet not in its __all__

from opdlab.version import __version__

_MAX_TEXT = 300  # characters of external text


@dataclass(frozen=True)
class TrainingRecord:
    """Content of a model card.

    Args:
        student: path or hub id of the initial student.
        teacher: path or hub id, or the class of a teacher without one.
        data: name of the source of training prompts.
        settings: objective, gate, steps, …, by the name shown on the card.
        results: columns of formatted metrics, for example ``before`` and ``after``.
        config: name of the configuration file in the same folder, or None.
    """

    student: str
    teacher: str
    data: str
    settings: Mapping[str, str]
    results: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config: str | None = None


def describe(part: object) -> str:
    """Return the class of a plug-in with those of its options that are plain values.

    Example:
        >>> from opdlab.objectives import TeacherTopK
        >>> describe(TeacherTopK(k=8))
        'TeacherTopK(k=8)'
    """
    plain = (str, int, float, type(None))
    options = {k: v for k, v in vars(part).items() if not k.startswith("_") and isinstance(v, plain)}
    options.pop("training", None)  # of torch modules
    return f"{type(part).__name__}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def escaped(text: str) -> str:
    r"""Return the text escaped for one line of Markdown, without active markup, links, HTML or table borders.

    Any ASCII punctuation may be escaped with a backslash (CommonMark 0.31, 2.4).

    Example:
        >>> print(escaped("a|b\n<script>*x*"))
        a\|b \<script\>\*x\*
    """
    line = " ".join(text.split())
    if len(line) > _MAX_TEXT:
        line = line[:_MAX_TEXT] + "…"
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@:])", r"\\\1", line)


def is_hub_id(path: str) -> bool:
    """True if ``path`` is a well-formed hub id and no local folder has that name.

    Example:
        >>> is_hub_id("Qwen/Qwen3-4B"), is_hub_id("package://opdlab.toy/models/student"), is_hub_id(".")
        (True, False, False)
    """
    return hub_id_error(path) is None and path.count("/") == 1 and not Path(path).exists()


def hub_id_error(name: str) -> str | None:
    """Return why ``name`` is not a valid hub id, or None.

    Example:
        >>> hub_id_error("me/student")
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def model_card(name: str, record: TrainingRecord) -> ModelCard:
    """Return the model card, without network access.

    Args:
        name: name of the model.
        record: content of the card.

    Example:
        >>> record = TrainingRecord("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "prompts.jsonl", {"gate": "NoGate()"})
        >>> model_card("mine", record).data.base_model
        'Qwen/Qwen3-0.6B'
    """
    metadata = ModelCardData(
        base_model=record.student if is_hub_id(record.student) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["opdlab", "on-policy-distillation", "distillation"],
    )
    rows = {"student": record.student, "teacher": record.teacher, "training prompts": record.data, **record.settings}
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {escaped(name)}\n",
        "A language model distilled on-policy: it sampled its own answers, and a frozen teacher scored each of their "
        f"tokens. Made with opdlab {__version__}.\n",
        "## Training\n",
        _table(["", ""], [[key, escaped(value)] for key, value in rows.items()]),
    ]
    if record.config is not None:
        parts += [f"To repeat it: `opdlab fit -c {record.config}`, with the file of that name in this folder.\n"]
    if record.results:
        metrics = dict.fromkeys(name for column in record.results.values() for name in column)
        lines = [[name, *(column.get(name, "") for column in record.results.values())] for name in metrics]
        cells = [list(map(escaped, line)) for line in lines]
        parts += ["## Results\n", _table(["metric", *map(escaped, record.results)], cells)]
    return ModelCard("\n".join(parts))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
