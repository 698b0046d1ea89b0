from __future__ import annotations

import pytest

from tests.reference.sides import Ours, Pair, Reference


@pytest.fixture(scope="session")
def reference():
    side = Reference()
    yield side
    side.close()


@pytest.fixture(scope="session")
def pair(reference, tmp_path_factory) -> Pair:
    return Pair(Ours(), reference, tmp_path_factory.mktemp("interop"))
