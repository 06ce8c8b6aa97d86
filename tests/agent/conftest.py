"""The fixture of the tests that tell a story of one side of a migration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agent.side_rig import SideRig
from tests.agent.side_stories import Story


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    """Run a story with a rig, bounded; no task's failure goes unheard."""

    def run(story: Story) -> None:
        unheard: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
            rig = SideRig(tmp_path, monkeypatch)
            try:
                async with asyncio.timeout(20):
                    await story(rig)
            finally:
                rig.journal.close()

        asyncio.run(main())
        assert not unheard

    return run
