"""The page: its actions, which need no page, and all of it in a browser, where there is one."""

import dataclasses
import importlib
import inspect
import io
import shutil
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from app import actions as app_actions
from app.actions import CANVAS, DISTILLED, Actions, centred, read_canvas
from config import AppConfig, UserError
from sampling.requests import GREY
from sampling.samplers import INPAINTERS
from scoring.classifier import load_classifier
from utils.synthetic import synthetic_digits
from utils.visualization import enlarged


@pytest.fixture(scope="module")
def actions():
    return Actions(AppConfig(device="cpu"))


def cells(picture, scale, padding=2):
    """The images (N, 1, 28, 28) of a grid."""
    grid = torch.from_numpy(np.array(picture)[::scale, ::scale])
    pitch = 28 + padding
    rows = grid[padding:, padding:].unfold(0, 28, pitch).unfold(1, 28, pitch)
    return rows.reshape(-1, 1, 28, 28)


@torch.inference_mode()
def read(images):
    """The digits that the classifier sees."""
    return "".join(map(str, load_classifier()(images.float() / 255)[1].argmax(dim=1).tolist()))


def agreement(text, expected):
    return np.mean([a == b for a, b in zip(text, expected, strict=True)])


def on_canvas(digit):
    """A digit (1, 28, 28) as the page's canvas holds it."""
    return np.array(enlarged(digit, CANVAS // 28).convert("RGBA"))


@pytest.mark.parametrize("number, row", [("7", 8), ("31415926", 8), ("1234567890123", 13)])
def test_what_is_drawn_is_what_was_asked_for(actions, number, row):
    picture, line = actions.draw(DISTILLED, number, seed=3, steps=1, guidance=1.0)
    assert picture.width == 3 * (30 * row + 2)
    images = cells(picture, 3)
    count = len(images)
    assert f"{count} images" in line and line.endswith("for each: 1")
    assert agreement(read(images), (number * 64)[:count]) > 0.9


def test_network_calls_are_counted_afresh(actions):
    for steps in (2, 3):
        line = actions.draw("SimpleCNN", "", seed=0, steps=steps, guidance=1.0)[1]
        assert line.endswith(f"for each: {steps}")


@pytest.mark.parametrize(
    "network, number, seed, guidance, word",
    [
        ("SimpleCNN", "3x", 0, 1.0, "labels 3,x"),
        ("SimpleCNN", "3" * 65, 0, 1.0, "at most 64"),
        ("SimpleCNN", "3", None, 1.0, "seed None"),
        (DISTILLED, "3", 0, 2.0, "cannot be guided"),
    ],
)
def test_bad_input_is_one_line(actions, network, number, seed, guidance, word):
    with pytest.raises(UserError, match=word) as error:
        actions.draw(network, number, seed, 1, guidance)
    assert "\n" not in str(error.value)


def test_a_path_has_an_entry_for_each_network_call(actions):
    sigmas, pictures = zip(
        *actions.path("SimpleCNN", "4", seed=1, steps=6, sampler="ddim"), strict=True
    )
    assert len(sigmas) == 6 and list(sigmas) == sorted(sigmas, reverse=True)
    (x_t, x0_hat, eps_hat) = cells(pictures[0], 6)
    assert (x_t.int() - eps_hat.int()).float().std() > 10 * x0_hat.float().std() / 255
    x_t, x0_hat, _ = cells(pictures[-1], 6)
    assert (x_t.int() - x0_hat.int()).abs().float().mean() < 5
    heun = actions.path("SimpleCNN", "4", seed=1, steps=6, sampler="heun")
    assert len(heun) > 6


@pytest.fixture
def quick_repaint(monkeypatch):
    """31 network calls instead of 491."""
    monkeypatch.setitem(INPAINTERS, "repaint", dataclasses.replace(INPAINTERS["repaint"], steps=4))


def test_completions_keep_what_is_known(actions, quick_repaint):
    (digit,), shares = synthetic_digits(1, seed=3)[0], []
    canvas = on_canvas(digit)
    canvas[:, CANVAS // 2 :] = (255, 0, 0, 255)
    picture, line = actions.complete("SimpleCNN", canvas, "painted red", 0, shares.append)
    known, *drawn = cells(picture, 4)
    assert len(drawn) == 8 and line.startswith("8 images")
    for image in drawn:
        assert (image[..., :14] == known[..., :14]).all() and (
            known[..., :14] == digit[..., :14]
        ).all()
    assert len({image.numpy().tobytes() for image in drawn}) == 8
    assert shares[0] < 0.05 and shares[-1] > 0.95 and shares == sorted(shares)
    with pytest.raises(UserError, match="nothing is missing"):
        actions.complete("SimpleCNN", on_canvas(digit), "painted red", 0, shares.append)


def test_half_of_a_canvas_may_be_missing_by_name(actions, monkeypatch):
    plans = []
    monkeypatch.setattr(actions, "run", lambda network, plan, watch: (plans.append(plan), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        actions.complete("SimpleCNN", on_canvas(torch.zeros(1, 28, 28).byte()), "top", 0, None)
    missing = plans[0].given["missing"]
    assert missing[:, :, :14].all() and not missing[:, :, 14:].any()


def test_between_two_seeds(actions):
    picture, line = actions.between(DISTILLED, "3", 5, 6)
    images = cells(picture, 4)
    assert len(images) == 10 and agreement(read(images), "3" * 10) > 0.7
    steps = (images[1:].float() - images[:-1].float()).square().mean(dim=(1, 2, 3)).sqrt()
    assert 0 < steps.max() < (images[0].float() - images[-1].float()).square().mean().sqrt() * 1.5


def test_both_judges_read_a_digit_wherever_it_stands(actions):
    images, labels = synthetic_digits(10, seed=3)
    (digit, label) = next((x, int(y)) for x, y in zip(images, labels, strict=True) if y == 3)
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    small = on_canvas(digit)[::2, ::2]
    canvas[: len(small), : len(small)] = small
    seen, *judges, line = actions.opinions("SimpleCNN", canvas)
    assert seen.size == (168, 168) and line.startswith("240 calls of SimpleCNN")
    for judge in judges:
        assert max(judge, key=judge.get) == str(label)
        assert sum(judge.values()) == pytest.approx(1, abs=1e-5)


def test_a_digit_is_placed_as_in_mnist():
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    canvas[10:50, 200:220] = 255  # twice as high as wide
    digit = centred(canvas)
    rows, columns = (digit[0] > 127).nonzero().T
    assert (rows.min(), rows.max()) == (4, 23) and (columns.min(), columns.max()) == (9, 18)
    with pytest.raises(UserError, match="empty"):
        centred(np.zeros((CANVAS, CANVAS, 4), np.uint8))


def test_red_is_what_is_missing_and_transparent_is_black():
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    canvas[:100], canvas[100:200] = (255, 255, 255, 255), (255, 0, 0, 255)
    canvas[200:, :, 0] = 255  # red, but not there
    digit, missing = read_canvas(canvas)
    assert (digit[0, :10] == 255).all() and (digit[0, 10:] == 0).all()
    assert missing[0, 10:20].all() and not missing[0, :10].any() and not missing[0, 20:].any()


def test_test_digits_fit_the_canvas(actions, monkeypatch):
    monkeypatch.setattr(
        app_actions, "load_dataset", lambda *args: SimpleNamespace(images=synthetic_digits(3, 0)[0])
    )
    assert actions.test_digit().size == (CANVAS, CANVAS)


class Shown(Exception):
    def __init__(self, line, print_exception):
        super().__init__(line)


class Control:
    """Of Gradio's, as much as the page asks of one before it is shown: its value."""

    def __init__(self, *given, value=None, **options):
        first = given[0] if given else None
        self.value = value or (first[0] if isinstance(first, list) else first)

    def __getattr__(self, event):
        return mock.Mock(name=event)


PATH = [(2.0, "noise"), (1.0, "a digit")]


def idle(name, result):
    """An action that takes what the real one takes, and gives or raises `result`."""
    takes = inspect.signature(getattr(Actions, name))

    def action(*given, **named):
        takes.bind(None, *given, **named)
        if isinstance(result, Exception):
            raise result
        return result

    return action


@pytest.fixture
def wired(monkeypatch, actions):
    """The page made without Gradio, of actions that do nothing: the module, the actions, and
    (function, inputs, outputs) of each event."""
    gradio, events = mock.MagicMock(Error=Shown), []
    for name in ("Dropdown", "Textbox", "Number", "Slider"):
        setattr(gradio, name, Control)
    gradio.State = lambda: Control(value=PATH)
    gradio.ImageEditor = lambda *given, **options: Control(value={"composite": "a canvas"})
    gradio.on = lambda triggers, function, inputs, outputs, **_: events.append(
        (function, inputs or [], outputs if isinstance(outputs, list) else [outputs])
    )
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.delitem(sys.modules, "app.__main__", raising=False)
    results = {"model": actions.model(DISTILLED), "test_digit": "a digit", "path": PATH}
    results |= dict.fromkeys(("draw", "complete", "between"), ("a picture", "a line"))
    results["opinions"] = ("a digit", {"1": 1.0}, {"1": 1.0}, "a line")
    idlers = SimpleNamespace(**{name: idle(name, result) for name, result in results.items()})
    module = importlib.import_module("app.__main__")
    yield module, idlers, events
    del sys.modules["app.__main__"]


def test_every_event_gives_its_function_what_it_takes_and_shows_what_it_gives(wired):
    module, actions, events = wired
    module.make_page(actions)
    assert len(events) == 9
    for function, inputs, outputs in events:
        given = function(*(control.value for control in inputs))
        assert len(outputs) == (len(given) if isinstance(given, (tuple, list)) else 1)


def test_bad_input_is_a_line_on_the_page(wired):
    module, actions, events = wired
    actions.draw = idle("draw", UserError("--labels 5,x: must name classes among"))
    module.make_page(actions)
    function, inputs, _ = events[0]
    with pytest.raises(Shown, match="^labels 5,x: must name classes among$"):
        function(*(control.value for control in inputs))


def test_a_port_that_cannot_be_had(wired):
    module, *_ = wired
    module.gr.Blocks.return_value.__enter__.return_value.launch.side_effect = OSError("in use")
    with pytest.raises(UserError, match="--port 7860: not available: in use"):
        module.serve(AppConfig(device="cpu"))


@pytest.fixture
def served(monkeypatch, quick_repaint):
    """The page's address."""
    pytest.importorskip("gradio")
    from app.__main__ import serve

    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"test": 50})
    page = serve(AppConfig(port=7879, device="cpu"))
    yield page.local_url
    page.close()


def test_the_page_in_a_browser(served, tmp_path):
    """Each tab is used, and nothing is asked of anyone else.

    Needs gradio, playwright and a Chromium; the screenshots are left in pytest's folder.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        for name, use in TABS.items():
            page.get_by_role("tab", name=name, exact=True).click()
            use(page)
            page.screenshot(path=tmp_path / f"{name.strip('?')}.png")
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((served, "data:", "blob:"))]
    assert not elsewhere


def use_draw(page):
    page.get_by_label("A digit or a number").fill("5")
    page.get_by_role("button", name="Next seed").click()
    wait_for(lambda: agreement(read(cells(shown(page), 3)), "5" * 64) > 0.9)
    assert "64 images" in page.content()
    page.get_by_label("A digit or a number").fill("5x")
    page.get_by_text("labels 5,x: must name classes among").wait_for()
    page.get_by_label("A digit or a number").fill("")
    wait_for(lambda: len(set(read(cells(shown(page), 3)))) == 10)


def use_watch(page):
    page.get_by_text("at sigma = 0.0").first.wait_for()
    before = shown(page)
    page.get_by_label("number input for Shown after step").fill("1")
    wait_for(lambda: shown(page) != before)


def use_complete(page):
    page.get_by_role("button", name="Load a test digit").locator("visible=true").click()
    page.get_by_role("button", name="Complete it").click()
    page.get_by_text("nothing is missing").wait_for()
    page.get_by_label("Color").locator("visible=true").click()
    page.locator("button[style*='rgb(255, 0, 0)']").locator("visible=true").click()
    page.get_by_label("Brush", exact=True).locator("visible=true").click()
    stroke(page, 60)
    page.get_by_role("button", name="Complete it").click()
    page.get_by_text("8 images in").wait_for(timeout=60_000)
    known, *drawn = cells(shown(page), 4)
    missing = known == GREY
    assert 20 < missing.sum() < 200 and missing[..., 14:].sum() == missing.sum()
    assert all((image == known)[~missing].all() for image in drawn)


def stroke(page, right):
    """Down the visible canvas with the mouse, so many pixels right of its middle."""
    box = page.locator("canvas").locator("visible=true").first.bounding_box()
    x, y = box["x"] + box["width"] / 2 + right, box["y"] + box["height"] / 2
    page.mouse.move(x, y - 80)
    page.mouse.down()
    page.mouse.move(x, y + 80, steps=10)
    page.mouse.up()


def use_between(page):
    page.get_by_text("10 images in").wait_for()
    assert agreement(read(cells(shown(page), 4)), "7" * 10) > 0.7


def use_opinion(page):
    """A stroke by the mouse is a one."""
    stroke(page, 0)
    page.get_by_role("button", name="What is it?").click()
    page.get_by_text("240 calls of U-Net").wait_for(timeout=60_000)
    verdicts = page.get_by_test_id("label-output-value").locator("visible=true")
    assert [text.strip() for text in verdicts.all_inner_texts()] == ["1", "1"]


TABS = {
    "Draw": use_draw,
    "Watch": use_watch,
    "Complete": use_complete,
    "Between": use_between,
    "What is it?": use_opinion,
}


def shown(page):
    """The first picture that the page shows."""
    place = page.locator("img").locator("visible=true").first
    place.wait_for()
    return Image.open(io.BytesIO(page.request.get(place.get_attribute("src")).body()))


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
