"use strict";
(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const svg = document.querySelector("#stage svg"), stage = $("stage"), map = $("map");
const [BW, BH] = D.box, MARGIN = 150;
const hue = id => Math.round(id * 0.618034 % 1 * 360);
const el = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
};
const draw = (parent, tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};
const big = n => n >= 1e9 ? (n / 1e9).toFixed(2) + " G" : n >= 1e6 ? (n / 1e6).toFixed(1) + " M"
  : n >= 1e3 ? (n / 1e3).toFixed(1) + " k" : String(n);
const tail = (text, size) => text.length > size ? "…" + text.slice(1 - size) : text;
const byName = new Map(D.nodes.map((n, k) => [n.name, k]));
const places = new Map(D.groups.map((g, k) => [g.id, k]));
const index = id => places.get(id) ?? -1;
const carriers = D.groups.map(() => []);
D.nodes.forEach((n, k) => n.groups.forEach(([g]) => carriers[index(g)]?.push(k)));

// -- the network ----------------------------------------------------------------------------------
const world = draw(svg, "g", {});
const view = { x: 0, y: 0, scale: 1 };
for (const [name, first, last] of D.bands) {
  const [a, b] = [D.nodes[first].y, D.nodes[last].y].sort((p, q) => p - q);
  draw(world, "rect", { class: "band", x: -9, y: a - 7, width: 4, height: b - a + BH + 14, rx: 2 });
  for (let y = a + BH / 2 + 4; y <= b + BH; y += 552)
    draw(world, "text", { class: "band-name", x: -15, y }, tail(name, 20));
}
const wires = D.wires.map(([from, to, lane]) => {
  const a = D.nodes[from], b = D.nodes[to], g = a.groups[0];
  const x = a.x + BW / 2, X = b.x + BW / 2, y = a.y + BH, Y = b.y;
  let path = `M${x} ${y}C${x} ${(y + Y) / 2} ${X} ${(y + Y) / 2} ${X} ${Y}`;
  if (lane !== null) {
    const s = a.y + BH - 7, t = b.y + 7;
    path = `M${a.x + BW} ${s}H${lane - 6}q6 0 6 6V${t - 6}q0 6 -6 6H${b.x + BW}`;
  }
  return draw(world, "path", { class: `wire ${b.joins} ${g ? "" : "bare"}`, d: path,
    style: g ? `--h:${hue(g[0])}` : "" });
});
const boxes = D.nodes.map((n, k) => {
  const pinned = n.groups.some(([g]) => D.groups[index(g)]?.pins.length);
  const box = draw(world, "g", { class: `node${pinned ? " pinned" : ""}`, "data-node": n.name,
    transform: `translate(${n.x} ${n.y})` });
  const total = n.groups.reduce((sum, [, count]) => sum + count, 0);
  if (!total) draw(box, "rect", { class: "plain", width: BW, height: BH, rx: 4 });
  let x = 0;
  for (const [g, count] of n.groups) {
    const width = BW * count / total;
    draw(box, "rect", { class: "fill", x, width, height: BH, rx: total === count ? 4 : 0,
      style: `--h:${hue(g)}` });
    x += width;
  }
  const known = n.groups.map(([g]) => D.groups[index(g)]).filter(Boolean);
  const size = known.reduce((sum, g) => sum + g.size, 0);
  let left = 0;
  for (const what of ["dead", "constant"]) {
    const width = BW * known.reduce((sum, g) => sum + g[what], 0) / (size || 1);
    if (width) draw(box, "rect", { class: what, x: left, y: BH - 5, width, height: 5 });
    left += width;
  }
  draw(box, "rect", { class: "box", width: BW, height: BH, rx: 4 });
  if (pinned) draw(box, "circle", { class: "lock", cx: BW - 8, cy: 8, r: 4 });
  draw(box, "text", { class: "label", x: 7, y: 12 }, tail(n.label, 25));
  const what = (n.name.startsWith(n.kind) ? "" : n.kind + " ") + n.shape.join("×");
  const room = 30 - what.length;
  const inside = n.label !== n.module && n.module && room > 6 ? ` in ${tail(n.module, room)}` : "";
  draw(box, "text", { class: "kind", x: 7, y: 23 }, tail(what, 38) + inside);
  draw(box, "title", {}, `${n.name}: ${n.kind}\n${n.module}\n${n.line}`);
  box.addEventListener("click", () => dragged || selectNode(k));
  return box;
});

// -- moving about ---------------------------------------------------------------------------------
let dragged = false;
const seen = boxes.map(() => true);
const cull = () => {  // what is out of sight is not laid out
  const top = -view.y / view.scale - 300;
  const bottom = (stage.clientHeight - view.y) / view.scale + 300;
  D.nodes.forEach((n, k) => {
    const visible = n.y > top && n.y < bottom;
    if (visible !== seen[k]) boxes[k].style.display = visible ? "" : "none";
    seen[k] = visible;
  });
  world.classList.toggle("far", view.scale < 0.3);
};
const place = () => {
  world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
  cull();
  drawMap();
};
const zoom = (factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) => {
  const before = view.scale;
  view.scale = Math.max(0.004, Math.min(3, before * factor));
  view.x = x - (x - view.x) * view.scale / before;
  view.y = y - (y - view.y) * view.scale / before;
  place();
};
const start = () => {
  const room = stage.clientWidth - 40;
  view.scale = Math.min(1.15, Math.max(0.45, room / (D.width + MARGIN)));
  view.x = Math.max(MARGIN * view.scale, (room - (D.width - MARGIN) * view.scale) / 2);
  view.y = 24;
  place();
};
const fit = () => {
  view.scale = Math.min((stage.clientHeight - 30) / D.height,
    (stage.clientWidth - 60) / (D.width + MARGIN));
  view.x = MARGIN * view.scale + 10;
  view.y = 15;
  place();
};
const show = k => {
  const n = D.nodes[k];
  const x = view.x + n.x * view.scale, y = view.y + n.y * view.scale;
  if (view.scale < 0.45) view.scale = 0.9;
  if (x < 20 || x > stage.clientWidth - BW * view.scale - 40)
    view.x = stage.clientWidth / 3 - n.x * view.scale;
  if (y < 40 || y > stage.clientHeight - 80 || view.y + n.y * view.scale !== y)
    view.y = stage.clientHeight / 3 - n.y * view.scale;
  place();
};
svg.addEventListener("wheel", event => {
  event.preventDefault();
  if (event.ctrlKey || event.metaKey)
    return zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  const step = event.deltaMode ? 30 : 1;
  view.x -= (event.shiftKey ? event.deltaY : event.deltaX) * step;
  view.y -= (event.shiftKey ? 0 : event.deltaY) * step;
  place();
}, { passive: false });
let from = null;
svg.addEventListener("pointerdown", event => { from = [event.clientX, event.clientY];
  dragged = false; });
window.addEventListener("pointermove", event => {
  if (!from) return;
  const dx = event.clientX - from[0], dy = event.clientY - from[1];
  if (!dragged && Math.hypot(dx, dy) < 4) return;
  dragged = true;
  stage.classList.add("drag");
  view.x += dx; view.y += dy;
  from = [event.clientX, event.clientY];
  place();
});
window.addEventListener("pointerup", () => { from = null; stage.classList.remove("drag"); });

// -- the strip that shows all of it ---------------------------------------------------------------
const drawMap = () => {
  const height = map.height = stage.clientHeight, width = map.width = 30;
  const pen = map.getContext("2d"), unit = height / (D.height || 1);
  const style = getComputedStyle(document.documentElement);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  D.nodes.forEach((n, k) => {
    const g = n.groups[0];
    pen.globalAlpha = marked && !marked.has(k) ? 0.15 : 1;
    pen.fillStyle = g ? `hsl(${hue(g[0])} 55% ${dark ? 45 : 65}%)` : style.getPropertyValue("--line");
    pen.fillRect(4, n.y * unit, 20, Math.max(1, BH * unit));
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2;
  pen.strokeRect(1, -view.y / view.scale * unit, 27, height / view.scale * unit);
};
const jump = event => {
  if (event.buttons !== 1) return;
  view.y = stage.clientHeight / 2 - event.offsetY / map.height * D.height * view.scale;
  place();
};
map.addEventListener("pointerdown", jump);
map.addEventListener("pointermove", jump);

// -- what is selected -----------------------------------------------------------------------------
let marked = null, here = -1, hits = [], chosen = null;
const mark = nodes => {
  marked = nodes && new Set(nodes);
  world.classList.toggle("busy", Boolean(marked));
  boxes.forEach((box, k) => box.classList.toggle("on", Boolean(marked?.has(k))));
  D.wires.forEach(([a, b], k) =>
    wires[k].classList.toggle("on", Boolean(marked?.has(a) && marked.has(b))));
  drawMap();
};
const at = k => {
  boxes[here]?.classList.remove("here");
  here = k;
  boxes[here]?.classList.add("here");
};
const where = (op, node, line) => {
  const box = el("div", { class: "where" });
  const k = byName.get(node);
  if (op) box.append(op + " in ");
  box.append(k === undefined ? node
    : el("button", { class: "jump", onclick: () => { at(k); show(k); } }, node));
  if (line) box.append(` at ${line}`);
  if (D.code[line]) box.append(el("code", {}, D.code[line]));
  return box;
};
const chip = g => el("button", { class: "jump", onclick: () => selectGroup(g.id) },
  el("span", { class: "swatch", style: `background:hsl(${hue(g.id)} var(--sat) var(--lum))` }),
  `group ${g.id}`);
const list = (title, rows) => rows.length ? [el("h3", {}, title), el("ul", {}, ...rows)] : [];
const bar = g => {
  const parts = [["dead", g.dead], ["constant", g.constant], ["live", g.size - g.dead - g.constant]];
  return [
    el("div", { class: "bar" }, ...parts.map(([name, n]) =>
      el("i", { class: name, style: `width:${100 * n / (g.size || 1)}%` }))),
    el("div", {}, ...parts.map(([name, n]) =>
      el("span", { class: "key" }, el("i", { class: name }), `${n} ${name}`))),
  ];
};
const nodeOf = member => {  // the node of the innermost submodule that holds a parameter
  for (let name = member; name.includes("."); ) {
    name = name.slice(0, name.lastIndexOf("."));
    const k = D.nodes.findIndex(n => n.module === name);
    if (k >= 0) return k;
  }
  return -1;
};
const describe = g => {
  const out = D.links.filter(l => l[0] === g.id), into = D.links.filter(l => l[1] === g.id);
  const linked = (l, other) => el("li", {}, chip(D.groups[index(other)]), ` (${l[2]})`,
    where("", l[3], l[4]));
  return [
    el("div", {}, `${g.size} channels, ${g.removable} can go; costs ${big(g.macs)} MACs`), ...bar(g),
    ...list("Why it is pinned", g.pins.map(p => el("li", { class: "pin" },
      `${p[0]} channels: ${p[1]}`, where(p[2], p[3], p[4])))),
    ...list("In equal blocks", g.blocks.map(b => el("li", {}, b[0].join(" × "),
      where("", b[1], b[2])))),
    ...list(`Members (${g.members.length})`, g.members.map(([name, size]) => {
      const k = nodeOf(name);
      const label = `${name} (${size})`;
      return el("li", { class: "member" }, k < 0 ? label
        : el("button", { class: "jump", onclick: () => { at(k); show(k); } }, label));
    })),
    ...list("Tied together by", g.ties.map(t => el("li", {}, `${t[0]} = ${t[1].join(", ")}`,
      where(t[2], t[3], t[4])))),
    ...list("Feeds", out.map(l => linked(l, l[1]))),
    ...list("Fed by", into.map(l => linked(l, l[0]))),
  ];
};
function selectGroup(id, move = true) {
  const g = D.groups[index(id)];
  if (!g) return;
  chosen = id;
  mark(carriers[index(id)]);
  $("detail").replaceChildren(
    el("h2", {}, el("span", { class: "swatch",
      style: `background:hsl(${hue(id)} var(--sat) var(--lum))` }), `Group ${id}: ${g.name}`),
    ...describe(g), el("p", {}, el("button", { onclick: clear }, "Show all")));
  document.querySelectorAll(".row").forEach(row =>
    row.setAttribute("aria-current", String(Number(row.dataset.group) === id)));
  if (move && carriers[index(id)].length) { at(carriers[index(id)][0]); show(here); }
  document.querySelector("aside").scrollTop = 0;
  history.replaceState(null, "", `#group=${id}`);
}
function selectNode(k) {
  const n = D.nodes[k], groups = n.groups.map(([g]) => D.groups[index(g)]).filter(Boolean);
  at(k);
  if (groups.length) selectGroup(groups[0].id, false);
  else { chosen = null; mark([k]); $("detail").replaceChildren(); }
  $("detail").prepend(el("h2", {}, `${n.name}: ${n.kind}`),
    el("div", { class: "soft" }, [n.module, n.shape.join(" × ")].filter(Boolean).join(", ")),
    where("", n.name, n.line), ...(groups.length > 1
      ? [el("p", {}, "Carries ", ...groups.flatMap(g => [chip(g), " "]))] : []),
    ...(groups.length ? [] : [el("p", {}, "No parameter's channels are in it.")]));
}
function clear() {
  chosen = null;
  at(-1);
  mark(hits.length ? hits : null);
  $("detail").replaceChildren();
  document.querySelectorAll(".row").forEach(row => row.removeAttribute("aria-current"));
  history.replaceState(null, "", location.pathname + location.search);
}

// -- groups and search ----------------------------------------------------------------------------
const listGroups = () => {
  const key = $("sort").value, only = hits.length
    ? new Set(hits.flatMap(k => D.nodes[k].groups.map(([g]) => g))) : null;
  const shown = D.groups.filter(g => !only || only.has(g.id));
  if (key !== "id") shown.sort((a, b) => b[key] - a[key]);
  $("groups").replaceChildren(...shown.map(g => el("button",
    { class: "row", "data-group": g.id, onclick: () => selectGroup(g.id) },
    el("span", {}, el("span", { class: "swatch",
      style: `background:hsl(${hue(g.id)} var(--sat) var(--lum))` }), g.name),
    el("span", {}, String(g.size)),
    el("small", {}, [`${g.members.length} ${g.members.length === 1 ? "axis" : "axes"}`,
      `${big(g.macs)} MACs`,
      g.removable ? `${g.removable} can go` : "", g.pins.length ? "pinned" : ""]
      .filter(Boolean).join(", ")))));
};
const search = () => {
  const text = $("search").value.trim().toLowerCase();
  hits = text ? D.nodes.flatMap((n, k) =>
    [n.name, n.module, n.kind].some(s => s.toLowerCase().includes(text)) ? [k] : []) : [];
  $("found").textContent = text ? `${hits.length} found` : "";
  mark(text ? hits : null);
  listGroups();
};
const next = step => {
  if (!hits.length) return;
  const place = hits.indexOf(here);
  const k = hits[((place < 0 && step < 0 ? 0 : place) + step + hits.length) % hits.length];
  selectNode(k);
  mark(hits);
  show(k);
};
$("search").addEventListener("input", search);
$("search").addEventListener("keydown", event => {
  if (event.key === "Enter") next(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") { $("search").value = ""; search(); clear(); svg.focus(); }
});
$("sort").addEventListener("change", listGroups);
$("in").addEventListener("click", () => zoom(1.3));
$("out").addEventListener("click", () => zoom(1 / 1.3));
$("fit").addEventListener("click", fit);
$("keys").addEventListener("click", () => { $("help").hidden = !$("help").hidden; });
const keys = {
  "/": () => $("search").focus(), "+": () => zoom(1.3), "=": () => zoom(1.3),
  "-": () => zoom(1 / 1.3), "0": fit, "?": () => $("keys").click(), "Escape": clear,
  "g": () => document.querySelector(".row")?.focus(),
  "j": () => step(1), "k": () => step(-1), "ArrowDown": () => step(1), "ArrowUp": () => step(-1),
};
const step = by => {
  const k = Math.max(0, Math.min(D.nodes.length - 1, here + by));
  selectNode(k);
  show(k);
};
document.addEventListener("keydown", event => {
  const inside = event.target.closest("input, select, aside");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (inside && (inside.tagName !== "ASIDE" || event.key.startsWith("Arrow"))) return;
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
window.addEventListener("resize", drawMap);

const pinned = D.groups.filter(g => g.pins.length).length;
$("summary").textContent = `${D.nodes.length} nodes, ${D.groups.length} groups, ${pinned} with pins, `
  + `${D.groups.reduce((sum, g) => sum + g.removable, 0)} channels can go`;
listGroups();
start();
const wanted = location.hash.match(/^#group=(\d+)$/);
if (wanted) selectGroup(Number(wanted[1]));
document.body.dataset.ready = String(Math.round(performance.now()));
})();
