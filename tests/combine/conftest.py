from __future__ import annotations

import pytest

from tests.reference.sides import Reference


@pytest.fixture(scope="session")
def reference():
    side = Reference()
    yield side
    side.close()
