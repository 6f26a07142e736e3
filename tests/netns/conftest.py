"""Where hosts cannot be made, their tests say why."""

import pytest

from tests.netns.isolation import obstacle


@pytest.fixture(scope="session", autouse=True)
def _hosts_can_be_made() -> None:
    if reason := obstacle():
        pytest.skip(reason)
