"""The demo in a real browser: headless Chromium, without a network, as wide as a desk's screen and as a phone."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("browser")]

APP = Path(__file__).parents[1] / "hub/space/app.py"
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
SECONDS = 60_000

sync_api.expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's address and the folder that has its temporary files; it ends at Ctrl-C with nothing left there."""
    folder = tmp_path_factory.mktemp("demo")
    env = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, str(APP), "--port", port], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if address := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        pytest.fail(f"the demo has not started: {printed}")
    yield address[0], folder
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert rest.endswith("ended\n")
    assert not list(folder.glob("timm-gsop-demo-*"))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request, demo, browser):
    """The demo's page; whatever the console reports as an error, or the page throws, fails the test."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport=dict(width=width, height=height))
    errors = []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda sent: _is_end_of_stream(sent) or errors.append(f"{sent.url}: {sent.failure}"))
    foreign = []
    page.on("request", lambda sent: sent.url.startswith((demo[0], "data:", "blob:")) or foreign.append(sent.url))
    page.set_default_timeout(SECONDS)
    page.goto(demo[0])
    yield page
    page.close()
    assert not errors
    assert not foreign


def _is_end_of_stream(request) -> bool:
    """Gradio's page closes a stream, of results or of progress, when it has what it needs."""
    return request.failure == "net::ERR_ABORTED" and ("/queue/data" in request.url or "/upload_progress" in request.url)


def upload(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files([dict(name=name, mimeType="image/png", buffer=content)])


def png(image: Image.Image, **kwargs) -> bytes:
    content = io.BytesIO()
    image.save(content, **{"format": "PNG", **kwargs})
    return content.getvalue()


def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg"))


def figures(page) -> list[str]:
    pictures = page.locator(".pictures img")
    sync_api.expect(pictures).to_have_count(2)
    for i in range(2):  # drawn, not broken
        assert pictures.nth(i).evaluate("img => img.decode().then(() => img.naturalWidth)") > 600
    return [pictures.nth(i).get_attribute("src") for i in range(2)]


def screenshot(page, name: str) -> None:
    """Keep a picture of the page, to be looked at: SCREENSHOTS=FOLDER make test-browser."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_photo_and_another_network(page, demo, request):
    upload(page, "flower.png", png(photo()))
    trained = page.locator("#trained-classes")
    sync_api.expect(trained).to_contain_text("%")
    sync_api.expect(page.locator("#neutral-classes")).to_contain_text("%")
    first, first_figures = trained.inner_text(), figures(page)
    assert first_figures[0] != first_figures[1]
    assert fits(page)
    page.locator("#network input").click()
    page.get_by_role("option", name=re.compile("gsop_preresnet20_net2.cifar10")).click()
    sync_api.expect(page.locator(".pictures img").first).not_to_have_attribute("src", first_figures[0])
    assert figures(page)[0] != first_figures[0]
    assert trained.inner_text() != first
    assert fits(page)
    assert not [path for path in demo[1].rglob("*") if path.is_file() and "flower" in path.name]  # nothing is kept
    screenshot(page, f"photo-{request.node.callspec.id}")


def test_a_picture_of_the_page(page, request):
    page.locator(".thumbnails button.thumbnail-item").first.click()
    sync_api.expect(page.locator("#trained-classes")).to_contain_text("cat")
    figures(page)
    screenshot(page, f"example-{request.node.callspec.id}")


def test_a_network_that_cannot_be_loaded(page):
    page.locator("#network input").click()
    page.get_by_role("option", name=re.compile("gsop_resnet50_net1")).click()
    sync_api.expect(page.locator("#message")).to_contain_text("could not be downloaded")


BAD = {
    "not an image": (b"hello", "is not a picture"),
    "corrupt": (png(photo())[:20_000], "is damaged"),
    "1x1": (png(Image.new("RGB", (1, 1))), "1×1 pixels"),
    "huge": (png(Image.new("1", (30_000, 30_000))), "too many pixels"),
    "large": (png(Image.new("1", (8_000, 8_000))), "8000×8000 pixels"),
    "long": (png(Image.new("L", (4_000, 20))), "long side"),
}
TURNED = {
    "CMYK": (png(photo().convert("CMYK"), format="JPEG"), "CMYK"),
    "16 bit": (png(Image.fromarray(np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64))), "8 bits"),
    "animated": (
        png(photo(), format="GIF", save_all=True, append_images=[Image.new("RGB", photo().size)]),
        "several frames",
    ),
}


@pytest.mark.parametrize("page", ["desk"], indirect=True)
def test_bad_pictures_get_a_message(page):
    message = page.locator("#message")
    for content, expected in [*BAD.values(), *TURNED.values()]:
        upload(page, "picture.png", content)
        sync_api.expect(message).to_contain_text(expected)
        shown = page.locator("#trained-classes")
        if (content, expected) in TURNED.values():
            sync_api.expect(shown).to_contain_text("%")
        else:
            sync_api.expect(shown).not_to_contain_text("%")
    sync_api.expect(page.locator("body")).not_to_contain_text("Traceback")


def test_files_over_the_limit_are_refused(demo, browser):
    page = browser.new_page()  # without a look at the console: Gradio's page asks for the progress of what is refused
    page.goto(demo[0])
    upload(page, "picture.png", b"\0" * (11 * 2**20))
    sync_api.expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    page.close()
    assert not [path for path in demo[1].rglob("*") if path.is_file() and path.stat().st_size > 10 * 2**20]
