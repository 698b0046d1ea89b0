"""The whole test of the package: the contract, on every kind of layer."""

import pytest

from peft.testing import check_method, samples


@pytest.mark.parametrize("config", samples("LORAXS"), ids=str)
def test_contract(config):
    print(check_method(config))
