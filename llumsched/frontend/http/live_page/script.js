"use strict";
// One picture of a pool from a stream of frames: GET live sends one about once a second.
const $ = (id) => document.getElementById(id);
const KEPT_S = 600, HOT = 0.9, DENSE_ABOVE = 24, RECENT_S = 30, UNEVEN = 0.3, GONE_MS = 8000, LANDED_MS = 1500;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const state = { frame: null, rows: new Map(), where: new Map(), paths: new Map(), chosen: null,
  history: [], flights: [], moves: [], told: null, said: "", gone: new Map(), wanted: null };
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
  else connection(`live · ${frame.requests.length} request${frame.requests.length === 1 ? "" : "s"} · scheduler up ${span(frame.scheduler_age_s)}`);
  $("policy").textContent = `policy ${frame.policy}`;
  follow(before, frame);
  remember(frame);
  drawTiles(frame);
  drawPool(frame);
  drawPlaces(frame.places || []);
  drawAnswers(frame);
  drawChart(frame);
  drawDetail();
}
function drawPlaces(lines) {
  $("places").hidden = !lines.length;
  if ($("places").textContent === lines.join("")) return;
  $("places").replaceChildren(...lines.map((line) => { const li = document.createElement("li"); li.textContent = line; return li; }));
}
function follow(before, frame) {
  const ways = new Map(), flying = [];
  for (const r of frame.requests) {
    const path = state.paths.get(r.id) || [];
    const last = path[path.length - 1];
    if (!r.instance || (last && last.instance === r.instance)) continue;
    path.push({ instance: r.instance, after: r.outputs, resumptions: r.resumptions, landed: performance.now() });
    state.paths.set(r.id, path);
    if (!last) continue;
    const how = r.resumptions > last.resumptions ? "resumed" : "moved", way = `${how}\n${last.instance}`;
    if (!ways.has(way)) ways.set(way, []);
    ways.get(way).push(r);
    flying.push([r, last.instance, r.instance]);
  }
  for (const [way, requests] of ways) {
    const [how, from] = way.split("\n"), n = requests.length, one = requests[0], to = [...new Set(requests.map((r) => r.instance))].sort();
    state.moves.push({ at: frame.at_s, how, from, to, n });
    event(n === 1 ? `${short(one.external_id)} ${how}: ${from} → ${to[0]}, after ${one.outputs} tokens` : `${n} ${how}: ${from} → ${list(to, 5)}`, how === "resumed" ? "warn" : "move");
  }
  while (state.moves.length && state.moves[0].at < frame.at_s - KEPT_S) state.moves.shift();
  flying.slice(0, MAX_FLIGHTS).forEach((f) => fly(...f));
  for (const id of state.paths.keys()) if (!frame.byId.has(id)) state.paths.delete(id);
  if (!before) return;
  const was = new Map(before.instances.map((i) => [i.id, i])), is = new Map(frame.instances.map((i) => [i.id, i]));
  for (const [id, i] of is) {
    if (!was.has(id)) event(`${id} came`, "good");
    else if (was.get(id).state !== i.state) event(`${id} is ${i.state}`, i.state === "draining" ? "warn" : "");
  }
  for (const id of was.keys()) if (!is.has(id)) { event(`${id} is gone`, "bad"); state.gone.set(id, Date.now()); }
}
function remember(frame) {
  const serving = frame.instances.filter((i) => i.state !== "draining"), uses = serving.map(use);
  const before = state.history[state.history.length - 1];
  const dt = before ? Math.max(0.2, frame.at_s - before.at) : 1;
  const tokens = frame.num_tokens_passed, done = frame.num_finished;
  const point = { at: frame.at_s, tokens, done,
    tps: before ? Math.max(0, tokens - before.tokens) / dt : 0, rps: before ? Math.max(0, done - before.done) / dt : 0,
    uses: new Map(frame.instances.map((i) => [i.id, use(i)])), sorted: [...uses].sort((a, b) => a - b), running: sum(frame.instances, "running"),
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
  time.textContent = new Date().toLocaleTimeString([], { hourCycle: "h23" });
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
  const tiles = [
    ["Tokens/s", Math.round(smooth("tps")), "", "tps"], ["Running", now.running, "", "running"],
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
    div.innerHTML = '<span></span><strong></strong><svg preserveAspectRatio="none" aria-hidden="true"><polygon/><polyline/></svg>';
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
  const staying = numStaying(frame);
  if (state.wanted && (state.wanted.number === staying || frame.at_s > state.wanted.until_s)) state.wanted = null;
  set($("wanted"), "textContent", state.wanted ? `${staying} → ${state.wanted.number}` : staying);
}
function rate(name) {
  const h = state.history;
  if (h.length < 2) return "";
  const from = h.find((p) => p.at > h[h.length - 1].at - 60) || h[0], last = h[h.length - 1];
  return `${Math.max(0, last[name] - from[name])} a minute`;
}
function spark(svg, name) {
  const [area, line] = svg.children;
  const step = Math.max(1, Math.floor(state.history.length / 120));
  const points = state.history.filter((_, i) => i % step === 0).map((p) => [p.at, name === "moves" ? p.moves - state.history[0].moves : p[name] || 0]);
  const end = points[points.length - 1][0], top = Math.max(1e-9, ...points.map((p) => p[1]));
  svg.setAttribute("viewBox", "0 0 100 22");
  const start = Math.min(points[0][0], end - 30), x = (t) => ((100 * (t - start)) / Math.max(1, end - start)).toFixed(1);
  const drawn = points.map(([t, v]) => `${x(t)},${(20.5 - (19 * v) / top).toFixed(1)}`).join(" ");
  line.setAttribute("points", drawn);
  area.setAttribute("points", `${x(points[0][0])},22 ${drawn} 100,22`);
}

// ---- the three answers -------------------------------------------------------------------------
const percent = (share) => `${Math.round(100 * share)} %`;
const list = (ids, most = 3) => ids.slice(0, most).join(", ") + (ids.length > most ? ` and ${ids.length - most} more` : "");
function answer(id, kind, said, why) {
  const box = $(id), [, line, reason] = box.children;
  set(box, "className", `answer ${kind}`);
  set(line, "textContent", said);
  set(reason, "textContent", why);
}
function drawAnswers(frame) {
  const { instances } = frame, serving = instances.filter((i) => i.state !== "draining"), draining = instances.filter((i) => i.state === "draining");
  const ordered = [...serving].sort((a, b) => use(b) - use(a)), [fullest, freest] = [ordered[0], ordered[ordered.length - 1]];
  whereHot(ordered.filter(isHot), ordered, draining);
  whyWaits(frame, instances.filter((i) => i.waiting).sort((a, b) => b.waiting - a.waiting), fullest, freest);
  whatMoved(frame, instances.find((i) => i.cannot_migrate));
}
function whereHot(hot, ordered, draining) {
  const leaving = draining.map((i) => `${i.id} is being drained: ${i.running ? `${i.running} to go` : "it is empty"}.`).join(" ");
  if (!ordered.length) return answer("hot", "bad", "No instance serves.", leaving);
  const [fullest, freest] = [ordered[0], ordered[ordered.length - 1]];
  if (hot.length && hot.length === ordered.length)
    return answer("hot", "bad", hot.length > 1 ? "Every instance is full" : `${hot[0].id} is full, and alone`, `Moving cannot help; more instances would. ${leaving}`);
  if (hot.length)
    return answer("hot", "bad", `${list(hot.map((i) => i.id), 2)} ${hot.length > 1 ? "are" : "is"} hot`,
      `${percent(use(hot[0]))} of its KV cache is in use; ${freest.id} has ${percent(1 - use(freest))} free. ${leaving}`);
  if (leaving) return answer("hot", "warn", `${list(draining.map((i) => i.id), 2)} ${draining.length > 1 ? "are" : "is"} leaving`, leaving);
  const uneven = use(fullest) - use(freest) > UNEVEN;
  return answer("hot", uneven ? "" : "good", uneven ? "Nowhere, but uneven" : "Nowhere: balanced", ordered.length > 1 ? `KV in use: from ${percent(use(freest))} on ${freest.id} to ${percent(use(fullest))} on ${fullest.id}.` : `${percent(use(fullest))} of the KV cache is in use.`);
}
function whyWaits(frame, waiting, fullest, freest) {
  const held = sum(Object.values(frame.queued)), there = sum(waiting, "waiting"), all = held + there, why = [];
  if (!all) return answer("waiting", "good", "None waits", frame.ttft_p50_s == null ? "" : `Half of the requests had their first token within ${ms(frame.ttft_p50_s)}.`);
  if (there) {
    const i = waiting[0], n = i.waiting;
    why.push(`${n} on ${i.id}: ${i.head_blocks > i.free ? `the next one needs ${i.head_blocks} KV blocks, ${i.free} are free` : use(i) >= HOT ? "its KV cache is full" : "its batch is full"}${waiting.length > 1 ? `; ${there - n} on ${waiting.length > 2 ? `${waiting.length - 1} others` : waiting[1].id}` : ""}.`);
  }
  if (held) why.push(`${held} held by the scheduler, ${fullest && freest && use(freest) >= HOT ? "as no instance has room" : "until an instance is to take it"}.`);
  answer("waiting", "bad", `${all} ${all > 1 ? "wait" : "waits"}`, why.join(" "));
}
function whatMoved(frame, stuck) {
  const recent = state.moves.filter((m) => m.at > frame.at_s - RECENT_S), by = new Map();
  for (const m of recent) { const w = by.get(m.from) || { n: 0, to: new Set() }; w.n += m.n; m.to.forEach((id) => w.to.add(id)); by.set(m.from, w); }
  const most = [...by].sort((a, b) => b[1].n - a[1].n), count = (how) => sum(recent.filter((m) => m.how === how), "n");
  const [moved, resumed] = [count("moved"), count("resumed")];
  const why = most.slice(0, 3).map(([from, { n, to }]) => `${n} from ${from} to ${to.size > 1 ? `${to.size} others` : [...to][0]}`).join(", ") + (most.length > 3 ? `, and from ${most.length - 3} more` : "");
  const cannot = stuck ? ` Nothing can move from ${stuck.id}: ${stuck.cannot_migrate}` : "";
  if (resumed) return answer("moved", "warn", `${moved ? `${moved} moved, ` : ""}${resumed} resumed`, `${why}.${cannot}`);
  if (moved) return answer("moved", "move", `${moved} moved in ${RECENT_S} s`, `${why}.${cannot}`);
  return answer("moved", stuck ? "warn" : "", "Nothing lately", cannot.trim() || (frame.migrations.committed ? `${frame.migrations.committed} since the scheduler started.` : "No request has moved yet."));
}
const use = (i) => (i.total ? (i.total - i.free - i.reserved) / i.total : 0);
const isHot = (i) => i.state !== "draining" && (use(i) >= HOT || i.waiting > 2);

// ---- one request, one instance -----------------------------------------------------------------
function choose(what) {
  Object.assign(state, { chosen: what, said: "", built: "", told: null });
  drawDetail();
  if (state.frame) drawPool(state.frame);
  if (what?.request) account(what.request);
}
// The scheduler's own account of a request: where it was sent and why, each of its moves.
async function account(id) {
  for (; state.chosen?.request === id; await new Promise((done) => setTimeout(done, 2000))) {
    const answer = await fetch(`requests/${encodeURIComponent(id)}/trace`, { headers: headers() }).catch(() => null);
    if (!answer?.ok || state.chosen?.request !== id) return;
    const told = await answer.json();
    state.told = Object.values(told.requests)[0] || null;
    drawDetail();
  }
}
function steps(path) {
  if (!state.told) return path.map((p) => [p.instance, `from token ${p.after}`]);
  const first = state.told[0]?.at_s;
  return state.told.map((s) => [`+${(s.at_s - first).toFixed(s.at_s - first < 10 ? 2 : 0)} s ${s.kind}${s.instance_id ? ` ${s.instance_id}` : ""}`,
    `${s.text}${s.candidates.length > 1 ? ` · ${s.candidates.slice(0, 3).map((c) => `${c.instance_id}: ${c.score == null ? `${c.num_free_blocks} free` : +c.score.toPrecision(3)}`).join(", ")}${s.scored_by ? ` (${s.scored_by})` : ""}` : ""}`]);
}
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
      ["class", q.class], ["moves", q.moves], ["resumed", q.resumptions], ["frontend", q.frontend]);
  } else if (i) {
    title = i.id;
    rows.push(["state", i.state], ["role", i.role], ["KV blocks", `${i.total - i.free} of ${i.total}, ${i.reserved} reserved`], ["running", i.running], ["waiting", i.waiting],
      ["freeness", i.freeness == null ? "–" : i.freeness.toFixed(1)], ["step", ms(i.step_s)], ["report", `${(i.report_age_s || 0).toFixed(1)} s ago`]);
    if (i.cannot_migrate) rows.push(["cannot move", i.cannot_migrate]);
  } else { title = chosen.request || chosen.instance; rows.push(["", chosen.request ? "This request has ended." : "This instance is gone."]); }
  // Anew when other things can be done: it moved, has ended, or an instance came or went.
  const built = JSON.stringify([title, q?.instance, !!i, q ? destinations(q, frame) : []]);
  if (state.built !== built) {
    state.built = built;
    box.innerHTML = '<h2><span></span><button type="button" aria-label="Close">×</button></h2><dl></dl><ol></ol><div class="act"></div><p class="said" role="status"></p>';
    box.querySelector("h2 span").textContent = title;
    box.querySelector("h2 button").addEventListener("click", () => choose(null));
    actions(box.querySelector(".act"), q, i, frame);
  }
  const dl = box.querySelector("dl");
  dl.replaceChildren(...rows.flatMap(([name, value]) => { const dt = document.createElement("dt"), dd = document.createElement("dd"); dt.textContent = name; dd.textContent = value; return [dt, dd]; }));
  box.querySelector("ol").replaceChildren(...steps(path).map(([what, why]) => { const li = document.createElement("li"), b = document.createElement("b"); b.textContent = what; li.append(b, why ? ` ${why}` : ""); return li; }));
  box.querySelector(".said").textContent = state.said;
}
const destinations = (q, frame) => frame.instances.filter((x) => x.id !== q.instance && x.state === "serving").map((x) => x.id);
function actions(box, q, i, frame) {
  const button = (text, run) => { const b = document.createElement("button"); b.type = "button"; b.textContent = text;
    b.addEventListener("click", async () => { const { chosen } = state; b.disabled = true; const said = await run().catch((error) => error.message); b.disabled = false;
      if (state.chosen === chosen) { state.said = said; drawDetail(); } }); box.append(b); };  // not in the panel of another, chosen meanwhile
  if (q) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", "Destination");
    select.append(new Option("the freest", ""), ...destinations(q, frame).map((id) => new Option(id, id)));
    box.append(select);
    button("Move", async () => { const a = await call("migrations", { request_id: q.id, destination: select.value || null });
      return `moved in ${ms(a.total_s)}, paused ${ms(a.suspended_s)}, ${a.num_blocks ?? "?"} block${a.num_blocks === 1 ? "" : "s"}`; });
  } else if (i) {
    button("Drain", async () => { await call(`instances/${encodeURIComponent(i.id)}/drain`, {}); return "being drained"; });
    button("Replace", async () => { await call(`instances/${encodeURIComponent(i.id)}/drain`, { replace: true }); return "being replaced"; });
  }
}
const numStaying = (frame) => frame.instances.filter((i) => i.state !== "draining").length;
async function scale(by) {
  // From what was asked for last: an instance that boots is in no frame yet.
  const number = Math.max(0, (state.wanted?.number ?? numStaying(state.frame)) + by);
  try { await call("scale", { num_instances: number }); state.wanted = { number, until_s: state.frame.at_s + KEPT_S };
    event(`asked for ${number} instance${number === 1 ? "" : "s"}`); drawTiles(state.frame); }
  catch (error) { event(error.message, "bad"); }
}
$("more").addEventListener("click", () => scale(1));
$("fewer").addEventListener("click", () => scale(-1));
const themes = { dark: "light", light: "dark" };
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = localStorage.theme = themes[now];
  if (state.frame) { drawPool(state.frame); drawChart(state.frame); }
});
if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme;
addEventListener("scroll", () => { if (state.frame) requestAnimationFrame(() => drawPool(state.frame)); }, { passive: true });
addEventListener("keydown", (e) => { if (e.key === "Escape") choose(null); });
addEventListener("resize", () => { if (state.frame) { drawPool(state.frame); drawChart(state.frame); } });
