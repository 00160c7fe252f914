"""Rollouts in a real browser: how far they are, why they stopped, and the buttons that steer them."""

from pathlib import Path

import pytest

from hub import rollout_runner
from tests.hub.browser import Browser
from tests.hub.rig import PASSWORD, Hub, until
from tests.hub.test_rollout_runner import REASON, fleet, publish, start
from tests.hub.test_ui import complaints, log_in, needs_chromium


@needs_chromium
async def test_a_rollout_is_seen_approved_and_rolled_back_in_the_browser(
    served: tuple[Hub, str], window: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rollout_runner, "TICK_S", 0.1)
    hub, url = served
    admin = await hub.login()
    await publish(admin, "1")
    await publish(admin, "2")
    await hub.services.auth.set_role("watcher", ["read:rollout"], by="test")
    await hub.services.auth.add_user("guest", ["watcher"], PASSWORD, by="test")
    async with fleet(hub, 4, {f"press-{n}": {"2": REASON} for n in range(4)}) as devices:
        await start(admin, "1")
        await log_in(window, url, "/rollouts")
        await window.see("4 devices have it", ".clip")
        id = await start(admin, waves=[{"percent": 50, "approval": True}, {}], min_sample=1, failure=0)
        await window.see("reader 2", "td")
        await window.open(f"{url}/rollouts/{id}")
        await window.see("needs approval", ".wave")
        await window.click(".verb-approve button")
        await window.see("paused", "h1 .badge")
        await window.see(REASON, "td")
        await window.see("agreement 0.61", "td")
        (tmp_path / "rollout.png").write_bytes(await window.screenshot())
        await window.click(".verb-rollback button")
        await window.click(".dialog .bg-primary")
        await window.see("rolled back", "h1 .badge")
        await until(lambda: all(d.desired[-1].doc["bundles"]["reader"]["version"] == "1" for d in devices))
        await window.see("reverted", "td")
        await window.look(390, 844)
        assert await window.run("return document.documentElement.scrollWidth") <= 390
        assert await complaints(window) == []

        await window.click("[aria-label='Log out']")
        await window.see("Log in to see")
        await log_in(window, url, f"/rollouts/{await start(admin, '2', not_before='2100-01-01')}", user="guest")
        await window.see("scheduled", "h1 .badge")
        assert await window.run("return document.querySelector('.verb-pause button').disabled")
    await admin.aclose()
