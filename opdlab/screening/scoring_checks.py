"""Checks of tokens, prompts and the teacher's scores: whether both models mean the same by a position."""

from collections.abc import Sequence

from opdlab.screening.measure import Measurements
from opdlab.screening.pair import Missing
from opdlab.screening.thresholds import LIMITS, Verdict
from opdlab.screening.verdicts import Check, checked, unmeasured, worse

_MISMATCH = 0.1  # nats, between two ways to the same log-probability


def scoring_checks(found: Measurements) -> list[Check]:
    """Return the checks of tokens, prompts and scores."""
    return [
        _tokenizer(found),
        _stop_tokens(found),
        _context(found),
        _padding(found),
        _chat_template(found),
        _first_token(found),
        _thinking(found),
        _alignment(found),
        _temperature(found),
    ]


def _nats(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero


def _texts(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens)) or "none"


def _tokenizer(found: Measurements) -> Check:
    tokens = found.tokens
    finding = f"{tokens.student} tokens of the student, all the same for the teacher; both can give {tokens.shared}"
    if tokens.unknown:
        finding += f"; {tokens.unknown:.0%} of the training prompts have characters that the tokenizer does not know"
    verdict = LIMITS["tokenizer"].verdict(tokens.unknown)
    if tokens.shared < tokens.student:
        verdict = worse(verdict, "look")
    mend = "change these texts or leave them out; a token that a model has no row for is never sampled"
    return checked("tokenizer", tokens.unknown, finding, mend, verdict=verdict)


def _stop_tokens(found: Measurements) -> Check:
    stops = found.stops
    if isinstance(stops, Missing):
        return unmeasured("stop_tokens", stops)
    finding = f"the student's answers end with {_texts(stops.student)}, the teacher's with {_texts(stops.teacher)}"
    if stops.unheard:
        finding += f"; the student does not stop at {_texts(stops.unheard)}"
    number = float(len(stops.unheard))
    verdict = worse(LIMITS["stop_tokens"].verdict(number), "look" if stops.unlike else "good")
    mend = "set eos_token_id in generation_config.json of both models to the same tokens"
    return checked("stop_tokens", number, finding, mend, verdict=verdict)


def _context(found: Measurements) -> Check:
    context = found.context
    if isinstance(context, Missing):
        return unmeasured("context", context)
    number = max(tokens / positions for tokens, positions in context.values())
    said = ", ".join(
        f"{positions} positions of the {name} for {tokens}" for name, (tokens, positions) in context.items()
    )
    finding = f"the longest prompt with the longest answer: {said} tokens"
    mend = "lower max_new_tokens or data.max_prompt_tokens: what a model says beyond its positions may be worth little"
    return checked("context", number, finding, mend)


def _padding(found: Measurements) -> Check:
    if isinstance(found.padding, Missing):
        return unmeasured("padding", found.padding)
    finding = (
        f"8 more padding tokens {found.tokens.padding!r} before the prompts change log-probabilities by "
        f"{found.padding:.2g} nats in the mean"
    )
    mend = "a model that looks at padding scores other tokens than were sampled: take its newest code, or batch_size 1"
    return checked("padding", found.padding, finding, mend)


def _chat_template(found: Measurements) -> Check:
    templates, first = found.templates, found.first_token
    if isinstance(templates, Missing):
        return unmeasured("chat_template", templates)
    if templates.differing is None:
        verdict: Verdict = "look" if templates.student else "good"
        has = "but the student's has one" if templates.student else "and neither has the student's"
        finding, mend = (
            f"the teacher's tokenizer has no chat template, {has}",
            "check that the teacher knows the prompts",
        )
        return checked("chat_template", 0.0, finding, mend, verdict=verdict)
    if isinstance(first, Missing) or first.own_logprob is None:
        return unmeasured("chat_template", first if isinstance(first, Missing) else Missing("no prompt"))
    number = first.own_logprob - first.logprob
    finding = (
        f"the teacher's own template makes {templates.differing:.0%} of the prompts differently; after its own, the "
        f"first token of the student's answers has rank {first.own_rank:g} and {number:+.2f} nats of log-probability"
    )
    mend = (
        "give the student the teacher's template (data.train.template), or the teacher a prompt of its own "
        "(data.train.teacher_template)"
    )
    return checked("chat_template", number, finding, mend)


def _first_token(found: Measurements) -> Check:
    first = found.first_token
    if isinstance(first, Missing):
        return unmeasured("first_token", first)
    rank = f"{first.rank:g}" if first.rank <= first.support else f"above {first.support}"
    finding = (
        f"the first token of the student's answers has median rank {rank} for the teacher, and a log-probability of "
        f"{_nats(first.logprob)} (the student's {_nats(first.student_logprob)})"
    )
    mend = "compare prompts and templates: the teacher would begin otherwise; see chat template and thinking markers"
    return checked("first_token", first.student_logprob - first.logprob, finding, mend)


def _thinking(found: Measurements) -> Check:
    templates = found.templates
    if isinstance(templates, Missing):
        return unmeasured("thinking", templates)
    if templates.differing is None:
        markers = templates.run_markers
        finding = f"markers at the end of the prompts: {_texts(markers)}; the teacher has no template to compare with"
        verdict: Verdict = "look" if markers else "good"
        return checked("thinking", 0.0, finding, "check that the teacher thinks too", verdict=verdict)
    ours, theirs = list(templates.run_markers), list(templates.own_markers)
    number = float(len(set(ours) ^ set(theirs)))
    finding = f"markers at the end of the prompts: {_texts(ours)}; by the teacher's own template: {_texts(theirs)}"
    mend = "set enable_thinking of opdlab.data.ChatTemplate so that both agree, or take a teacher that thinks likewise"
    return checked("thinking", number, finding, mend)


def _alignment(found: Measurements) -> Check:
    alignment = found.alignment
    if isinstance(alignment, Missing):
        return unmeasured("alignment", alignment)
    greedy = "the teacher's own greedy answers" if alignment.whose == "teacher" else "the student's answers"
    finding = (
        f"{greedy} have {_nats(alignment.here)} nats a token at their own positions, "
        f"{_nats(alignment.before)} moved by -1 and {_nats(alignment.after)} by +1"
    )
    verdict = LIMITS["alignment"].verdict(alignment.margin)
    if not alignment.mismatch <= _MISMATCH:
        verdict = "bad"
        finding += f"; scores of the same token differ by {alignment.mismatch:.2g} nats between answer and support"
    mend = "the teacher scores other positions than it is given: mend its score method, or the server behind it"
    return checked("alignment", alignment.margin, finding, mend, verdict=verdict)


def _temperature(found: Measurements) -> Check:
    if isinstance(found.temperature, Missing):
        return unmeasured("temperature", found.temperature)
    temperature, number = found.temperature
    finding = f"the teacher's logits at temperature {temperature:g} and at 1 agree to {number:.2g} nats in the mean"
    mend = "the teacher does not divide its logits by the temperature of the rollouts: mend it, or sample at 1"
    return checked("temperature", number, finding, mend)
