"""Synthetic rollouts for the tests of the viewer, and a parser of the page's data that is independent of its script."""

import base64
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from opdlab.rollouts import StopReason
from opdlab.viewer import RolloutText, ShownRollout

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    "![](http://evil.test/x.png)",
    "[link](javascript:alert(1))",
    "]]>",
    "<!--",
    "--><script>window.hacked = 4</script>",
    "```",
    "# title",
    "\n\n# title after a gap\n\n```\n</code></pre><script>window.hacked = 5</script>",
    "\ud800",
    "\u202eright to left\u202c",
    "\x00\x02wzxhzdk:0\x03",
    "\u2028\u2029",
    "&lt;b&gt;&amp;",
    "{{ 7 * 7 }}{% raw %}",
    "${1}`",
    "\t\r",
    "漢字🙂",
    "",
]


def shown(length: int, seed: int = 0, block: int = 4, **changed: Any) -> ShownRollout:
    """A rollout with random values and segments of ``block`` positions."""
    generator = torch.Generator().manual_seed(seed)
    student, behavior, teacher, loss = torch.randn(4, length, generator=generator).unbind()
    segments = torch.arange(length, dtype=torch.int32) // block
    per_segment = torch.rand(length // block + 1, generator=generator)[segments]
    fields: dict[str, Any] = {
        "rank": 0,
        "num_ranked": 8,
        "rollout_id": 40 + seed,
        "prompt_id": 0,
        "prompt_tokens": torch.arange(3),
        "tokens": torch.randint(0, 150_000, (length,), generator=generator, dtype=torch.int32),
        "mask": torch.ones(length, dtype=torch.bool),
        "segment_ids": segments,
        "values": {
            "drift": student - behavior,
            "weight": per_segment,
            "student_logprob": student,
            "behavior_logprob": behavior,
            "teacher_logprob": teacher,
            "teacher_gap": teacher - student,
            "position_loss": loss,
        },
        "stop_reason": StopReason.EOS,
        "correct": True,
        "age": 3,
        "reuse_epoch": 1,
    }
    return ShownRollout(**{**fields, **changed})


def plain_text(texts: list[str], prompt: str = "prompt") -> RolloutText:
    return RolloutText(prompt, texts, [False] * len(texts))


class Tags(HTMLParser):
    """The tags of a page, and what stands in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.cdata_elem == "script":
            self.scripts.append(data)


def page_data(page: str | Path) -> dict[str, Any]:
    """The JSON of a page, with each rollout's columns as lists."""
    text = page.read_text() if isinstance(page, Path) else page
    data: dict[str, Any] = json.loads(Tags(text).scripts[0], parse_constant=_refuse)
    for rollout in data["rollouts"]:
        runs = _unpacked("i", rollout["runs"])
        rollout["ids"] = _unpacked("i", rollout["ids"])
        rollout["segments"] = _repeated(_unpacked("i", rollout["segments"]), runs)
        for name, packed in rollout["values"].items():
            if isinstance(packed, str):
                rollout["values"][name] = _unpacked("f", packed)
            else:
                rollout["values"][name] = _repeated(_unpacked("f", packed["runs"]), runs)
    return data


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _unpacked(kind: str, text: str) -> list[Any]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}{kind}", raw))


def _repeated(values: list[Any], counts: list[int]) -> list[Any]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
