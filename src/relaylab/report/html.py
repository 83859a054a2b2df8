"""Self-contained HTML pages: Jinja templates, and images as data URIs."""

from base64 import b64encode
from io import BytesIO
from typing import Any, Literal

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from relaylab.data.geometry import Pixels
from relaylab.outside.showing import html
from relaylab.report.style import SCHEME_COLOURS, figure_text


def render_template(package: str, name: str, **values: Any) -> str:
    """Render a template of a package; it may extend "base.html.j2" of `relaylab.report`."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("relaylab.report", ".")])
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(colours=SCHEME_COLOURS, **values)


def _escaped(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else Markup(html(value))


def svg_uri(picture: str | Figure) -> str:
    """Return SVG text, or a figure, as a data URI."""
    text = picture if isinstance(picture, str) else figure_text(picture)
    return _data_uri("svg+xml", text.encode())


def image_uri(pixels: Pixels, kind: Literal["jpeg", "png"] = "jpeg") -> str:
    """Return pixels, uint8 (h, w, 3), as the data URI of an image."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return _data_uri(kind, file.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
