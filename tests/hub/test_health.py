"""What /readyz says while the database fails, and when it no longer does."""

import pytest
import sqlalchemy as sa

from tests.hub.rig import Hub
from tests.sync.brokers import until


async def test_readyz_tells_a_database_that_gives_or_takes_nothing_until_it_does_again_and_the_error_to_the_log_alone(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    async def status() -> tuple[int, str]:
        answer = await hub.http.get("/readyz")
        assert "no such table" not in answer.text
        return answer.status_code, answer.json().get("detail", "").partition(":")[0]

    await until(lambda: hub.services.session.connected)
    assert await status() == (200, "")
    await hub.services.db.write(lambda c: c.exec_driver_sql("ALTER TABLE users RENAME TO away"))
    assert await status() == (503, "the database gives nothing")
    await hub.services.db.write(lambda c: c.exec_driver_sql("ALTER TABLE away RENAME TO users"))
    with pytest.raises(sa.exc.OperationalError):
        await hub.services.db.write(lambda c: c.exec_driver_sql("INSERT INTO nowhere VALUES (1)"))
    assert await status() == (503, "the database takes nothing")
    assert "takes nothing: no such table: nowhere" in caplog.text
    await hub.services.db.write(lambda c: c.exec_driver_sql("SELECT 1"))
    assert await status() == (200, "")
