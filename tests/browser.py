"""A page as Chromium shows it: whether its pictures are there, its tables can be read, and its width is used."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

# A script of the tests' own, at the end of a copy of the page, looks at what the browser has made of it.
PROBE = """<script>addEventListener("load", () => {
      const shown = [...document.images].every(i => i.complete && i.naturalWidth > 0);
      const luminance = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(v => {
        v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const page = luminance(getComputedStyle(document.body).backgroundColor);
      const contrast = [...document.querySelectorAll("p, td, th, a, figcaption, caption, summary")].map(e => {
        const ink = luminance(getComputedStyle(e).color);
        return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05); });
      const wide = document.documentElement.scrollWidth > innerWidth;
      const cells = [...document.querySelectorAll("td, tbody th")].filter(e => e.textContent && e.offsetParent);
      const cut = cells.filter(e => e.scrollWidth > e.clientWidth + 1).length;
      const narrow = cells.filter(e => e.clientWidth < 40 && e.textContent.length > 4).length;
      const used = document.querySelector("main").clientWidth / innerWidth;
      const reachable = [...document.querySelectorAll("a, summary")].every(e => e.tabIndex >= 0);
      const outside = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
      document.title = JSON.stringify({shown, contrast: Math.min(...contrast), wide, reachable, outside, cut, narrow,
        used, cells: cells.length, width: innerWidth, images: document.images.length});
    });</script>"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def seen(page: Path, folder: Path, size: str, *, dark: bool = False) -> dict[str, Any]:
    """Return what the browser says of a page with everything unfolded, in a window of a size, such as "1280,900"."""
    binary = chromium()
    assert binary is not None
    copy = folder / "probed.html"
    copy.write_text(page.read_text().replace("<details>", "<details open>") + PROBE)
    command = [binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / ('d' + size)}", f"--window-size={size}", "--virtual-time-budget=5000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += ["--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    return json.loads(title.group(1))


def check(page: Path, folder: Path) -> dict[str, Any]:
    """Look at a page on a desk and, in the dark, on a phone; what it says of the latter."""
    found: dict[str, Any] = {}
    for size, dark in (("1280,900", False), ("390,900", True)):
        found = seen(page, folder, size, dark=dark)
        assert found["shown"], "pictures that are not there"
        assert found["reachable"], "what the keyboard does not reach"
        assert not found["wide"], f"scrolls sideways at {size}"
        assert found["contrast"] >= 4.5, found
        assert found["outside"] == 0, found
        assert (found["cut"], found["narrow"]) == (0, 0), f"cells that cannot be read at {size}: {found}"
        assert found["used"] > 0.9, f"the width is not used at {size}: {found}"
        assert found["cells"] > 100, found
    return found


# Opens all pages of a site in a frame as narrow as a phone, and says what the browser has made of each.
FRAMES = """<body><script>
const pages = PAGES, results = [];
const luminance = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(v => {
  v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
(async () => {
  for (const page of pages) {
    const frame = document.createElement("iframe");
    Object.assign(frame.style, {width: "390px", height: "900px", border: 0});
    frame.src = page;
    document.body.append(frame);
    await new Promise(resolve => { frame.onload = resolve; });
    await new Promise(resolve => setTimeout(resolve, 150)); // the theme lays out the page
    const inside = frame.contentDocument, view = frame.contentWindow;
    const ground = luminance(view.getComputedStyle(inside.body).backgroundColor);
    const text = ["p", "td", "li", "a:not(.headerlink)"].map(tag => `.md-content ${tag}`).join(", ");
    const contrast = [...inside.querySelectorAll(text)].map(e => {
      const ink = luminance(view.getComputedStyle(e).color);
      return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05); });
    results.push({page, width: view.innerWidth, wide: inside.documentElement.scrollWidth,
      missing: [...inside.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
      contrast: Math.min(21, ...contrast), scheme: inside.body.dataset.mdColorScheme});
    frame.remove();
  }
  document.title = JSON.stringify(results);
})();
</script>"""


def framed(site: Path, pages: list[str], *, dark: bool) -> list[dict[str, Any]]:
    """Return what the browser says of a site's pages on a phone; the site must be a folder that can be written."""
    binary = chromium()
    assert binary is not None
    file = site / "frames.html"
    file.write_text(FRAMES.replace("PAGES", json.dumps(pages)))
    command = [binary, "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={site.parent / f'frames{dark}'}", "--window-size=1280,1000"]
    command += [f"--blink-settings=preferredColorScheme={int(not dark)}", "--virtual-time-budget=200000"]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    return json.loads(title.group(1))
