"""Self-contained HTML pages: templates on the shared base page, and pictures as data URIs."""

from base64 import b64encode
from io import BytesIO
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from relaylab.data.geometry import Pixels
from relaylab.report.style import SCHEME_COLOURS, figure_text


def render_template(package: str, name: str, **values: Any) -> str:
    """Render a template of a package; "base.html.j2", which it extends, is this package's.

    Args:
        package: that holds the template.
        name: of the template.
        values: for it.
    """
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("relaylab.report", ".")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(colours=SCHEME_COLOURS, **values)


def svg_uri(picture: str | Figure) -> str:
    """Return SVG text, or a figure, as a data URI."""
    text = picture if isinstance(picture, str) else figure_text(picture)
    return f"data:image/svg+xml;base64,{b64encode(text.encode()).decode()}"


def image_uri(pixels: Pixels, kind: str = "jpeg") -> str:
    """Return pixels as a data URI.

    Args:
        pixels: uint8 (h, w, 3).
        kind: jpeg or png.
    """
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
