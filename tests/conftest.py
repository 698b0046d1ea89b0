from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.interop.compare", "tests.training.task")


@pytest.fixture(scope="session")
def reference():
    """The reference library, in a subprocess that lives as long as the session."""
    from tests.reference.sides import Reference

    side = Reference()
    yield side
    side.close()


@pytest.fixture(scope="session")
def pair(reference, tmp_path_factory):
    """Our library and the reference, side by side."""
    from tests.reference.sides import Ours, Pair

    return Pair(Ours(), reference, tmp_path_factory.mktemp("interop"))
