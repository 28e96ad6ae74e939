"use strict";
// One picture of a pool from a stream of frames: GET live sends one about once a second.
const $ = (id) => document.getElementById(id);
const KEPT_S = 600, HOT = 0.9, DENSE_ABOVE = 24, FLIGHT_MS = 1100, MAX_FLIGHTS = 60, MAX_MOVES_TOLD = 40;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const state = { frame: null, rows: new Map(), where: new Map(), paths: new Map(), chosen: null,
  history: [], flights: [], bounds: null, said: "", gone: new Map() };
let key = sessionStorage.getItem("llumsched-key") || "";

// ---- talking to the server ---------------------------------------------------------------------
const headers = () => (key ? { authorization: `Bearer ${key}` } : {});
async function call(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(body) });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error?.message || said.message || `status ${answer.status}`);
  return said;
}
async function listen() {
  for (;;) {
    try {
      const answer = await fetch("live", { headers: headers() });
      if (answer.status === 401) {
        key = prompt("This server asks for its API key:") || "";
        sessionStorage.setItem("llumsched-key", key);
        if (!key) { connection("the API key is needed", true); return; }
        continue;
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      await read(answer.body.getReader());
      throw new Error("the stream ended");
    } catch (error) {
      connection(`not connected: ${error.message}; trying again`, true);
      await new Promise((done) => setTimeout(done, 1500));
    }
  }
}
async function read(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    const last = parts.map((p) => p.split("\n").filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join(""))
      .filter(Boolean).map((text) => JSON.parse(text));
    for (const frame of last) take(frame);
  }
}
function connection(text, lost) { const p = $("connection"); p.textContent = text; p.classList.toggle("lost", !!lost); }

// ---- a frame -----------------------------------------------------------------------------------
function take(frame) {
  const before = state.frame;
  frame.byInstance = new Map(frame.instances.map((i) => [i.id, []]));
  frame.byId = new Map();
  for (const r of frame.requests) {
    frame.byId.set(r.id, r);
    if (frame.byInstance.has(r.instance)) frame.byInstance.get(r.instance).push(r);
  }
  state.frame = frame;
  if (frame.error) connection(frame.error, true);
  else connection(`live · ${frame.requests.length} requests · scheduler up ${span(frame.scheduler_age_s)}`);
  $("policy").textContent = `policy ${frame.policy}`;
  follow(before, frame);
  remember(frame);
  drawTiles(frame);
  drawPool(frame);
  drawVerdict(frame);
  drawDetail();
}
function follow(before, frame) {
  let moved = 0;
  for (const r of frame.requests) {
    const path = state.paths.get(r.id) || [];
    const last = path[path.length - 1];
    if (r.instance && (!last || last.instance !== r.instance)) {
      path.push({ instance: r.instance, after: r.outputs, at: frame.wall_s });
      state.paths.set(r.id, path);
      if (last && ++moved <= MAX_MOVES_TOLD) { fly(r, last.instance, r.instance);
        event(`${short(r.external_id)} moved: ${last.instance} → ${r.instance}, after ${r.outputs} tokens`); }
    }
  }
  if (moved > MAX_MOVES_TOLD) event(`${moved - MAX_MOVES_TOLD} more moved`);
  for (const id of state.paths.keys()) if (!frame.byId.has(id)) state.paths.delete(id);
  if (!before) return;
  const was = new Map(before.instances.map((i) => [i.id, i])), is = new Map(frame.instances.map((i) => [i.id, i]));
  for (const [id, i] of is) {
    if (!was.has(id)) event(`${id} came`);
    else if (was.get(id).state !== i.state) event(`${id} is ${i.state}`, i.state === "draining" ? "warn" : "");
  }
  for (const id of was.keys()) if (!is.has(id)) { event(`${id} is gone`, "bad"); state.gone.set(id, Date.now()); }
}
function remember(frame) {
  const uses = frame.instances.map((i) => (i.total ? (i.total - i.free) / i.total : 0));
  const before = state.history[state.history.length - 1];
  const dt = before ? Math.max(0.2, frame.at_s - before.at) : 1;
  const tokens = frame.num_tokens_passed, done = frame.num_finished;
  const point = { at: frame.at_s, tokens, done,
    tps: before ? Math.max(0, tokens - before.tokens) / dt : 0, rps: before ? Math.max(0, done - before.done) / dt : 0,
    use: uses.length ? uses.reduce((a, b) => a + b, 0) / uses.length : 0,
    spread: uses.length ? Math.max(...uses) - Math.min(...uses) : 0,
    waiting: sum(frame.instances, "waiting") + sum(Object.values(frame.queued)),
    moves: frame.migrations.committed || 0, p50: frame.ttft_p50_s, p99: frame.ttft_p99_s };
  state.history.push(point);
  while (state.history[0].at < frame.at_s - KEPT_S) state.history.shift();
}
const sum = (items, name) => items.reduce((total, item) => total + ((name ? item[name] : item) || 0), 0);
const short = (id) => (id.length > 18 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id);
function span(s) { return s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`; }
function event(text, kind) {
  const li = document.createElement("li"), time = document.createElement("time");
  time.textContent = new Date().toLocaleTimeString();
  li.append(time, text);
  if (kind) li.className = kind;
  $("events").prepend(li);
  while ($("events").children.length > 120) $("events").lastChild.remove();
}

// ---- figures -----------------------------------------------------------------------------------
function smooth(name, n = 5) { const h = state.history.slice(-n); return h.length ? sum(h, name) / h.length : 0; }
const ms = (s) => (s == null ? "–" : s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(s < 10 ? 2 : 1)} s`);
function drawTiles(frame) {
  const now = state.history[state.history.length - 1], held = sum(Object.values(frame.queued));
  const running = sum(frame.instances, "running");
  const tiles = [
    ["Tokens/s", Math.round(smooth("tps")), "", "tps"], ["Running", running, "", null],
    ["Waiting", now.waiting, held ? `${held} held` : "", "waiting"],
    ["TTFT P50", ms(now.p50), "", "p50"], ["TTFT P99", ms(now.p99), "", "p99"],
    ["KV in use", `${Math.round(100 * now.use)} %`, "", "use"],
    ["Imbalance", `${Math.round(100 * now.spread)} %`, "of KV", "spread"],
    ["Migrations", now.moves, rate("moves"), "moves"],
  ];
  const box = $("tiles");
  while (box.children.length < tiles.length) {
    const div = document.createElement("div");
    div.className = "tile";
    div.innerHTML = '<span></span><strong></strong><svg preserveAspectRatio="none" aria-hidden="true"><polyline/></svg>';
    box.append(div);
  }
  tiles.forEach(([name, value, note, series], i) => {
    const tile = box.children[i];
    tile.querySelector("span").textContent = name;
    const strong = tile.querySelector("strong");
    strong.textContent = value;
    if (note) { const s = document.createElement("small"); s.textContent = note; strong.append(s); }
    spark(tile.querySelector("svg"), series);
  });
  $("wanted").textContent = frame.instances.length;
}
function rate(name) {
  const h = state.history;
  if (h.length < 2) return "";
  const from = h.find((p) => p.at > h[h.length - 1].at - 60) || h[0], last = h[h.length - 1];
  return `${Math.max(0, last[name] - from[name])} a minute`;
}
function spark(svg, name) {
  const line = svg.firstElementChild;
  if (!name) { line.setAttribute("points", ""); return; }
  const step = Math.max(1, Math.floor(state.history.length / 120));
  const points = state.history.filter((_, i) => i % step === 0).map((p) => [p.at, name === "moves" ? p.moves - state.history[0].moves : p[name] || 0]);
  const end = points[points.length - 1][0], top = Math.max(1e-9, ...points.map((p) => p[1]));
  svg.setAttribute("viewBox", "0 0 100 22");
  const start = Math.min(points[0][0], end - 30);
  line.setAttribute("points", points.map(([t, v]) => `${(100 * (t - start)) / Math.max(1, end - start)},${20.5 - (19 * v) / top}`).join(" "));
}
function drawVerdict(frame) {
  const p = $("verdict"), hot = frame.instances.filter(isHot), held = sum(Object.values(frame.queued));
  const draining = frame.instances.filter((i) => i.state === "draining");
  const stuck = frame.instances.filter((i) => i.cannot_migrate);
  let [text, kind] = ["Balanced: every instance has room.", "good"];
  if (!frame.instances.length) [text, kind] = ["No instance serves.", "bad"];
  else if (hot.length && hot.length === frame.instances.length) [text, kind] = ["Every instance is full: moving cannot help; more instances would.", "bad"];
  else if (hot.length) [text, kind] = [`${hot.map((i) => i.id).slice(0, 3).join(", ")}${hot.length > 3 ? ` and ${hot.length - 3} more` : ""} ${hot.length > 1 ? "are" : "is"} hot: ${Math.round(100 * use(hot[0]))} % of KV in use${hot[0].waiting ? `, ${hot[0].waiting} waiting` : ""}.`, "bad"];
  else if (draining.length) [text, kind] = [`${draining.map((i) => i.id).join(", ")} ${draining.length > 1 ? "are" : "is"} being drained.`, "warn"];
  if (held) [text, kind] = [`${text} ${held} request${held > 1 ? "s are" : " is"} held by the scheduler.`, "bad"];
  if (stuck.length) text += ` Nothing can move from ${stuck[0].id}: ${stuck[0].cannot_migrate}`;
  if (p.textContent !== text) p.textContent = text;
  p.className = kind;
}
const use = (i) => (i.total ? (i.total - i.free - i.reserved) / i.total : 0);
const isHot = (i) => i.state !== "draining" && (use(i) >= HOT || i.waiting > 2);

// ---- instances ---------------------------------------------------------------------------------
function row(id) {
  let found = state.rows.get(id);
  if (found) return found;
  const div = document.createElement("div");
  div.className = "inst";
  div.innerHTML = '<div class="head"><button type="button"></button><span class="state"></span><span class="right"></span></div><canvas role="img"></canvas>';
  const button = div.querySelector("button"), canvas = div.querySelector("canvas");
  button.textContent = id;
  button.addEventListener("click", () => choose({ instance: id }));
  canvas.addEventListener("click", (e) => { const hit = at(found, e); choose(hit ? { request: hit.id } : { instance: id }); });
  canvas.addEventListener("pointermove", (e) => tip(e, at(found, e)));
  canvas.addEventListener("pointerleave", () => ($("tip").hidden = true));
  found = { id, div, canvas, state: div.querySelector(".state"), right: div.querySelector(".right"), segments: [] };
  state.rows.set(id, found);
  return found;
}
function drawPool(frame) {
  const pool = $("pool");
  pool.classList.toggle("dense", frame.instances.length > DENSE_ABOVE);
  const ids = new Set(frame.instances.map((i) => i.id));
  for (const [id, r] of state.rows) {
    if (ids.has(id)) continue;
    r.div.className = "inst gone";
    if (Date.now() - (state.gone.get(id) || 0) > 6000) { r.div.remove(); state.rows.delete(id); state.gone.delete(id); }
  }
  // First all that is written, then all that is measured, then all that is painted: a measure after
  // a write lays the whole page out, and two hundred of them a frame are seconds.
  for (const instance of frame.instances) {
    const r = row(instance.id);
    if (!r.div.isConnected) pool.append(r.div);
    const hot = isHot(instance);
    set(r.div, "className", `inst ${hot ? "hot" : ""} ${instance.state}`);
    set(r.state, "className", `state ${hot ? "" : instance.state}`);
    set(r.state, "textContent", hot ? "hot" : instance.state);
    set(r.right, "textContent", `${instance.running} running${instance.waiting ? ` · ${instance.waiting} waiting` : ""} · ${Math.round(100 * use(instance))} % · ${instance.step_s ? `${Math.round(1000 * instance.step_s)} ms a step` : "idle"}`);
    const label = `${instance.id}: ${instance.state}, ${Math.round(100 * use(instance))} % of KV in use, ${instance.running} running, ${instance.waiting} waiting`;
    if (r.label !== label) r.canvas.setAttribute("aria-label", (r.label = label));
  }
  for (const r of state.rows.values()) measure(r);
  const style = getComputedStyle(document.documentElement), [l, s, text] = ["--seg-l", "--seg-s", "--text"].map((name) => style.getPropertyValue(name));
  for (const instance of frame.instances) bar(row(instance.id), instance, frame.byInstance.get(instance.id) || [], frame.block_size, { l, s, text });
}
function set(node, name, value) { if (node[name] !== value) node[name] = value; }
function measure(r) {
  const box = r.canvas.getBoundingClientRect();
  r.box = { left: box.left + scrollX, top: box.top + scrollY, width: box.width, height: box.height };
}
function bar(r, instance, requests, blockSize, { l, s, text }) {
  const scale = devicePixelRatio || 1;
  const width = Math.max(40, r.box.width), height = Math.max(8, r.box.height);
  if (r.canvas.width !== Math.round(width * scale)) r.canvas.width = Math.round(width * scale);
  if (r.canvas.height !== Math.round(height * scale)) r.canvas.height = Math.round(height * scale);
  const g = r.canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  r.segments = [];
  const total = instance.total || 1, used = Math.max(0, instance.total - instance.free - instance.reserved);
  const wants = requests.map((q) => Math.max(1, Math.ceil((q.prompt + q.outputs) / blockSize)));
  const sumWants = wants.reduce((a, b) => a + b, 0) || 1;
  // What a request is known to hold is an estimate; what the instance reports is not.
  const each = Math.min(1, used / sumWants) || 0;
  let x = 0;
  requests.forEach((q, i) => {
    const w = (wants[i] * (each || 0.2) * width) / total;
    g.fillStyle = `hsl(${hue(q.id)} ${s} ${l})`;
    g.globalAlpha = q.outputs ? 1 : 0.45;
    g.fillRect(x, 0, Math.max(0.6, w - 0.8), height);
    if (q.high) { g.strokeStyle = text; g.lineWidth = 2; g.strokeRect(x + 1, 1, Math.max(1, w - 2.8), height - 2); }
    if (state.chosen?.request === q.id) { g.fillStyle = text; g.fillRect(x, height - 3, Math.max(1, w - 0.8), 3); }
    g.globalAlpha = 1;
    r.segments.push({ from: x, to: x + w, request: q });
    x += w;
  });
  const usedTo = (used * width) / total;
  if (usedTo > x + 1) { g.fillStyle = text; g.globalAlpha = 0.12; g.fillRect(x, 0, usedTo - x, height); g.globalAlpha = 1; }
  if (instance.reserved) {
    const from = Math.max(x, usedTo), to = from + (instance.reserved * width) / total;
    g.save(); g.beginPath(); g.rect(from, 0, to - from, height); g.clip();
    g.strokeStyle = text; g.globalAlpha = 0.5; g.lineWidth = 1;
    for (let at = from - height; at < to; at += 5) { g.beginPath(); g.moveTo(at, height); g.lineTo(at + height, 0); g.stroke(); }
    g.restore();
  }
}
function hue(id) { let h = 2166136261; for (let i = 0; i < id.length; i++) h = Math.imul(h ^ id.charCodeAt(i), 16777619); return (h >>> 0) % 360; }
function at(r, e) {
  const x = e.clientX - r.canvas.getBoundingClientRect().left;
  return r.segments.find((s) => x >= s.from && x < s.to)?.request;
}
function tip(e, q) {
  const box = $("tip");
  box.hidden = !q;
  if (!q) return;
  box.textContent = `${short(q.external_id)} · ${q.prompt} + ${q.outputs} tokens${q.moves ? ` · moved ${q.moves}×` : ""}`;
  box.style.left = `${Math.min(e.clientX + 12, innerWidth - 240)}px`;
  box.style.top = `${e.clientY + 14}px`;
}

// ---- migrations in flight ----------------------------------------------------------------------
function place(id, request) {
  const r = state.rows.get(id);
  if (!r || !r.div.isConnected) return null;
  const box = r.box, s = r.segments.find((x) => x.request.id === request);
  return box && { x: box.left - scrollX + (s ? (s.from + s.to) / 2 : box.width * 0.7), y: box.top - scrollY + box.height / 2 };
}
function fly(q, from, to) {
  if (calm.matches || state.flights.length >= MAX_FLIGHTS) return;
  const start = place(from, q.id);
  if (start) requestAnimationFrame(() => { const end = place(to, q.id);
    if (end) { state.flights.push({ start, end, born: performance.now(), hue: hue(q.id) }); if (state.flights.length === 1) animate(); } });
}
function animate() {
  const canvas = $("flights"), scale = devicePixelRatio || 1;
  canvas.width = innerWidth * scale; canvas.height = innerHeight * scale;
  const g = canvas.getContext("2d"), now = performance.now();
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, innerWidth, innerHeight);
  state.flights = state.flights.filter((f) => now - f.born < FLIGHT_MS);
  for (const f of state.flights) {
    const t = (now - f.born) / FLIGHT_MS, lift = Math.min(120, Math.hypot(f.end.x - f.start.x, f.end.y - f.start.y) / 3);
    const mid = { x: (f.start.x + f.end.x) / 2 + lift / 2, y: (f.start.y + f.end.y) / 2 - lift / 2 };
    for (let k = 0; k < 14; k++) {
      const u = ease(Math.max(0, t - k * 0.022)), v = 1 - u;
      const x = v * v * f.start.x + 2 * v * u * mid.x + u * u * f.end.x, y = v * v * f.start.y + 2 * v * u * mid.y + u * u * f.end.y;
      g.globalAlpha = (1 - k / 14) * (t > 0.9 ? (1 - t) * 10 : 1);
      g.fillStyle = `hsl(${f.hue} 75% 58%)`;
      g.beginPath(); g.arc(x, y, Math.max(1, 7 - k * 0.42), 0, 7); g.fill();
    }
  }
  g.globalAlpha = 1;
  if (state.flights.length) requestAnimationFrame(animate);
  else g.clearRect(0, 0, innerWidth, innerHeight);
}
const ease = (t) => (t < 0.5 ? 2 * t * t : 1 - (-2 * t + 2) ** 2 / 2);

// ---- one request, one instance -----------------------------------------------------------------
function choose(what) { state.chosen = what; state.said = ""; state.built = ""; drawDetail(); if (state.frame) drawPool(state.frame); }
function drawDetail() {
  const box = $("detail"), frame = state.frame, chosen = state.chosen;
  if (!chosen || !frame) { box.hidden = true; return; }
  box.hidden = false;
  const q = chosen.request && frame.byId.get(chosen.request), i = chosen.instance && frame.instances.find((x) => x.id === chosen.instance);
  const rows = [], path = q ? state.paths.get(q.id) || [] : [];
  let title;
  if (q) {
    title = q.external_id;
    rows.push(["on", q.instance || "no instance yet: held by the scheduler"], ["prompt", `${q.prompt} tokens`], ["answer so far", `${q.outputs} tokens`],
      ["moves", q.moves], ["resumed", q.resumptions], ["frontend", q.frontend]);
  } else if (i) {
    title = i.id;
    rows.push(["state", i.state], ["role", i.role], ["KV blocks", `${i.total - i.free} of ${i.total}, ${i.reserved} reserved`], ["running", i.running], ["waiting", i.waiting],
      ["freeness", i.freeness == null ? "–" : i.freeness.toFixed(1)], ["step", ms(i.step_s)], ["report", `${(i.report_age_s || 0).toFixed(1)} s ago`]);
    if (i.cannot_migrate) rows.push(["cannot move", i.cannot_migrate]);
  } else { title = chosen.request || chosen.instance; rows.push(["", chosen.request ? "This request has ended." : "This instance is gone."]); }
  if (state.built !== title) {
    state.built = title;
    box.innerHTML = '<h2><span></span><button type="button" aria-label="Close">×</button></h2><dl></dl><ol></ol><div class="act"></div><p class="said" role="status"></p>';
    box.querySelector("h2 span").textContent = title;
    box.querySelector("h2 button").addEventListener("click", () => choose(null));
    actions(box.querySelector(".act"), q, i, frame);
  }
  const dl = box.querySelector("dl");
  dl.replaceChildren(...rows.flatMap(([name, value]) => { const dt = document.createElement("dt"), dd = document.createElement("dd"); dt.textContent = name; dd.textContent = value; return [dt, dd]; }));
  box.querySelector("ol").replaceChildren(...path.map((p) => { const li = document.createElement("li"); li.textContent = `${p.instance}, from token ${p.after}`; return li; }));
  box.querySelector(".said").textContent = state.said;
}
function actions(box, q, i, frame) {
  const button = (text, run) => { const b = document.createElement("button"); b.type = "button"; b.textContent = text;
    b.addEventListener("click", async () => { b.disabled = true; try { state.said = await run(); } catch (error) { state.said = error.message; } b.disabled = false; drawDetail(); }); box.append(b); };
  if (q) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", "Destination");
    select.append(new Option("the freest", ""), ...frame.instances.filter((x) => x.id !== q.instance && x.state === "serving").map((x) => new Option(x.id, x.id)));
    box.append(select);
    button("Move", async () => { const a = await call("migrations", { request_id: q.id, destination: select.value || null });
      return `moved in ${ms(a.total_s)}, paused ${ms(a.suspended_s)}, ${a.num_blocks ?? "?"} blocks`; });
  } else if (i) {
    button("Drain", async () => { await call(`instances/${encodeURIComponent(i.id)}/drain`, {}); return "being drained"; });
    button("Replace", async () => { await call(`instances/${encodeURIComponent(i.id)}/drain`, { replace: true }); return "being replaced"; });
  }
}
async function scale(by) {
  try { await call("scale", { num_instances: Math.max(0, state.frame.instances.length + by) }); event(`asked for ${state.frame.instances.length + by} instances`); }
  catch (error) { event(error.message, "bad"); }
}
$("more").addEventListener("click", () => scale(1));
$("fewer").addEventListener("click", () => scale(-1));
const themes = { dark: "light", light: "dark" };
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = localStorage.theme = themes[now];
  if (state.frame) drawPool(state.frame);
});
if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme;
addEventListener("keydown", (e) => { if (e.key === "Escape") choose(null); });
addEventListener("resize", () => state.frame && drawPool(state.frame));
listen();
