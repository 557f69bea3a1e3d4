from typing import Any

import pytest

from tests.conformance.others import load


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Any:
    """The function of another package that :func:`tests.conformance.others.against` names."""
    return load(request.param)
