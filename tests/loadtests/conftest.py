"""What the tests of the load generator share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.locusts import RunLocust, forking_locust


@pytest.fixture(scope="session")
def locust(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunLocust]:
    """Runs a Locust file of ours; starting is quick, since it forks."""
    with forking_locust(tmp_path_factory.mktemp("locust")) as run:
        yield run
