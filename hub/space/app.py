"""The demo: a picture, a network's classes for it, and what each of its second-order layers makes of it.

``python hub/space/app.py`` serves it at http://127.0.0.1:7860 (``make demo`` sets it up first). The same files are the
Space on the Hugging Face Hub.
"""

import argparse
import base64
import html
import io
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import; nobody's pictures, addresses or errors leave
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"

import gradio as gr
from images import MAX_BYTES, BadImageError, read_image
from networks import BadNetworkError, choices, classify, load
from PIL import Image

from timm_gsop.viz import draw, record

EXAMPLES = Path(__file__).parent / "examples"
PHOTOS = ("china.jpg", "flower.jpg")  # scikit-learn's

INTRODUCTION = """
# Global second-order pooling

A [GSoP block](https://arxiv.org/abs/1811.12006) weighs the channels of a feature map (or its positions) by what their
covariance says. Choose a picture: the network names it, once as it was trained, once with its blocks neutral, so that
they scale everything by one half. The pictures show each layer's weights, its covariance, and that matrix normalized.
"""
CSS = """
.pictures { overflow-x: auto; }
.pictures img { width: 100%; min-width: 480px; }
.message { padding: 0.5rem 0; font-weight: 600; }
.thumbnails, .thumbnails .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.thumbnails .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; height: auto !important; }
"""

Shown = tuple[str, str, Any, Any, str, str]


def explain(image: Image.Image | None, note: str, name: str) -> Shown:
    """What the page shows: message, notes on the network, two lists of classes, two figures."""
    try:
        network = load(name)
    except BadNetworkError as error:
        return _nothing(str(error))
    about = html.escape(network.about)
    if image is None:
        return _nothing(note or "Upload a picture, or choose one.", about)
    crop, x = network.prepare(image)
    with_blocks = classify(network.model, x, network.labels), _figure(network.model, crop, x, "as trained")
    if network.neutral is None:
        return _message(note), about, with_blocks[0], None, with_blocks[1], _message("No blocks to make neutral.")
    neutral = classify(network.neutral, x, network.labels), _figure(network.neutral, crop, x, "its blocks neutral")
    return _message(note), about, with_blocks[0], neutral[0], with_blocks[1], neutral[1]


def _nothing(message: str, about: str = "") -> Shown:
    return _message(message), about, None, None, "", ""


def _message(text: str) -> str:
    return f'<div class="message" role="status">{html.escape(text)}</div>' if text else ""


def _figure(model: Any, crop: Image.Image, x: Any, title: str) -> str:
    png = io.BytesIO()  # in the page itself: Gradio would keep a file
    draw(record(model, x), crop, title).savefig(png, format="png", dpi=90)
    content = base64.b64encode(png.getvalue()).decode("ascii")
    alt = f"Weights, covariance and normalized covariance of each layer, {title}"
    return f'<div class="pictures"><img alt="{alt}" src="data:image/png;base64,{content}"></div>'


def build(uploads: Path, more: list[str]) -> gr.Blocks:
    """Make the page.

    Args:
        uploads: The folder in which Gradio puts what is uploaded; a file is removed as soon as it is read.
        more: Names of further networks.
    """
    samples = [*_examples("*.png"), *_photos(), *_examples("clothing/*.png")]
    networks = choices(more)

    def upload(path: str, name: str) -> tuple[Any, ...]:
        file = Path(path).resolve()
        try:
            image, note = read_image(file)
        except BadImageError as error:
            return None, None, str(error), *explain(None, str(error), name)
        finally:
            if file.is_relative_to(uploads.resolve()):
                file.unlink(missing_ok=True)
        return None, image, note, *explain(image, note, name)

    def pick(event: gr.SelectData, name: str) -> tuple[Any, ...]:
        image = samples[event.index][0].convert("RGB")
        return image, "", *explain(image, "", name)

    with gr.Blocks(title="Global second-order pooling", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.Markdown(INTRODUCTION)
        image, note = gr.State(None, time_to_live=900), gr.State("", time_to_live=900)
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                megabytes = MAX_BYTES // 2**20
                file = gr.File(label=f"Upload a picture, up to {megabytes} MB", file_types=["image"], height=140)
                thumbnails = gr.Gallery(
                    [(sample, label) for sample, label in samples],
                    label="or choose one",
                    columns=4,
                    allow_preview=False,
                    object_fit="contain",
                    elem_classes="thumbnails",
                    buttons=[],
                )
                network = gr.Dropdown(networks, value=networks[0][1], label="Network", elem_id="network")
                about = gr.HTML()
                message = gr.HTML(_message("Upload a picture, or choose one."), elem_id="message")
            with gr.Column(scale=1, min_width=280):
                trained_classes = gr.Label(label="as trained", elem_id="trained-classes")
            with gr.Column(scale=1, min_width=280):
                neutral_classes = gr.Label(label="its blocks neutral", elem_id="neutral-classes")
        with gr.Row():
            with gr.Column(min_width=320):
                trained_figure = gr.HTML(elem_id="trained-figure")
            with gr.Column(min_width=320):
                neutral_figure = gr.HTML(elem_id="neutral-figure")
        shown = [message, about, trained_classes, neutral_classes, trained_figure, neutral_figure]
        one_at_a_time: Any = dict(concurrency_limit=1, concurrency_id="network", api_visibility="private")
        file.upload(upload, [file, network], [file, image, note, *shown], **one_at_a_time)
        thumbnails.select(pick, [network], [image, note, *shown], **one_at_a_time)
        network.change(explain, [image, note, network], shown, **one_at_a_time)
        page.load(explain, [image, note, network], shown, **one_at_a_time)
    return page.queue(max_size=20)


def _examples(pattern: str) -> list[tuple[Image.Image, str]]:
    return [(Image.open(path), path.stem) for path in sorted(EXAMPLES.glob(pattern))]


def _photos() -> list[tuple[Image.Image, str]]:
    try:
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError:
        return []
    return [(Image.fromarray(load_sample_image(name)), Path(name).stem) for name in PHOTOS]


def main() -> None:
    """Serve the page until Ctrl-C, or until it is asked to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    everywhere = "SPACE_ID" in os.environ  # on the Hub, the container is reached from outside
    host = os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if everywhere else "127.0.0.1")
    parser.add_argument("--host", default=host, help="the address to listen on, %(default)s")
    parser.add_argument("--port", type=int, help="the first free one from 7860, or $GRADIO_SERVER_PORT")
    parser.add_argument("--model", nargs="*", default=[], help="further networks: local-dir:FOLDER, hf-hub:REPOSITORY")
    args = parser.parse_args()
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    with tempfile.TemporaryDirectory(prefix="timm-gsop-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(Path(folder), args.model)
        system_fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # no font is fetched
        page.launch(
            server_name=args.host,
            server_port=args.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            max_file_size=MAX_BYTES,
            state_session_capacity=100,
            footer_links=[],
            theme=gr.themes.Default(font=system_fonts[0], font_mono=system_fonts[1]),
            css=CSS,
        )
        print(f"The demo is at {page.local_url} (Ctrl-C ends it)", flush=True)
        end.wait()
        page.close(verbose=False)
    print("ended", flush=True)


if __name__ == "__main__":
    sys.exit(main())
