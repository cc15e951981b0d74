"""The page in Gradio: what is where, and which function answers to what.

It needs nothing but its own server: no font, script or count of visits from elsewhere, and the
policy sent with every answer lets the browser ask nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prototok.demo import draw, play
from prototok.demo.play import Film, Walk
from prototok.model.frozen_lm import FrozenLM

EXAMPLES = (
    "Call me Ishmael.",
    "It was the best of times, it was the worst of times",
    "To be, or not to be: that is the question.",
)
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: data: "
    "blob:; base-uri 'self'; form-action 'self'"
)
_STRAIGHT = "straight segment"
_WAYS = {_STRAIGHT: False, "Bezier curve": True}  # and whether they bend
_HERE = Path(__file__).parent
_ABOUT = (
    "Two vectors, e and m, are fitted to a frozen model so that the input [e, m, …, m] gives the "
    "whole text back in one forward pass. Twice here, from two seeds."
)


class _Policy:
    """Sends the policy with every page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, answer)


def page(lm: FrozenLM) -> gr.Blocks:
    """Lay the page out for one model."""
    with gr.Blocks(title="prototok", analytics_enabled=False) as blocks:
        gr.Markdown(f"# A text in two vectors\n{_ABOUT} The model: {lm.identity.name}.")
        text = gr.Textbox(EXAMPLES[1], label="Text", elem_id="text", lines=2, max_lines=6)
        gr.Examples([[one] for one in EXAMPLES], text, label="Or one of these")
        pace = gr.Slider(0, 0.5, 0.08, label="Seconds that every change is shown")
        with gr.Row():
            go = gr.Button("Fit", variant="primary", elem_id="fit")
            stop = gr.Button("Stop", elem_id="stop")
        says = gr.HTML(elem_id="says")
        with gr.Column(visible=False) as watched:
            gr.Markdown("## Watch it being fitted")
            gr.HTML(draw.key())
            now = gr.HTML(elem_id="now")
            step = gr.Slider(0, 1, 0, step=1, label="Updates made", elem_id="step")
            story = gr.HTML(elem_id="story")
        with gr.Column(visible=False) as ended:
            gr.Markdown("## Decode")
            decode = gr.Button("Decode, one forward pass each", elem_id="decode")
            came = gr.HTML(elem_id="came")
            margins = gr.HTML(elem_id="margins")
            gr.Markdown("## Walk from one solution to the other")
            kind = gr.Radio(list(_WAYS), value=_STRAIGHT, label="Way", elem_id="way")
            place = gr.Slider(0, 1, 0, step=0.01, label="t, drag it", elem_id="t")
            path = gr.HTML(elem_id="path")
        film, way = gr.State(), gr.State()

        def fit(typed: str, seconds: float) -> Iterator[dict[Any, Any]]:
            try:
                begun = play.film_of(lm, typed)
            except ValueError as error:
                yield {says: draw.sentence(str(error), "bad")}
                return
            yield {ended: gr.Column(visible=False), came: "", film: None, way: None}
            for _ in play.watch(begun, seconds):
                yield {
                    says: draw.sentence(f"Update {begun.step} of at most {begun.most} …"),
                    now: draw.solutions(begun, begun.step),
                    story: draw.story(begun),
                    step: gr.Slider(maximum=max(1, begun.step), value=begun.step),
                    watched: gr.Column(visible=True),
                }
            straight = play.walk(begun)
            yield {
                says: draw.sentence(*draw.outcome(begun)),
                ended: gr.Column(visible=True),
                margins: draw.margins(begun),
                kind: _STRAIGHT,
                place: 0,
                path: draw.path(straight, 0, False),
                film: begun,
                way: straight,
            }

        def back(begun: Film | None, updates: float) -> Any:
            return gr.skip() if begun is None else draw.solutions(begun, int(updates))

        def read(begun: Film | None) -> Any:
            return gr.skip() if begun is None else draw.verdict(begun, play.decoded(begun))

        def go_to(on: Walk | None, t: float, name: str) -> Any:
            return gr.skip() if on is None else draw.path(on, t, _WAYS[name])

        def choose(on: Walk | None, t: float, name: str) -> Iterator[dict[Any, Any]]:
            if on is None:
                return
            if _WAYS[name] and on.curve is None:
                yield {path: draw.sentence("Fitting the curve; some seconds …")}
                on = play.bend(on)
            yield {path: draw.path(on, t, _WAYS[name]), way: on}

        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        shown = {
            says,
            now,
            story,
            step,
            watched,
            ended,
            came,
            margins,
            kind,
            place,
            path,
            film,
            way,
        }
        fitting = gr.on([go.click, text.submit], fit, [text, pace], shown, show_progress="hidden")
        stop.click(lambda: draw.sentence("Stopped."), None, says, cancels=[fitting])
        step.input(back, [film, step], now, **quick)
        decode.click(read, film, came, show_progress="hidden")
        place.input(go_to, [way, place, kind], path, **quick)
        kind.input(choose, [way, place, kind], {path, way}, show_progress="hidden")
    return blocks


def serve(lm: FrozenLM, port: int | None, browser: bool) -> gr.Blocks:
    """Serve the page on this machine alone, from threads; `local_url` says where.

    Raises OSError where the port is taken.
    """
    blocks = page(lm)
    blocks.queue(default_concurrency_limit=1)
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(font=system, font_mono=["ui-monospace", "monospace"])
    blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, quiet=True,
        prevent_thread_lock=True, theme=theme, css_paths=_HERE / "page.css", ssr_mode=False,
        footer_links=[], app_kwargs={"middleware": [Middleware(_Policy)]},
    )  # fmt: skip
    return blocks
