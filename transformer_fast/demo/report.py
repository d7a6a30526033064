"""The demo's report: one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from importlib import resources

from transformer_fast.demo.results import DemoResults


def render(results: DemoResults, picture: bytes) -> str:
    """The page, with the PNG ``picture`` inside."""
    from jinja2 import Environment, StrictUndefined

    # Sentences and generated text go into the page: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    return template.render(results=results, picture=base64.b64encode(picture).decode("ascii"))
