"""The cache of the decoding loop: room for the next tokens."""

import functools
import itertools
import weakref
from typing import Any

import pytest
from transformers import Cache

from tests.policies.test_decoding import PROMPTS, decode, small_model


def test_few_tokens_copy_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    forward, places = model.forward, []

    @functools.wraps(forward)
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        cache = next(value for value in kwargs.values() if isinstance(value, Cache))
        places.append(cache.layers[0].keys.data_ptr())
        return output

    monkeypatch.setattr(model, "forward", looked_at)
    decode(model, [PROMPTS[0]], num_samples=4, max_new_tokens=300, eos_token_id=38)
    moves = sum(before != after for before, after in itertools.pairwise(places))
    assert len(places) == 300
    assert moves < 12  # by 32 columns at first, then by an eighth


def test_a_cache_is_gone_before_the_next_prompts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    forward, alive = model.forward, []
    caches: list[weakref.ref[Any]] = []

    @functools.wraps(forward)
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        cache = next(value for value in kwargs.values() if isinstance(value, Cache))
        if not cache.get_seq_length():  # prompts are read
            alive.append(sum(each() is not None for each in caches))
        caches.append(weakref.ref(cache.layers[0]))
        del cache
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", looked_at)
    decode(model, PROMPTS[:3], num_samples=4, batch_size=4, max_new_tokens=5, eos_token_id=38)
    assert alive == [0, 0, 0]  # all responses of a batch end together
