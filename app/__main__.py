"""A page to play with in a browser on this machine: `make app`, or `python -m app`.

This file only builds the page; `app.actions` does the work. No usage data is sent to anyone.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from PIL import Image

from app.actions import CANVAS, DISTILLED, NETWORKS, Actions
from config import FEW_STEP_SAMPLER, HALVES, SAMPLER, AppConfig, SamplingConfig, UserError, parse
from sampling.draw import resolve
from sampling.samplers import SAMPLERS
from utils.data_loader import DIGITS
from utils.script import run

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # before the import
try:
    import gradio as gr
except ImportError:
    print("app: error: needs the package gradio, which `make app` installs", file=sys.stderr)
    raise SystemExit(2) from None

DENOISERS = [name for name in NETWORKS if name != DISTILLED]
STEPWISE = [name for name in SAMPLERS if name != FEW_STEP_SAMPLER]
PROGRESS = gr.Progress()  # shown on the page for functions that have it as a default
NARROW = 240  # pixels: three columns fit on the page
CSS = "img { image-rendering: pixelated } button[aria-label=Color] { border: 1px solid grey }"
# one action at a time; of several clicks, the last one counts
QUEUE = {"trigger_mode": "always_last", "concurrency_limit": 1, "concurrency_id": "network"}


def on(triggers: Any, function: Callable, inputs: Any, outputs: Any) -> gr.events.Dependency:
    """Call a function when one of `triggers` fires; show bad input as a line on the page."""

    @functools.wraps(function)
    def called(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(str(error).removeprefix("--"), print_exception=False) from None

    return gr.on(triggers, called, inputs, outputs, show_progress="minimal", **QUEUE)


def picture(*label: str) -> gr.Image:
    options = {"format": "png", "interactive": False, "buttons": []}
    return gr.Image(label="".join(label), show_label=bool(label), type="pil", **options)


def number(value: int, label: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=0)


def canvas(actions: Actions, *colors: str) -> gr.ImageEditor:
    """A canvas to draw on, with a button below it that loads a test digit."""
    editor = gr.ImageEditor(
        Image.new("RGBA", (CANVAS, CANVAS), "black"),
        show_label=False,
        sources=[],
        transforms=[],
        layers=False,
        canvas_size=(CANVAS, CANVAS),
        fixed_canvas=True,
        brush=gr.Brush(11, list(colors), colors[0], "fixed"),
        buttons=[],
    )
    on(gr.Button("Load a test digit").click, actions.test_digit, None, editor)
    return editor


def draw_tab(page: gr.Blocks, actions: Actions) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            network = gr.Dropdown(list(NETWORKS), label="Network")
            text = gr.Textbox(label="A digit or a number", placeholder="empty: all digits")
            seed, another = number(0, "Seed"), gr.Button("Next seed", variant="primary")
            steps = gr.Slider(1, 50, 1, step=1, label="Steps")
            guidance = gr.Slider(0, 8, 1, step=0.1, label="Guidance", interactive=False)
        with gr.Column(scale=2):
            digits, line = picture(), gr.Markdown()

    def draw_by_another(network: str, text: str, seed: int) -> tuple:
        """Draw with the default steps and guidance of this network, and show them."""
        model, _ = actions.model(network)
        own = resolve(SamplingConfig(), model)
        controls = (
            gr.Slider(value=own.steps),
            gr.Slider(value=own.guidance, interactive=model.can_be_guided),
        )
        return *controls, *actions.draw(network, text, seed, own.steps, own.guidance)

    triggers = [page.load, text.change, seed.change, steps.input, guidance.input]
    on(triggers, actions.draw, [network, text, seed, steps, guidance], [digits, line])
    on(network.input, draw_by_another, [network, text, seed], [steps, guidance, digits, line])
    another.click(None, seed, seed, js="seed => seed + 1")


def watch_tab(tab: gr.Tab, actions: Actions) -> None:
    with gr.Row():
        network = gr.Dropdown(DENOISERS, label="Network")
        digit, seed = gr.Dropdown(DIGITS, value="7", label="Digit"), number(0, "Seed")
        steps = gr.Slider(2, 50, 20, step=1, label="Steps")
    step = gr.Slider(1, 20, 1, step=1, label="Shown after step")
    samplers, paths, pictures = [], [], []
    with gr.Row():
        for name in (SAMPLER, "ddpm"):
            with gr.Column():
                samplers.append(gr.Dropdown(STEPWISE, value=name, label="Sampler"))
                pictures.append(picture("x_t, x0_hat, eps_hat"))
                paths.append(gr.State())

    def show(step: int, steps: int, *paths: list) -> list[gr.Image]:
        """Show every sampler equally far along its path; Heun makes two calls per step."""
        updates = []
        for path in paths:
            sigma, shown = path[round((step - 1) / (steps - 1) * (len(path) - 1))]
            updates.append(gr.Image(shown, label=f"x_t, x0_hat, eps_hat at sigma = {sigma:.3g}"))
        return updates

    def draw(network: str, digit: str, seed: int, steps: int, *samplers: str) -> list:
        options = {"seed": seed, "steps": steps}
        paths = [actions.path(network, digit, sampler=name, **options) for name in samplers]
        return [gr.Slider(value=steps, maximum=steps), *paths, *show(steps, steps, *paths)]

    inputs = [network, digit, seed, steps, *samplers]
    triggers = [tab.select, *(control.input for control in inputs)]
    on(triggers, draw, inputs, [step, *paths, *pictures])
    on(step.input, show, [step, steps, *paths], pictures)


def complete_tab(actions: Actions) -> None:
    with gr.Row():
        with gr.Column(min_width=NARROW):
            gr.Markdown(
                "Draw part of a digit. You can paint the missing part red:"
                " choose red below the eraser, then the brush again."
            )
            editor = canvas(actions, "#ffffff", "#ff0000", "#000000")
        with gr.Column(min_width=NARROW):
            network = gr.Dropdown(DENOISERS, label="Network")
            where = gr.Dropdown(["painted red", *HALVES], label="What is missing")
            seed, button = number(0, "Seed"), gr.Button("Complete it", variant="primary")
        with gr.Column(min_width=NARROW):
            gr.Markdown("The known part, and eight completions")
            completed, line = picture(), gr.Markdown()

    def complete(network: str, drawn: dict, where: str, seed: int, report=PROGRESS) -> tuple:
        return actions.complete(network, drawn["composite"], where, seed, report)

    on(button.click, complete, [network, editor, where, seed], [completed, line])


def between_tab(tab: gr.Tab, actions: Actions) -> None:
    with gr.Row():
        network = gr.Dropdown(list(NETWORKS), value="U-Net", label="Network")
        digit = gr.Dropdown(DIGITS, value="7", label="Digit")
        first, last = number(5, "From seed"), number(6, "To seed")
    images, line = picture(), gr.Markdown()

    inputs = [network, digit, first, last]
    triggers = [tab.select, *(control.input for control in inputs)]
    on(triggers, actions.between, inputs, [images, line])


def opinion_tab(actions: Actions) -> None:
    with gr.Row():
        with gr.Column(min_width=NARROW):
            editor = canvas(actions, "#ffffff", "#000000")
        with gr.Column(min_width=NARROW):
            network = gr.Dropdown(DENOISERS, label="Network")
            button = gr.Button("What is it?", variant="primary")
            seen, line = picture("as they see it"), gr.Markdown()
        with gr.Column(min_width=NARROW):
            judges = [gr.Label(label="The classifier", num_top_classes=3)]
            label = "The diffusion model: the label with which it predicts noise best"
            judges.append(gr.Label(label=label, num_top_classes=3))

    def judge(network: str, drawn: dict) -> tuple:
        return actions.opinions(network, drawn["composite"])

    on(button.click, judge, [network, editor], [seen, *judges, line])


def make_page(actions: Actions) -> gr.Blocks:
    with gr.Blocks(title="Diffusion on MNIST") as page:
        with gr.Tab("Draw"):
            draw_tab(page, actions)
        with gr.Tab("Watch") as tab:
            watch_tab(tab, actions)
        with gr.Tab("Complete"):
            complete_tab(actions)
        with gr.Tab("Between") as tab:
            between_tab(tab, actions)
        with gr.Tab("What is it?"):
            opinion_tab(actions)
    return page


def serve(cfg: AppConfig) -> gr.Blocks:
    """Show the page on 127.0.0.1. Raises UserError if the port is not available."""
    page, where = make_page(Actions(cfg)), {"server_name": "127.0.0.1", "server_port": cfg.port}
    options = {"share": False, "footer_links": [], "css": CSS, "quiet": True}
    try:
        page.launch(**where, **options, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {cfg.port}: not available: {error}") from None
    print(f"open http://127.0.0.1:{cfg.port} in a browser; Ctrl-C stops it", flush=True)
    return page


def main() -> None:
    serve(parse(AppConfig, "Play with the shipped networks in a browser.")).block_thread()


if __name__ == "__main__":
    run(main)
