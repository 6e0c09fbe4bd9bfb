"""The page in a real browser: Chromium through playwright, where both are installed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import metric, serving, small_model, wait_for_idle

from pldr_jax.serve.server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(small_model(tmp_path_factory.getbasetemp()), steps=1) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = tools.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme,width", [("light", 1200), ("dark", 390)])
def test_the_page(server: Server, browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#status:has-text('ready:')")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    # A stream, by keyboard, with a changed setting; each token says how probable it was.
    page.fill("#max_tokens", "6")
    page.fill("#temperature", "0")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#go:enabled")
    tokens = page.locator("#text_0 span")
    assert tokens.count() > 0 and " %" in tokens.first.get_attribute("title")
    first = page.inner_text("#text_0")
    page.fill("#temperature", "1.5")
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    assert page.inner_text("#text_0") != first

    # What if, side by side.
    page.fill("#temperature", "0")
    assert page.is_hidden("#gain") and page.is_hidden("#g_text")
    page.select_option("#what_if", "gain")
    assert page.is_hidden("#g_text")
    page.fill("#gain", "-3")
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    assert page.inner_text("#text_0") == first and page.locator("#text_1 span").count() > 0

    # Heat maps of every layer and head.
    page.click("#show")
    page.wait_for_selector("canvas")
    assert page.locator("canvas").count() == 4
    assert "order parameter" in page.inner_text("#measured")
    painted = page.evaluate(
        "Array.from(document.querySelectorAll('canvas')).every(c => new Set(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data).size > 5)"
    )
    assert painted

    # An error is shown, and stopping frees the slot.
    page.fill("#stop", "x" * 10)
    page.fill("#prompt", "")
    page.click("#go")
    page.wait_for_selector("#text_0 .error")
    assert "empty" in page.inner_text("#text_0")
    wait_for_idle(server)
    before = metric(server, "pldr_cancelled_total")
    page.fill("#prompt", "def ")
    page.select_option("#what_if", "")
    # As many at once as make the slots busy, so that the last is stopped while it waits.
    page.evaluate(
        "for (let i = 0; i < 40; i++) fetch('v1/completions', {method: 'POST', headers: headers(),"
        " body: JSON.stringify({prompt: 'a', max_tokens: 20, logit_bias: {3: -100}})})"
    )
    page.click("#go")
    page.press("#prompt", "Escape")
    assert page.is_enabled("#go") and page.is_disabled("#stop_button")
    wait_for_idle(server)
    assert metric(server, "pldr_cancelled_total") >= before
    # The refused prompt is the one thing that a console may speak of.
    assert all("400" in line for line in said), said
    page.screenshot(path=str(tmp_path / "page.png"))
    page.close()
