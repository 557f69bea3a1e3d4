"""The page of a logged step: one file that loads no other file."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from opdlab.files import replacing
from opdlab.types import Problem
from opdlab.viewer.page_summary import PageSummary, read_summary, summarize
from opdlab.viewer.rollouts import ShownRollout
from opdlab.viewer.token_colors import color_scale, quantities

INDEX = "index.html"
_PAGE = re.compile(r"step-(\d{6,})\.html")
_LINKS = re.compile(rb"<!--steps-->.*\n")  # in the head, before any text of a model
_DIFFERENCES = {"drift": ("student_logprob", "behavior_logprob"), "teacher_gap": ("teacher_logprob", "student_logprob")}


@dataclass(frozen=True)
class RolloutText:
    """Text of a rollout.

    Args:
        prompt: decoded, special tokens included.
        tokens: T texts, see :func:`opdlab.viewer.token_texts`.
        special: T flags: True for special tokens.
        problem: source of the prompt, if it is known.
    """

    prompt: str
    tokens: Sequence[str]
    special: Sequence[bool]
    problem: Problem | None = None


def render_page(
    step: int, rollouts: Sequence[ShownRollout], texts: Sequence[RolloutText], facts: dict[str, str] | None = None
) -> str:
    """Return the HTML page of a step.

    Text of models is in a JSON block, in which no markup can begin, and is inserted as text nodes. The page's policy
    forbids every request, and every script and style except its own.

    Args:
        step: optimizer steps taken.
        rollouts: shown on the page; they all have the same quantities.
        texts: of each.
        facts: of the run, for the head of the page, by name.
    """
    known = {
        "step": step,
        "facts": facts or {},
        "summary": summarize(rollouts, facts or {}).as_dict(),
        "data": _page_data(rollouts, texts),
    }
    return _environment().get_template("page.html").render(**_assets(), **known)


def render_index(pages: Mapping[int, PageSummary], run: str) -> str:
    """Return the HTML page that lists the others, with the facts of the newest page that has any.

    Args:
        pages: summary of each page, by step, ascending.
        run: name of the run.
    """
    columns = list(dict.fromkeys(name for page in pages.values() for name in page.metrics))
    facts = next((page.facts for page in reversed(list(pages.values())) if page.facts), {})
    known = {"pages": pages, "columns": columns, "facts": facts, "run": run}
    return _environment().get_template("index.html").render(**_assets(), **known)


def page_name(step: int) -> str:
    """Return the name of a step's file; up to a million steps, names sort in the order of the steps.

    Example:
        >>> page_name(200)
        'step-000200.html'
    """
    return f"step-{step:06d}.html"


def write_page(folder: Path, step: int, page: str) -> Path:
    """Write a page, link it with its neighbours, and update the index. Files are replaced atomically.

    Args:
        folder: of the run's pages; created if missing.
        step: of the page; an earlier page of the same step is replaced.
        page: see :func:`render_page`.

    Returns:
        Path of the page.

    Raises:
        OSError: the folder cannot be written.
        FullDiskError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / page_name(step), page.encode())
    steps = sorted(int(match[1]) for file in folder.iterdir() if (match := _PAGE.fullmatch(file.name)))
    place = steps.index(step)
    for index in range(max(place - 1, 0), min(place + 2, len(steps))):
        _link(folder, steps, index)
    pages = {each: read_summary(folder / page_name(each)) for each in steps}
    _replace(folder / INDEX, render_index(pages, folder.absolute().parent.name).encode("utf-8", "replace"))
    return folder / page_name(step)


def _link(folder: Path, steps: Sequence[int], index: int) -> None:
    """Link a page's neighbours in its head."""
    neighbours = {
        "prev": steps[index - 1] if index else None,
        "next": steps[index + 1] if index + 1 < len(steps) else None,
    }
    links = [f'<link rel="{side}" href="{page_name(step)}">' for side, step in neighbours.items() if step is not None]
    path = folder / page_name(steps[index])
    content = path.read_bytes()
    linked = _LINKS.sub(f"<!--steps-->{''.join(links)}\n".encode(), content, count=1)
    if linked != content:
        _replace(path, linked)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


# -- what the script of the page unpacks ----------------------------------------------------------------------------


def _page_data(rollouts: Sequence[ShownRollout], texts: Sequence[RolloutText]) -> dict[str, Any]:
    shown = []
    for quantity in quantities(list(rollouts[0].values)) if rollouts else []:
        values = torch.cat([rollout.values[quantity.name][rollout.mask] for rollout in rollouts])
        shown.append({**asdict(quantity), **asdict(color_scale(values, quantity.neutral))})
    return {"quantities": shown, "rollouts": [_packed(*pair) for pair in zip(rollouts, texts, strict=True)]}


def _packed(rollout: ShownRollout, text: RolloutText) -> dict[str, Any]:
    segments, lengths = torch.unique_consecutive(rollout.segment_ids, return_counts=True)
    return {
        "id": rollout.rollout_id,
        "rank": rollout.rank,
        "num_ranked": rollout.num_ranked,
        "mean_drift": f"{rollout.mean_drift:.3g} nats",
        "prompt": text.prompt,
        "gold": text.problem and text.problem.answer,
        "correct": rollout.correct,
        "stop": rollout.stop_reason.name.lower(),
        "age": rollout.age,
        "reuse_epoch": rollout.reuse_epoch,
        "texts": list(text.tokens),
        "special": [index for index, special in enumerate(text.special) if special],
        "ids": _base64(rollout.tokens),
        "segments": _base64(segments),  # -1: not in the loss
        "runs": _base64(lengths),  # of positions of one segment
        "values": {name: _packed_column(name, rollout, lengths) for name in rollout.values},
    }


def _packed_column(name: str, rollout: ShownRollout, lengths: Tensor) -> Any:
    """Return a packed column without the values that the page computes exactly."""
    column = rollout.values[name]
    if name in _DIFFERENCES and all(part in rollout.values for part in _DIFFERENCES[name]):
        one, other = (rollout.values[part] for part in _DIFFERENCES[name])
        if torch.equal((one - other)[rollout.mask], column[rollout.mask]):
            return {"minus": _DIFFERENCES[name]}
    heads = column[lengths.cumsum(0) - lengths]
    if len(heads) < len(column) and torch.equal(heads.repeat_interleave(lengths), column):
        return {"runs": _base64(heads)}
    return _base64(column)


def _base64(tensor: Tensor) -> str:
    """Return base64 of four bytes per number, little-endian: exact for all values, and shorter than digits."""
    kind = "<f4" if tensor.is_floating_point() else "<i4"
    return base64.b64encode(tensor.numpy().astype(kind).tobytes()).decode("ascii")


# -- templates ------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("opdlab.viewer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` escapes <, >, & and ' as \\u003c …, and all non-ASCII characters: U+2028, lone surrogates.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals["page_name"] = page_name
    return environment


@cache
def _assets() -> dict[str, str]:
    """Return style, script, and the policy that allows only these two."""
    loader = _environment().loader
    assert loader is not None
    css, js = (loader.get_source(_environment(), name)[0] for name in ("page.css", "page.js"))
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    sources = zip(("style-src", "script-src"), hashes, strict=True)
    allowed = "".join(f"; {kind} 'sha256-{value}'" for kind, value in sources)
    policy = f"default-src 'none'{allowed}; base-uri 'none'; form-action 'none'"
    return {"css": Markup(css), "js": Markup(js), "policy": Markup(policy)}
