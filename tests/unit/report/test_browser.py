"""The page in a browser: no error, no overflow, light and dark, and a read-out that is right."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from run_folders import chromium, judged, trained, write_run

from gemtune.report import comparison_page, read_run, report_page

BROWSER = chromium()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

NAME = "a_run_whose_name_is_so_long_that_no_phone_has_room_for_it"
# Put behind the page, in the place of its policy: what the page looks like to itself.
PROBE = """<script>
const area = document.querySelector(".area"), box = area.getBoundingClientRect();
area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
const seen = {
  width: document.documentElement.scrollWidth,
  window: innerWidth,
  readout: [...area.querySelectorAll(".readout div")].map(row => row.textContent),
  cursor: area.querySelector(".cursor").getBoundingClientRect().left - box.left - box.width / 2,
  outside: [...document.querySelectorAll(".x span, .y span, .legend span, h1, dd b")].filter(e => {
    const place = e.getBoundingClientRect();
    return place.right > innerWidth || place.left < 0; }).map(e => e.textContent),
};
area.dispatchEvent(new PointerEvent("pointerleave"));
seen.left = area.querySelectorAll(".readout, .cursor").length;
parent.document.title = JSON.stringify(seen);
</script>"""


def browse(page: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run, and of two."""
    folder = tmp_path_factory.mktemp("runs")
    records = [trained(n) | (judged(n, 5 / n) if n % 7 == 1 else {}) for n in range(1, 102)]
    answers = [{"question": "w" * 300, "expected": "x" * 90, "generated": "y" * 90}]
    runs = [
        write_run(folder / name, records[:n], answers=answers, run={"num_steps": 101})
        for name, n in ((NAME, 101), ("b", 51))
    ]
    found = [read_run(run) for run in runs]
    return [report_page(found[0]), comparison_page(found)]


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("which", [0, 1])
def test_it_fits_and_reads_out_what_is_drawn(
    pages: list[str], which: int, width: int, tmp_path: Path
) -> None:
    probed, number = re.subn(r'<meta http-equiv="Content-Security.*?>', "", pages[which])
    assert number == 1
    # In a frame: a window of the browser itself is at least 500 pixels wide.
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(probed + PROBE)}"></iframe>'
    done = browse(f"<!doctype html><title></title>{frame}", tmp_path, "--dump-dom")
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(html.unescape(title[1]))
    assert seen["window"] == width
    assert seen["width"] <= width
    assert seen["outside"] == []
    # The middle of 1 to 101 is step 51; each evaluation is at 1, 8, 15 ... and 50 is the nearest.
    loss = f"{6 / 51:.4g}"
    expected = (
        [f"train {loss}", "eval 0.1 (step 50)"] if which == 0 else [f"{NAME} {loss}", f"b {loss}"]
    )
    assert seen["readout"] == ["step 51", *expected]
    assert abs(seen["cursor"]) < 1.5
    assert seen["left"] == 0


def test_its_policy_lets_its_own_script_run_and_no_other(pages: list[str], tmp_path: Path) -> None:
    done = browse(pages[0], tmp_path, "--dump-dom")
    assert console(done) == []
    evil = "<img src='http://127.0.0.1:9/x.png'><script>document.title = 'taken over'</script>"
    done = browse(pages[0].replace("<main>", f"<main>{evil}"), tmp_path, "--dump-dom")
    assert f"<title>{NAME}</title>" in done.stdout
    assert len(console(done)) == 2 and all("Content Security Policy" in c for c in console(done))


def test_it_is_drawn_in_light_and_in_dark(pages: list[str], tmp_path: Path) -> None:
    shots = []
    for options in ((), ("--force-dark-mode",)):
        picture = tmp_path / f"{len(options)}.png"
        browse(pages[0], tmp_path, "--window-size=1000,1400", f"--screenshot={picture}", *options)
        with Image.open(picture) as image:
            shots.append(image.convert("RGB"))
    light, dark = (shot.getpixel((2, 2)) for shot in shots)
    assert min(light) > 240 and max(dark) < 40
    for shot in shots:
        colours = shot.getcolors(maxcolors=1 << 20)
        # Curves: strong colours, in many places.
        assert sum(n for n, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 100) > 1000
