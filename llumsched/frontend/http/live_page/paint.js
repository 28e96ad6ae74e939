// What is painted: bars, the chart of the last ten minutes, migrations in flight.
const FLIGHT_MS = 1300, MAX_FLIGHTS = 60, SHADES = 5, CHART_POINTS = 240;
const ease = (t) => (t < 0.5 ? 2 * t * t : 1 - (-2 * t + 2) ** 2 / 2);

// ---- colours -----------------------------------------------------------------------------------
function hash(text) { let h = 2166136261; for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 16777619); return h >>> 0; }
// Each instance has its hue, a golden angle from that of the one before; its requests are shades of it.
function hue(instance) { const n = /(\d+)$/.exec(instance); return (212 + 137.508 * (n ? +n[1] : hash(instance) % 97)) % 360; }
const shades = new Map();
function colour(instance, request = "") {
  const { l, c } = state.tone, name = `${instance}\n${l}`;
  if (!shades.has(name)) shades.set(name, Array.from({ length: SHADES }, (_, i) => `oklch(${(l + (i - (SHADES - 1) / 2) * 0.045).toFixed(3)} ${c} ${hue(instance).toFixed(1)})`));
  return shades.get(name)[request ? hash(request) % SHADES : 2];
}
function origin(q) { return state.paths.get(q.id)?.[0].instance || q.instance; }
function tones() {
  const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
  state.tone = { l: +of("--seg-l"), c: +of("--seg-c"), text: of("--text"), line: of("--line"), soft: of("--soft"), accent: of("--accent") };
}

// ---- instances ---------------------------------------------------------------------------------
function row(id) {
  let found = state.rows.get(id);
  if (found) return found;
  const div = document.createElement("div");
  div.className = "inst";
  div.innerHTML = '<div class="head"><i></i><button type="button"></button><span class="state"></span><span class="share"></span></div><canvas role="img"></canvas><div class="foot"><span></span><span class="queue"></span></div>';
  const button = div.querySelector("button"), canvas = div.querySelector("canvas"), [foot, queue] = div.querySelectorAll(".foot span");
  button.textContent = id;
  button.addEventListener("click", () => choose({ instance: id }));
  canvas.addEventListener("click", (e) => { const hit = at(found, e); choose(hit ? { request: hit.id } : { instance: id }); });
  canvas.addEventListener("pointermove", (e) => tip(e, at(found, e)));
  canvas.addEventListener("pointerleave", () => ($("tip").hidden = true));
  found = { id, div, canvas, dot: div.querySelector("i"), state: div.querySelector(".state"), share: div.querySelector(".share"), foot, queue, segments: [] };
  state.rows.set(id, found);
  return found;
}
function drawPool(frame) {
  const pool = $("pool"), ids = new Set(frame.instances.map((i) => i.id));
  pool.classList.toggle("dense", frame.instances.length > DENSE_ABOVE);
  pool.classList.toggle("roomy", frame.instances.length <= 8);
  for (const [id, r] of state.rows) {
    if (ids.has(id)) continue;
    set(r.div, "className", "inst gone");
    set(r.state, "textContent", "gone");
    set(r.foot, "textContent", "its requests go on elsewhere");
    set(r.share, "textContent", "");
    set(r.queue, "textContent", "");
    r.segments = [];
    r.canvas.getContext("2d").clearRect(0, 0, 9999, 999);
    if (Date.now() - (state.gone.get(id) || 0) > GONE_MS) { r.div.remove(); state.rows.delete(id); state.gone.delete(id); }
  }
  tones();
  // First all that is written, then all that is measured, then all that is painted: a measure after
  // a write lays the whole page out, and two hundred of them a frame are seconds.
  for (const instance of frame.instances) {
    const r = row(instance.id), hot = isHot(instance), serves = instance.state === "serving";
    if (!r.div.isConnected) pool.append(r.div);
    set(r.div, "className", `inst ${hot ? "hot" : ""} ${instance.state}`);
    set(r.state, "textContent", hot ? "hot" : serves ? "" : instance.state);
    set(r.share, "textContent", percent(use(instance)));
    set(r.foot, "textContent", `${instance.running} running · ${instance.step_s ? `${Math.round(1000 * instance.step_s)} ms a step` : "idle"}${instance.role === "mixed" ? "" : ` · ${instance.role}`}`);
    set(r.queue, "textContent", instance.waiting ? `${"●".repeat(Math.min(8, instance.waiting))} ${instance.waiting} waiting` : "");
    if (r.tone !== state.tone.l) { r.tone = state.tone.l; r.dot.style.background = colour(instance.id); }
    const label = `${instance.id}: ${hot ? "hot" : instance.state}, ${percent(use(instance))} of KV in use, ${instance.running} running, ${instance.waiting} waiting`;
    if (r.label !== label) r.canvas.setAttribute("aria-label", (r.label = label));
  }
  for (const r of state.rows.values()) measure(r);
  for (const instance of frame.instances) {
    const r = row(instance.id), top = r.box.top - scrollY;
    if (top < innerHeight && top + r.box.height > 0) bar(r, instance, frame.byInstance.get(instance.id) || [], frame.block_size);
  }
}
function set(node, name, value) { if (node[name] !== value) node[name] = value; }
function measure(r) {
  const box = r.canvas.getBoundingClientRect();
  r.box = { left: box.left + scrollX, top: box.top + scrollY, width: box.width, height: box.height };
}
function sized(canvas, width, height) {
  const scale = devicePixelRatio || 1, g = canvas.getContext("2d");
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  return g;
}
function bar(r, instance, requests, blockSize) {
  const width = Math.max(40, r.box.width), height = Math.max(8, r.box.height), g = sized(r.canvas, width, height), { text } = state.tone;
  const total = instance.total || 1, used = Math.max(0, instance.total - instance.free - instance.reserved);
  // Those that came from elsewhere stand behind those that began here, in the order in which they came.
  const from = requests.map((q) => origin(q)), order = requests.map((_, k) => k).filter((k) => from[k] === instance.id);
  requests.forEach((_, k) => { if (from[k] !== instance.id) order.push(k); });
  const wants = requests.map((q) => Math.max(1, Math.ceil((q.prompt + q.outputs) / blockSize)));
  // What a request is known to hold is an estimate; what the instance reports is not.
  const each = Math.min(1, used / (wants.reduce((a, b) => a + b, 0) || 1)) || 0.2, now = performance.now();
  let x = 0;
  r.segments = order.map((k) => {
    const q = requests[k], w = (wants[k] * each * width) / total, seen = Math.max(0.6, w - (w > 4 ? 1 : 0.4));
    g.fillStyle = colour(from[k], q.id);
    g.globalAlpha = q.outputs ? 1 : 0.45;
    g.fillRect(x, 0, seen, height);
    g.globalAlpha = 1;
    const path = from[k] === instance.id ? null : state.paths.get(q.id), age = path ? now - path[path.length - 1].landed : LANDED_MS;
    if (age < LANDED_MS) { g.fillStyle = text; g.globalAlpha = 0.75 * (1 - age / LANDED_MS); g.fillRect(x, 0, seen, height); g.globalAlpha = 1; }
    if (q.class === "high" && w > 6) { g.strokeStyle = text; g.lineWidth = 2; g.strokeRect(x + 1, 1, Math.max(1, seen - 2), height - 2); }
    if (state.chosen?.request === q.id) { g.fillStyle = text; g.fillRect(x, height - 4, seen, 4); }
    x += w;
    return { from: x - w, to: x, request: q };
  });
  const usedTo = (used * width) / total;
  if (usedTo > x + 1) { g.fillStyle = text; g.globalAlpha = 0.12; g.fillRect(x, 0, usedTo - x, height); g.globalAlpha = 1; }
  if (!instance.reserved) return;
  const left = Math.max(x, usedTo), right = left + (instance.reserved * width) / total;
  g.save(); g.beginPath(); g.rect(left, 0, right - left, height); g.clip();
  g.strokeStyle = text; g.globalAlpha = 0.5; g.lineWidth = 1; g.beginPath();
  for (let at = left - height; at < right; at += 5) { g.moveTo(at, height); g.lineTo(at + height, 0); }
  g.stroke(); g.restore();
}
function at(r, e) {
  const x = e.clientX - r.canvas.getBoundingClientRect().left;
  return r.segments.find((s) => x >= s.from && x < s.to)?.request;
}
function tip(e, q) {
  const box = $("tip");
  box.hidden = !q;
  if (!q) return;
  box.textContent = `${short(q.external_id)} · ${q.prompt} + ${q.outputs} tokens${q.moves ? ` · moved ${q.moves}×, began on ${origin(q)}` : ""}`;
  box.style.left = `${Math.min(e.clientX + 12, innerWidth - 240)}px`;
  box.style.top = `${e.clientY + 14}px`;
}

// ---- the last ten minutes ----------------------------------------------------------------------
function drawChart(frame) {
  const canvas = $("chart"), box = canvas.getBoundingClientRect();
  if (!box.width) return;
  const g = sized(canvas, box.width, box.height), { line, soft, text, accent } = state.tone, ticks = 14, height = box.height - ticks - 2;
  const step = Math.max(1, Math.ceil(state.history.length / CHART_POINTS)), points = state.history.filter((_, k) => k % step === 0 || k === state.history.length - 1);
  const end = frame.at_s, start = Math.min(points[0].at, end - 30), x = (t) => ((t - start) / (end - start)) * (box.width - 38), y = (share) => 3 + (1 - share) * (height - 6);
  g.font = "10px system-ui, sans-serif"; g.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    g.strokeStyle = line; g.beginPath(); g.moveTo(0, y(share)); g.lineTo(box.width - 38, y(share)); g.stroke();
    g.fillStyle = soft; g.fillText(`${100 * share} %`, box.width - 34, y(share) + 3.5);
  }
  const many = frame.instances.length > DENSE_ABOVE;
  set($("trend").querySelector(".legend"), "textContent", `${many ? "From the emptiest instance to the fullest, and the one in the middle" : "A line is an instance; far apart is imbalance"}. Below: moves.`);
  if (many) band(g, points, x, y, text, accent);
  else for (const i of frame.instances) {
    g.strokeStyle = colour(i.id); g.lineWidth = isHot(i) ? 2.6 : 1.6; g.lineJoin = "round"; g.beginPath();
    let begun = false;
    for (const p of points) { const v = p.uses.get(i.id); if (v == null) continue; if (begun) g.lineTo(x(p.at), y(v)); else g.moveTo(x(p.at), y(v)); begun = true; }
    g.stroke();
  }
  const most = Math.max(1, ...state.moves.map((m) => m.n));
  for (const m of state.moves) { const tall = 3 + (ticks - 3) * Math.sqrt(m.n / most); g.fillStyle = m.how === "resumed" ? text : accent; g.globalAlpha = 0.8; g.fillRect(x(m.at) - 1, box.height - tall, 2, tall); }
  g.globalAlpha = 1;
  const uses = frame.instances.map(use);
  canvas.setAttribute("aria-label", uses.length ? `KV in use, now from ${percent(Math.min(...uses))} to ${percent(Math.max(...uses))}; ${sum(state.moves, "n")} moves in the last ten minutes` : "no instance");
}
// Of many instances: the fullest and the emptiest with all between them, and the one in the middle.
function band(g, points, x, y, text, accent) {
  const known = points.filter((p) => p.sorted.length);
  g.fillStyle = accent; g.globalAlpha = 0.25; g.beginPath();
  known.forEach((p) => g.lineTo(x(p.at), y(p.sorted[p.sorted.length - 1])));
  known.toReversed().forEach((p) => g.lineTo(x(p.at), y(p.sorted[0])));
  g.fill();
  g.globalAlpha = 1; g.strokeStyle = text; g.lineWidth = 1.8; g.beginPath();
  known.forEach((p) => g.lineTo(x(p.at), y(p.sorted[p.sorted.length >> 1])));
  g.stroke();
}

// ---- migrations in flight ----------------------------------------------------------------------
function place(id, request) {
  const r = state.rows.get(id);
  if (!r || !r.div.isConnected || !r.box) return null;
  const box = r.box, s = r.segments.find((x) => x.request.id === request);
  return { x: box.left - scrollX + (s ? (s.from + s.to) / 2 : box.width * 0.5), y: box.top - scrollY + box.height / 2,
    w: Math.max(6, s ? s.to - s.from : 8), h: box.height };
}
function fly(q, from, to) {
  if (calm.matches || state.flights.length >= MAX_FLIGHTS) return;
  const start = place(from, q.id), wait = state.flights.length * 25;
  if (start) requestAnimationFrame(() => { const end = place(to, q.id);
    if (end) { state.flights.push({ start, end, born: performance.now() + wait, colour: colour(origin(q), q.id) }); if (state.flights.length === 1) animate(); } });
}
function animate() {
  const g = sized($("flights"), innerWidth, innerHeight), now = performance.now();
  state.flights = state.flights.filter((f) => now - f.born < FLIGHT_MS);
  for (const f of state.flights) {
    const t = (now - f.born) / FLIGHT_MS;
    if (t < 0) continue;
    const dx = f.end.x - f.start.x, dy = f.end.y - f.start.y, far = Math.hypot(dx, dy) || 1, lift = Math.min(90, far / 3);
    const mid = { x: (f.start.x + f.end.x) / 2 + (lift * dy) / far, y: (f.start.y + f.end.y) / 2 - (lift * dx) / far };
    const along = (u) => { const v = 1 - u; return [v * v * f.start.x + 2 * v * u * mid.x + u * u * f.end.x, v * v * f.start.y + 2 * v * u * mid.y + u * u * f.end.y]; };
    const head = ease(t), tail = ease(Math.max(0, t - 0.28)), fade = t > 0.88 ? (1 - t) / 0.12 : 1;
    g.lineCap = "butt"; g.strokeStyle = f.colour;
    for (let k = 0; k < 10; k++) {  // a trail that grows thick towards its head
      const a = along(tail + ((head - tail) * k) / 10), b = along(tail + ((head - tail) * (k + 1)) / 10);
      g.globalAlpha = fade * (0.08 + 0.07 * k); g.lineWidth = 1 + 0.55 * k;
      g.beginPath(); g.moveTo(...a); g.lineTo(...b); g.stroke();
    }
    const [x, y] = along(head), w = Math.min(16, f.start.w + (f.end.w - f.start.w) * head) + 2, h = Math.min(22, f.start.h * 0.6);
    g.globalAlpha = fade; g.fillStyle = f.colour; g.strokeStyle = state.tone.text; g.lineWidth = 1.5;
    g.beginPath(); g.roundRect(x - w / 2, y - h / 2, w, h, 3); g.fill(); g.stroke();
  }
  g.globalAlpha = 1;
  if (state.flights.length) requestAnimationFrame(animate);
  else sized($("flights"), innerWidth, innerHeight);
}
