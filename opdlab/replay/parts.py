"""Where a gate puts weight, and where a gradient comes from: by position in the response, and by kind of token.

Shapes: V gates, N valid positions of the step, R parts, J fresh draws, P trained parameters.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.gating import GateInputs
from opdlab.replay.comparison import Row, compare
from opdlab.replay.step_gradients import StepGradients, gradient_products

QUARTERS = ("quarter 1", "quarter 2", "quarter 3", "quarter 4")
FIRST = 8
"""Tokens of a response that count as its first."""
KINDS = ("special", "newline", "space", "digit", "letter", "sign")


def token_kinds(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the kind of each token of a vocabulary, [number of tokens] long, an index into :data:`KINDS`.

    A token has the first of these kinds that it fits: a special token; text with a newline; only space; text with a
    digit; text with a letter; other signs.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> tokenizer = chain_tokenizer()
        >>> kinds = token_kinds(tokenizer)
        >>> [KINDS[kinds[tokenizer.convert_tokens_to_ids(token)]] for token in ("<eos>", "7", "+")]
        ['special', 'digit', 'sign']
    """
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)

    def kind(index: int, text: str) -> str:
        if index in special:
            return "special"
        if "\n" in text:
            return "newline"
        if not text.strip():
            return "space"
        if any(character.isdigit() for character in text):
            return "digit"
        return "letter" if any(character.isalpha() for character in text) else "sign"

    return torch.tensor([KINDS.index(kind(index, text)) for index, text in enumerate(texts)])


def part_masks(inputs: GateInputs, kinds: Tensor) -> dict[str, Tensor]:
    """Return the positions of each part, [B, T] bool by its name.

    The quarters, and the kinds, hold each valid position once; the first tokens of a response are also in those.

    Args:
        inputs: of the gate.
        kinds: see :func:`token_kinds`.

    Example:
        >>> zeros = torch.zeros(1, 8)
        >>> inputs = GateInputs(torch.tensor([[5, 6, 5, 6, 5, 6, 5, 6]]), torch.ones(1, 8), zeros, zeros)
        >>> masks = part_masks(inputs, torch.full((7,), KINDS.index("digit")))
        >>> masks["quarter 2"].nonzero()[:, 1].tolist(), int(masks["digit"].sum()), int(masks["sign"].sum())
        ([2, 3], 8, 0)
    """
    valid = inputs.mask.bool()
    place = valid.cumsum(1) - 1
    quarter = place * len(QUARTERS) // valid.sum(1, keepdim=True).clamp(min=1)
    # Rows of the embedding beyond the tokenizer have no text.
    known = inputs.tokens.clamp(min=0, max=len(kinds) - 1)
    kind = kinds.to(known.device)[known]
    return {
        **{name: valid & (quarter == number) for number, name in enumerate(QUARTERS)},
        "first tokens": valid & (place < FIRST),
        **{name: valid & (kind == number) for number, name in enumerate(KINDS)},
    }


def part_rows(
    gradients: StepGradients,
    weights: Sequence[Tensor],
    kinds: Tensor,
    fresh: Tensor,
    tolerance: float,
) -> tuple[list[list[Row]], int]:
    """Return a row for each part of a step that has positions, for each gate, and the number of backward passes.

    A part's gradient is that of the positions in it alone, under the gate's weights over the whole step: gradients of
    the quarters, or of the kinds, sum to the gate's.

    Args:
        gradients: of the step.
        weights: of each micro-batch, [V, B, T]; all 1 for the first gate.
        kinds: see :func:`token_kinds`.
        fresh: gradients of fresh rollouts, [J, P].
        tolerance: see :func:`opdlab.replay.step_gradients.mixtures`.

    Returns:
        The rows by gate, and the number. ``weight_share`` is the part's share of all weight, ``drift_size`` the mean
        absolute drift in nats, ``fresh_projection`` the component of the part's gradient along the unit vector of the
        mean fresh gradient.
    """
    masks = [part_masks(inputs, kinds) for inputs in gradients.inputs]
    sizes = {name: sum(int(each[name].sum()) for each in masks) for name in masks[0]}
    names = [name for name, size in sizes.items() if size]
    total = sum(int(inputs.mask.sum()) for inputs in gradients.inputs)
    divided = [
        torch.cat([weight[:1], *(weight * each[name] for name in names)])  # [1 + R * V, B, T]
        for weight, each in zip(weights, masks, strict=True)
    ]
    mean = fresh.mean(0)
    products = gradient_products(gradients, divided, torch.cat([fresh, mean[None]]), tolerance)
    compared, _ = compare(products, {"fresh": fresh}, mean)  # the first row is that of no gate and all parts
    whole = torch.stack([weight.double().sum((1, 2)).cpu() for weight in weights]).sum(0).tolist()  # [V]
    of_part = torch.stack([each[1:].double().sum((1, 2)).cpu() for each in divided]).sum(0).tolist()  # [R * V]
    found: list[list[Row]] = [[] for _ in whole]
    for number, (row, weight) in enumerate(zip(compared[1:], of_part, strict=True)):
        name, gate = names[number // len(whole)], number % len(whole)
        drift = [inputs.drift[each[name]] for inputs, each in zip(gradients.inputs, masks, strict=True)]
        norm, along = row["gradient_norm"], row["run_cosine"]
        found[gate].append(
            {
                "part": name,
                "positions": sizes[name],
                "position_share": sizes[name] / total,
                "weight_mean": weight / sizes[name],
                "weight_share": weight / whole[gate] if whole[gate] else None,
                "drift_size": float(torch.cat(drift).abs().double().mean()),
                "gradient_norm": norm,
                "fresh_cosine": row["fresh_cosine"],
                # A part without a gradient has no direction, and gets nowhere.
                "fresh_projection": norm * along if isinstance(norm, float) and isinstance(along, float) else 0.0,
            }
        )
    return found, products.num_backward


def part_means(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the means of some figures over rows of one gate, by part; undefined values are left out."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name in names:
            if isinstance(value := row[name], float):
                values.setdefault(str(row["part"]), {}).setdefault(name, []).append(value)
    return {part: {name: sum(each) / len(each) for name, each in figures.items()} for part, figures in values.items()}
