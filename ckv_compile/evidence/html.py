"""A perturbation report as one HTML file that needs nothing beside it, or as one picture."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pictures
from .text import perturbation_table

if TYPE_CHECKING:
    from .perturbation import PerturbationReport

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
  color: #111; background: #fff }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1em; font-size: 12px }}
img {{ max-width: 100% }}
canvas {{ width: 100%; border: 1px solid #999; image-rendering: pixelated; cursor: crosshair }}
#seen {{ min-height: 3em; font-family: ui-monospace, monospace; white-space: pre-wrap }}
#seen b {{ background: #ffe08a }}
</style></head><body>
<h1>{title}</h1>
<pre>{summary}</pre>
<h2>Entries kept</h2>
<p><label>method and budget <select id="which"></select></label>
A row for each KV head of each layer, first layer on top; black is kept. Point at an entry.</p>
<canvas id="map"></canvas>
<div id="seen" aria-live="polite"></div>
{pictures}
<script>
const data = {data};
const which = document.getElementById("which"), canvas = document.getElementById("map");
const seen = document.getElementById("seen"), pen = canvas.getContext("2d");
const rows = data.heads.length;
data.maps.forEach((map, i) => which.add(new Option(map.name, i)));
canvas.width = data.tokens;
canvas.height = rows * 4;
canvas.style.height = Math.max(rows * 5, 120) + "px";
let bits;
function draw() {{
  const raw = atob(data.maps[which.value].bits);
  bits = Uint8Array.from(raw, c => c.charCodeAt(0));
  const image = pen.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y++)
    for (let x = 0; x < canvas.width; x++) {{
      const at = 4 * (y * canvas.width + x), shade = kept(y >> 2, x) ? 0 : 255;
      image.data[at] = image.data[at + 1] = image.data[at + 2] = shade;
      image.data[at + 3] = 255;
    }}
  pen.putImageData(image, 0, 0);
}}
function kept(row, x) {{
  const at = row * data.tokens + x;
  return bits[at >> 3] >> (at & 7) & 1;
}}
canvas.addEventListener("mousemove", event => {{
  const box = canvas.getBoundingClientRect();
  const x = Math.min(Math.floor((event.clientX - box.left) / box.width * data.tokens),
    data.tokens - 1);
  const row = Math.min(Math.floor((event.clientY - box.top) / box.height * rows), rows - 1);
  const [layer, head] = data.heads[row];
  const from = Math.max(x - 12, 0), text = i => data.texts[i] ?? "";
  const bold = document.createElement("b");
  bold.textContent = text(x);
  const parts = (a, b) => Array.from({{length: b - a}}, (_, i) => text(a + i)).join("");
  seen.replaceChildren(
    `layer ${{layer}}, KV head ${{head}}, position ${{x}}: ` +
    `${{kept(row, x) ? "kept" : "evicted"}}\\n`,
    parts(from, x), bold, parts(x + 1, Math.min(x + 13, data.tokens)));
}});
which.addEventListener("change", draw);
draw();
</script></body></html>
"""


def save_perturbation(report: PerturbationReport, path: Path) -> Path:
    """Write the report as ``.html``, ``.json`` or ``.png``; see ``PerturbationReport.save``."""
    kind = path.suffix.lower()
    if kind not in (".html", ".json", ".png"):
        raise ValueError(f"path={str(path)!r}; it takes a name that ends in .html, .json or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".json":
        path.write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")
    elif kind == ".png":
        pictures.save(main_picture(report), path)
    else:
        path.write_text(page(report), encoding="utf-8")
    return path


def main_picture(report: PerturbationReport) -> Any:
    """Heads of the first and last method at the budget in the middle; of one, what it keeps."""
    budget = report.budgets[len(report.budgets) // 2]
    if len(report.methods) < 2:
        return pictures.kept_map(report, report.methods[0], budget)
    return pictures.head_maps(report, budget, (report.methods[0], report.methods[-1]))


def page(report: PerturbationReport) -> str:
    """The whole page."""
    figures = [("Budget", pictures.perturbation_curves(report))]
    if len(report.methods) > 1:
        pair = (report.methods[0], report.methods[-1])
        figures += [
            (f"Heads at budget {budget}", pictures.head_maps(report, budget, pair))
            for budget in report.budgets
        ]
    parts = [f"<h2>{html.escape(name)}</h2>\n{_image(figure, name)}" for name, figure in figures]
    # "</" inside a script would end it.
    data = json.dumps(_data(report)).replace("</", "<\\/")
    return _PAGE.format(
        title=f"What eviction keeps of {report.tokens:,} tokens",
        summary=html.escape(perturbation_table(report)),
        pictures="\n".join(parts),
        data=data,
    )


def _image(figure: Any, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    coded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{coded}">'


def _data(report: PerturbationReport) -> dict[str, Any]:
    """What the page's script draws: a bit for each position of each KV head, row by row."""
    sites = list(dict.fromkeys(row.site for row in report.rows))
    first = (report.methods[0], report.budgets[0])
    heads = [(i, h) for i, site in enumerate(sites) for h in range(len(report.kept[site, *first]))]
    maps = []
    for budget in report.budgets:
        for method in report.methods:
            bits = bytearray((len(heads) * report.tokens + 7) // 8)
            rows = [row for site in sites for row in report.kept[site, method, budget].tolist()]
            for i, positions in enumerate(rows):
                for position in positions:
                    at = i * report.tokens + position
                    bits[at >> 3] |= 1 << (at & 7)
            maps.append({"name": f"{method} at {budget}", "bits": base64.b64encode(bits).decode()})
    return {"tokens": report.tokens, "heads": heads, "maps": maps, "texts": list(report.texts)}
