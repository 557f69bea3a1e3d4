"""How other implementations are found: a missing package is a failure, missing clones are a reason to skip."""

import pytest

from tests.conformance.others import VERSIONS, load


def test_a_missing_package_is_a_failure() -> None:
    with pytest.raises(pytest.fail.Exception, match="no-such-package is not installed: run `make test-conformance`"):
        load("no_such_package.losses:jsd")


def test_another_version_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "torch", "0.1")
    with pytest.raises(pytest.fail.Exception, match="torch is .*, but packages.txt has 0.1"):
        load("torch:ones")


def test_code_in_no_package_is_skipped_without_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFICIAL_CODE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="clone github.com/owner/name into a folder"):
        load("owner/name@1234567:losses.py:jsd")
