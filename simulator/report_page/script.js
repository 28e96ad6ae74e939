// Draws the comparison of policies: tables, curves, time lines.

function drawComparison() {
  const table = byId("comparison");
  if (data.policies.length > 6) table.classList.add("many");
  const header = element("tr", {}, element("th", { scope: "col" }));
  for (const policy of data.policies) header.append(element("th", { scope: "col" }, policy));
  table.append(element("thead", {}, header));
  const body = element("tbody");
  for (const column of data.columns) {
    const label = element("th", { scope: "row" }, column.label);
    if (column.unit) label.append(element("span", { class: "unit" }, ` ${column.unit}`));
    const row = element("tr", {}, label);
    for (const policy of data.policies) {
      const { mean, least, greatest } = data.table[policy][column.key];
      const isBest = column.best.includes(policy);
      const cell = element("td", isBest ? { class: "best" } : {}, element(isBest ? "b" : "span", {},
        number(mean)));
      const [from, to] = [number(least), number(greatest)];
      if (from !== to) cell.append(element("span", { class: "spread" }, `${from} – ${to}`));
      row.append(cell);
    }
    body.append(row);
  }
  table.append(body);
  const seeds = data.num_seeds > 1
    ? `Mean of ${data.num_seeds} seeds, and below it the least and the greatest.`
    : "One seed.";
  const isMarked = data.columns.some((column) => column.best.length);
  byId("comparison-hint").textContent = seeds
    + (isMarked ? " Bold: the best mean, and those within 1 % of it." : "");
}

function drawLegend(parent) {
  legend(parent, data.policies.map((label, index) => (
    { label, paint: colour(index), line: true, dash: dashes(index) })));
}

// Shares are drawn on a scale that gives 0-90 % half the height, 90-99 % and 99-100 % a quarter.
function shareToHeight(share) {
  if (share <= 0.9) return (share / 0.9) * 0.5;
  if (share <= 0.99) return 0.5 + ((share - 0.9) / 0.09) * 0.25;
  return 0.75 + ((share - 0.99) / 0.01) * 0.25;
}

function drawCdf(parent, figure) {
  const width = 360, height = 230, left = 40, right = 12, top = 12, bottom = 26;
  const card = element("div", {}, element("h3", {}, `${figure.label} (${figure.unit})`));
  parent.append(card);
  const curves = Object.entries(figure.curves).filter(([, curve]) => curve.values.length);
  const values = curves.flatMap(([, curve]) => curve.values).filter((value) => value > 0);
  if (!values.length) { card.append(element("p", { class: "hint" }, "nothing finished")); return; }
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (low === high) { low /= 2; high *= 2; }
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Cumulative distribution of ${figure.label}`);
  card.append(svg);
  const x = (value) => left
    + ((Math.log(Math.max(value, low)) - Math.log(low)) / (Math.log(high) - Math.log(low)))
    * (width - left - right);
  const y = (share) => height - bottom - shareToHeight(share) * (height - top - bottom);
  for (const share of [0, 0.5, 0.9, 0.95, 0.99, 1]) {
    shape(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(share), y2: y(share) });
    shape(svg, "text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" },
      share === 1 ? "max" : `P${share * 100}`);
  }
  for (const tick of logTicks(low, high)) {
    shape(svg, "line", { class: "axis", x1: x(tick), x2: x(tick), y1: height - bottom,
      y2: height - bottom + 4 });
    shape(svg, "text", { x: x(tick), y: height - 8, "text-anchor": "middle" },
      Number(tick.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }));
  }
  for (const [place, [policy, curve]] of curves.entries()) {
    const index = data.policies.indexOf(policy);
    const points = curve.values.map((value, i) => `${x(value).toFixed(1)},${y(curve.shares[i]).toFixed(1)}`);
    // Those drawn first are wider: where two coincide, both can be seen.
    const size = 1.6 + Math.min(2.4, 0.5 * (curves.length - 1 - place));
    shape(svg, "polyline", { class: "curve", points: points.join(" "), "stroke-width": size,
      style: `stroke: ${colour(index)}`, "stroke-dasharray": dashes(index) });
  }
  const cursor = shape(svg, "line", { class: "cursor", x1: left, x2: width - right, visibility: "hidden" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientY - box.top) / box.height) * height;
    // The nearest drawn share; all curves have the same shares.
    const shares = curves[0][1].shares;
    let nearest = 0;
    shares.forEach((share, i) => {
      if (Math.abs(y(share) - at) < Math.abs(y(shares[nearest]) - at)) nearest = i;
    });
    cursor.setAttribute("y1", y(shares[nearest]));
    cursor.setAttribute("y2", y(shares[nearest]));
    cursor.setAttribute("visibility", "visible");
    const lines = curves.map(([policy, curve]) =>
      `${policy}: ${number(curve.values[nearest])} ${figure.unit}`);
    showTooltip(event, [`P${number(100 * shares[nearest])}`, ...lines].join("\n"));
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    hideTooltip();
  });
}

// A figure over time, a line a policy; each has its own end.
function drawSeries(parent, { key, label }) {
  const width = 360, height = 190, left = 44, right = 12, top = 12, bottom = 26;
  const runs = data.policies.filter((policy) => data.timelines[policy])
    .map((policy) => [policy, data.timelines[policy]]);
  const card = element("div", {}, element("h3", {}, label));
  parent.append(card);
  const end = Math.max(...runs.map(([, run]) => run.end_s));
  const values = runs.flatMap(([, run]) => run.series[key]).filter((value) => value !== null);
  const high = 1.05 * values.reduce((a, b) => Math.max(a, b), 0) || 1;
  const svg = shape(card, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${label} over time` });
  const x = (time) => left + (time / end) * (width - left - right);
  const y = (value) => height - bottom - (value / high) * (height - top - bottom);
  for (const tick of evenTicks(0, high)) {
    shape(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
    shape(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick));
  }
  for (const share of [0, 0.5, 1]) {
    shape(svg, "text", { x: x(share * end), y: height - 8,
      "text-anchor": ["start", "middle", "end"][2 * share] }, `${number(share * end)} s`);
  }
  for (const [place, [policy, run]] of runs.entries()) {
    const index = data.policies.indexOf(policy), slices = run.series[key].length;
    const points = run.series[key].map((value, i) => value === null ? null
      : `${x(((i + 0.5) * run.end_s) / slices).toFixed(1)},${y(value).toFixed(1)}`);
    const size = 1.4 + Math.min(2.4, 0.5 * (runs.length - 1 - place));
    shape(svg, "polyline", { class: "curve", points: points.filter(Boolean).join(" "),
      "stroke-width": size, style: `stroke: ${colour(index)}`, "stroke-dasharray": dashes(index) });
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const time = end * ((((event.clientX - box.left) / box.width) * width - left)
      / (width - left - right));
    if (time < 0 || time > end) { hideTooltip(); return; }
    const lines = runs.map(([policy, run]) => {
      const slices = run.series[key].length, slice = Math.floor((time / run.end_s) * slices);
      return `${policy}: ${number(slice < slices ? run.series[key][slice] : null)}`;
    });
    showTooltip(event, [`${number(time)} s`, ...lines].join("\n"));
  });
  svg.addEventListener("pointerleave", hideTooltip);
}

function drawAllSeries() {
  if (!Object.keys(data.timelines).length) { byId("series-section").hidden = true; return; }
  drawLegend(byId("series-legend"));
  for (const figure of [
    { key: "ttft_s", label: "TTFT P95 (s)" },
    { key: "tokens_per_s", label: "Output tokens a second" },
    { key: "instances", label: "Instances that serve" },
  ]) drawSeries(byId("series"), figure);
}

function drawTimeline(policy) {
  const holder = byId("timeline");
  holder.replaceChildren();
  const run = data.timelines[policy];
  const lanes = run.instances.length, samples = run.used[0].length;
  const laneHeight = lanes <= 8 ? 44 : lanes <= 24 ? 26 : 16;
  const gap = lanes <= 24 ? 6 : 3;
  const left = 92, right = 14, top = 6, bottom = 30, width = 1100;
  const height = top + lanes * (laneHeight + gap) + bottom;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `KV use of each instance over time under ${policy}`);
  svg.style.minWidth = "720px";
  holder.append(svg);
  const x = (time) => left + (time / run.end_s) * (width - left - right);
  const step = (width - left - right) / samples;
  const laneTop = (lane) => top + lane * (laneHeight + gap);
  for (let lane = 0; lane < lanes; lane += 1) {
    const base = laneTop(lane) + laneHeight;
    shape(svg, "rect", { class: "lane", x: left, y: laneTop(lane), width: width - left - right,
      height: laneHeight, rx: 2 });
    shape(svg, "text", { x: left - 8, y: base - laneHeight / 2 + 4, "text-anchor": "end" },
      run.instances[lane]);
    let used = "", reserved = "", waiting = "";
    for (let i = 0; i < samples; i += 1) {
      const share = run.used[lane][i];
      if (share === null) continue;
      const from = (left + i * step).toFixed(1), size = (step + 0.2).toFixed(1);
      const block = (y, h) => `M${from} ${y.toFixed(1)}h${size}v${h.toFixed(1)}h-${size}z`;
      const h = share * laneHeight, r = run.reserved[lane][i] * laneHeight;
      if (h > 0.05) used += block(base - h, h);
      if (r > 0.05) reserved += block(base - h - r, r);
      // Of what waited for a moment only, a mark would say too much.
      if (run.waiting[lane][i] >= 0.05) waiting += block(laneTop(lane), 2.5);
    }
    shape(svg, "path", { class: "kv", d: used });
    shape(svg, "path", { class: "kv-reserved", d: reserved });
    shape(svg, "path", { class: "waiting", d: waiting });
  }
  drawMigrations(svg, run, x, (lane) => laneTop(lane) + laneHeight / 2);
  for (let i = 0; i <= 8; i += 1) {
    const time = (run.end_s * i) / 8;
    shape(svg, "text", { x: x(time), y: height - 10, "text-anchor": i === 8 ? "end" : "middle" },
      `${number(time)} s`);
  }
  trackTimeline(svg, run, { left, right, width, height, samples, laneTop, laneHeight });
  const drawn = run.migrations.length;
  byId("timeline-hint").textContent = `Seed ${run.seed}. ${run.num_migrations} migrations`
    + (drawn < run.num_migrations ? `, of which ${drawn} are drawn.` : ".");
}

function drawMigrations(svg, run, x, middle) {
  const opacity = Math.max(0.18, Math.min(0.9, 40 / Math.max(1, run.migrations.length)));
  for (const [start, end, source, destination, request, blocks, stages, downtime] of run.migrations) {
    const group = shape(svg, "g", { opacity });
    const [x1, x2, y1, y2] = [x(start), x(end), middle(source), middle(destination)];
    const bend = Math.min(24, 4 + Math.abs(y2 - y1) / 6);
    shape(group, "path", { class: "migration", "stroke-width": 1.4,
      d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 + bend} ${y2} ${x2} ${y2}` });
    shape(group, "circle", { class: "migration-end", cx: x2, cy: y2, r: 2.4 });
    group.addEventListener("pointermove", (event) => {
      event.stopPropagation();
      showTooltip(event, `request ${request}\n${run.instances[source]} → ${run.instances[destination]}\n`
        + `${number(start)} – ${number(end)} s\n${blocks} blocks in ${stages} stages\n`
        + `pause ${number(downtime)} ms`);
    });
  }
}

function trackTimeline(svg, run, place) {
  const cursor = shape(svg, "line", { class: "cursor", y1: 0, y2: place.height - 24, visibility: "hidden" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * place.width;
    const py = ((event.clientY - box.top) / box.height) * place.height;
    const share = (px - place.left) / (place.width - place.left - place.right);
    const lane = run.instances.findIndex((_, i) => py < place.laneTop(i) + place.laneHeight + 3);
    if (share < 0 || share > 1 || lane < 0) { hideTooltip(); return; }
    const sample = Math.min(place.samples - 1, Math.floor(share * place.samples));
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    cursor.setAttribute("visibility", "visible");
    const used = run.used[lane][sample];
    const text = used === null ? "not serving"
      : `KV used ${number(100 * used)} %\nreserved ${number(100 * run.reserved[lane][sample])} %\n`
        + `waiting requests ${number(run.waiting[lane][sample])}`;
    showTooltip(event, `${run.instances[lane]} at ${number(share * run.end_s)} s\n${text}`);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    hideTooltip();
  });
}

function drawTimelines() {
  const policies = data.policies.filter((policy) => data.timelines[policy]);
  if (!policies.length) { byId("timeline-section").hidden = true; return; }
  const tabs = byId("timeline-tabs");
  const choose = (policy) => {
    for (const tab of tabs.children) {
      tab.setAttribute("aria-selected", String(tab.textContent === policy));
    }
    drawTimeline(policy);
  };
  for (const policy of policies) {
    const tab = element("button", { type: "button", role: "tab" }, policy);
    tab.addEventListener("click", () => choose(policy));
    tabs.append(tab);
  }
  legend(byId("timeline-legend"), [
    { label: "KV blocks in use (a lane is 0 to 100 %)", paint: "var(--kv)" },
    { label: "reserved for a migration that arrives", paint: "var(--kv-reserved)" },
    { label: "a request waits", paint: "var(--waiting)", line: true },
    { label: "migration (the dot is where it goes)", paint: "var(--migration)", line: true },
  ]);
  choose(policies[0]);
}

chooseTheme();
fillText();
drawComparison();
drawLegend(byId("cdf-legend"));
for (const figure of data.cdfs) drawCdf(byId("cdfs"), figure);
drawAllSeries();
drawTimelines();
