from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.agent.network.hosts import Lan

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def lan() -> Iterator[Lan]:
    made = Lan()
    yield made
    made.close()
