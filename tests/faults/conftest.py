"""The plant that the tests of faults share, whole again before each of them."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.plant import Plant, plant


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running_plant(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    async with plant(tmp_path_factory.mktemp("plant")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def site(running_plant: Plant) -> AsyncIterator[Plant]:
    await running_plant.whole()
    yield running_plant
    running_plant.link.mend()
