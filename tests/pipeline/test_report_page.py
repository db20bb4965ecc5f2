"""The report's page in a real headless Chromium: what a reader's browser makes of it.

The browser is driven over the DevTools protocol's pipe, so the tests need no driver and no port.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.document import Cell, Document, Facts, Heading, Picture, Row, Table, Text
from pipeline.report.page import page

pytestmark = pytest.mark.browser
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run
    --disable-background-networking --disable-component-update --remote-debugging-pipe""".split()  # noqa: SIM905
PHONE, DESKTOP = 390, 1280


class Chromium:
    """One headless browser with one tab."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = shlex.join([program, *FLAGS, f"--user-data-dir={profile}", "about:blank"])
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command} 3<&{to_browser} 4>&{from_browser}"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != number:
            self.events.append(found)
        assert "result" in found, found
        result: dict[str, Any] = found["result"]
        return result

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        """Load a file in a window of this width and wait until it is there."""
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[dict[str, Any]]:
        """What was written to the console, and errors."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """The URLs that the page asked for, without those inside the page."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(20)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            assert more, "the browser went away"
            self._rest += more
        line, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, (
        f"no browser ({', '.join(BROWSERS)}); make browser, or: apt-get install chromium-headless-shell"
    )
    opened = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A page with everything that a report has, wider than a phone, and names that are HTML."""
    for name in ("wide.png", "curve.png"):
        Image.fromarray(np.full((40, 90, 3), 128, np.uint8)).save(tmp_path / name)
    many = [f"metric {i} %" for i in range(12)]
    rows = [
        [Cell(f"<b>method</b> {i}"), *(Cell("12.3 ± 4.5", "+1.0 [-1.0, +3.0]") for _ in many)]
        for i in range(5)
    ]
    document = Document(
        'a <script>throw "run"</script> & "title"',
        [
            Heading("What was run"),
            Facts(
                [
                    ("teacher", "w/" + "long-name-without-a-space-" * 8),
                    ("data", "<img src=x onerror=alert(1)>"),
                ]
            ),
            Heading("Scores"),
            Text("A paragraph. " * 30),
            Table("test </table> ood", ["method", *many], rows, frozenset({2})),
            Heading("Pictures"),
            Picture("wide.png", 'maps of "kd" <x>', "Maps", 900),
            Row([Picture("curve.png", f"curve {i}", "A curve") for i in range(3)]),
        ],
    )
    file = tmp_path / "report.html"
    file.write_text(page(document, tmp_path), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_needs_nothing_complains_of_nothing_and_fits(
    browser: Chromium, written: Path, width: int
) -> None:
    browser.open(written, width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("window.innerWidth") == width
    decoded = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    assert browser.value(decoded) == [90] * 4
    assert browser.complaints() == []
    assert browser.requests() == [written.as_uri()]
    assert browser.value("document.scripts.length") == 0


def test_names_are_text_and_every_part_says_what_it_is(browser: Chromium, written: Path) -> None:
    browser.open(written, DESKTOP)
    assert (
        browser.value("document.querySelector('h1').textContent")
        == 'a <script>throw "run"</script> & "title"'
    )
    assert browser.value("document.querySelector('tbody th').textContent") == "<b>method</b> 0"
    assert browser.value("document.querySelector('caption').textContent") == "test </table> ood"
    assert browser.value("[...document.images].filter(i => !i.alt).length") == 0
    assert browser.value("document.querySelectorAll('th:not([scope])').length") == 0
    assert browser.value("[...document.querySelectorAll('h1,h2')].map(h => h.tagName)") == [
        "H1",
        "H2",
        "H2",
        "H2",
    ]
    jumps = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    assert browser.value(jumps) is True


def test_only_wide_parts_scroll_on_a_phone(browser: Chromium, written: Path) -> None:
    browser.open(written, PHONE)
    parts = browser.value("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)")
    assert parts == [True, True]
    narrow = (
        "[...document.querySelectorAll('.row img')].every(i => i.clientWidth < 390 && i.clientWidth > 300)"
    )
    assert browser.value(narrow) is True


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_are_readable(browser: Chromium, written: Path, dark: bool) -> None:
    browser.open(written, DESKTOP, dark=dark)
    style = "getComputedStyle(document.body)"
    for part in (
        style,
        "getComputedStyle(document.querySelector('td small'))",
        "getComputedStyle(document.querySelector('a'))",
    ):
        ink, paper = (
            _luminance(browser.value(f"{where}")) for where in (f"{part}.color", f"{style}.backgroundColor")
        )
        assert (ink > paper) == dark
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5  # WCAG AA


def test_paper_has_all_columns(browser: Chromium, written: Path) -> None:
    browser.open(written, DESKTOP)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = base64.b64decode(browser.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


def _luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, relative, WCAG 2."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
