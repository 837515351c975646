"""Every test of inference has a cache of its own, shared by the session: proofs are made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the cache at an empty folder for the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKLING_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
