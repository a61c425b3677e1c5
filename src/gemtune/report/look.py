"""What a report adds to the common look, and the read-out of its charts."""

STYLE = """
:root { --c1: #2460b8; --c2: #c4480c; --c3: #0c7d6c; --c4: #8a3ab0; --c5: #94690a; --c6: #bd2a74;
  --c7: #55606e; --c8: #4d8420; --good: #1f7a33; --warn: #8a5a00; --warn-panel: #fff6e0; }
@media (prefers-color-scheme: dark) { :root {
  --c1: #7db0f2; --c2: #f6975c; --c3: #4ccab4; --c4: #cd9af0; --c5: #dcb548; --c6: #f382b6;
  --c7: #b4bdc8; --c8: #93d06d; --good: #6fcf83; --warn: #f0c870; --warn-panel: #2e2714; } }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); } .c8 { --c: var(--c8); }
header { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: baseline; }
header h1 { margin: 0; overflow-wrap: anywhere; }
.status { border: 1px solid currentcolor; border-radius: 1rem; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; color: var(--warn); }
.status.finished { color: var(--good); } .status.failed, .status.hung { color: var(--bad); }
.notices { border: 1px solid var(--warn); border-radius: .5rem; background: var(--warn-panel);
  padding: .5rem 1rem .5rem 2rem; margin: .75rem 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr));
  gap: .75rem; margin: 1rem 0; }
.figures div { border: 1px solid var(--line); border-radius: .5rem; background: var(--panel);
  padding: .5rem .75rem; }
.figures span { display: block; font-size: .8rem; color: var(--quiet); }
.figures b { display: block; font-size: 1.25rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: .75rem; }
.chart { border: 1px solid var(--line); border-radius: .5rem; background: var(--panel);
  padding: .6rem 1.1rem .5rem .4rem; display: flex; flex-direction: column; min-width: 0; }
.chart figcaption { padding-left: .5rem; } .chart figcaption b { color: var(--ink);
  font-size: .95rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .1rem 0 .5rem .5rem;
  font-size: .8rem; color: var(--quiet); margin-bottom: auto; }
.legend span { overflow-wrap: anywhere; } .legend b { color: var(--ink); font-weight: 500;
  font-variant-numeric: tabular-nums; }
i[class] { display: inline-block; width: 1rem; height: 0; margin-right: .35rem;
  vertical-align: middle; border-top: 3px solid var(--c); }
i.mark { border-top: 2px dotted var(--quiet); } i.level { border-top: 2px dotted var(--ink); }
i.dashed { border-top-style: dashed; }
.plot { display: grid; grid-template-columns: 3.6rem minmax(0, 1fr);
  grid-template-rows: 11rem 1.4rem; font-size: .75rem; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
.y, .x, .area { position: relative; } .x { grid-column: 2; }
.y span { position: absolute; right: .5rem; transform: translateY(50%); white-space: nowrap; }
.x span { position: absolute; top: .2rem; transform: translateX(-50%); white-space: nowrap; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; stroke: var(--c); stroke-linejoin: round; }
path.grid { stroke: var(--line); } path.mark { stroke: var(--quiet); stroke-dasharray: 2 3; }
path.level { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 3; }
path.curve { stroke-width: 1.75; } path.curve.dashed { stroke-dasharray: 5 4; }
path.pale { opacity: .3; } path.dots { stroke-width: 6; stroke-linecap: round; }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--quiet);
  pointer-events: none; }
.readout { position: absolute; top: 0; z-index: 1; pointer-events: none; white-space: nowrap;
  background: var(--panel); color: var(--ink); border: 1px solid var(--line);
  border-radius: .35rem; padding: .25rem .5rem; box-shadow: 0 1px 4px #0003; }
.readout div { white-space: nowrap; }
.wide { overflow-x: auto; } th, td { vertical-align: top; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: break-word; }
td.text:last-child:nth-child(2), td.text:last-child:nth-child(3), .answer { min-width: 7rem;
  overflow-wrap: anywhere; } .answer { display: block; white-space: pre-wrap; }
table.numbers { width: auto; } .numbers td, .numbers th { padding-right: 2rem; }
td.text:first-child { padding-right: 1rem; }
th, td { border-bottom: 1px solid var(--line); padding-top: .2rem; padding-bottom: .2rem; }
tbody tr:last-child td { border-bottom: 0; }
td:last-child, th:last-child { padding-right: 0; }
td .bar { width: 20rem; max-width: 30vw; background: var(--line); vertical-align: middle;
  text-align: left; line-height: 0; }
td .bar span { display: inline-block; height: 100%; background: var(--bar);
  border-radius: inherit; }
.verdict { white-space: nowrap; overflow-wrap: normal; } .wide + h3, p + h3 { margin-top: 1rem; }
.best { color: var(--good); font-weight: 700; } .good { color: var(--good); }
.keys { columns: 20rem; column-gap: 2rem; }
.keys dl { break-inside: avoid; margin: 0 0 .9rem; } .keys dt { font-weight: 600; }
.keys dd { display: flex; gap: 1rem; justify-content: space-between; margin: 0;
  border-bottom: 1px solid var(--line); font-size: .85rem; }
.keys dd span { color: var(--quiet); } .keys dd b { font-weight: 400; text-align: right;
  overflow-wrap: anywhere; min-width: 0; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; } footer { margin-top: 2rem; font-size: .85rem; color: var(--quiet); }
@media (max-width: 40rem) { table { font-size: .85rem; } section { padding: .6rem .75rem; }
  .numbers td, .numbers th { padding-right: 1rem; } .answer { min-width: 4.2rem; }
  td:first-child .answer { min-width: 7rem; } }
@media print { section, figure { break-inside: avoid; } }
"""

# Values at the pointer. Labels are set as text, never as HTML.
SCRIPT = """
for (const area of document.querySelectorAll(".area")) {
  const data = JSON.parse(area.dataset.curves), made = [];
  const add = (name, parent) => {
    const node = document.createElement("div");
    node.className = name; parent.append(node); return node; };
  const say = v => data.percent ? (100 * v).toFixed(1) + "%"
    : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));
  const nearest = (steps, at) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < at) low = middle; else high = middle; }
    return at - steps[low] < steps[high] - at ? low : high; };
  const clear = () => { while (made.length) made.pop().remove(); };
  const show = event => {
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const at = data.first + share * (data.last - data.first);
    const found = data.lines.map(([label, colour, steps, values]) => {
      const i = nearest(steps, at);
      return {label, colour, step: steps[i], value: values[i]}; });
    const step = found.reduce((a, b) =>
      Math.abs(b.step - at) < Math.abs(a.step - at) ? b : a).step;
    clear();
    const cursor = add("cursor", area), out = add("readout", area);
    made.push(cursor, out);
    const place = (step - data.first) / (data.last - data.first || 1);
    cursor.style.left = 100 * place + "%";
    add("", out).textContent = "step " + step.toLocaleString("en");
    for (const each of found) {
      const row = add("", out), key = document.createElement("i");
      key.className = each.colour;
      const other = each.step === step ? "" : " (step " + each.step.toLocaleString("en") + ")";
      row.append(key, (each.label + " " + say(each.value) + other).trim()); }
    out.style[place < .5 ? "left" : "right"] =
      "calc(" + 100 * (place < .5 ? place : 1 - place) + "% + .6rem)"; };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", clear);
}
"""
