// Draws a sweep: a chart a figure over one option, a line for each combination of the others.

function drawFigure(parent, column) {
  const width = 360, height = 230, left = 48, right = 14, top = 12, bottom = 26;
  const unit = column.unit ? ` (${column.unit})` : "";
  const card = element("div", {}, element("h3", {}, `${column.label}${unit}`));
  parent.append(card);
  const known = data.points.filter((point) => point.figures[column.key].mean !== null);
  const values = known.flatMap(({ figures }) => [figures[column.key].least,
    figures[column.key].greatest]);
  const high = 1.05 * Math.max(...values, 0) || 1;
  const svg = shape(card, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${column.label} over ${data.x.name}` });
  const places = data.x.is_number ? data.x.values : data.x.values.map((_, index) => index);
  const [first, last] = [Math.min(...places), Math.max(...places)];
  const share = (place) => first === last ? 0.5 : (place - first) / (last - first);
  const x = (index) => left + 8 + share(places[index]) * (width - left - right - 16);
  const y = (value) => height - bottom - (value / high) * (height - top - bottom);
  for (const tick of evenTicks(0, high)) {
    shape(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
    shape(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick));
  }
  // Names that would run into the one before them are left out.
  let end = -Infinity;
  for (const index of places.keys()) {
    const text = String(data.x.values[index]), half = 3.4 * text.length;
    if (x(index) - half < end) continue;
    end = x(index) + half + 6;
    shape(svg, "text", { x: x(index), y: height - 8, "text-anchor": "middle" }, text);
  }
  for (const [line] of data.lines.entries()) {
    const points = known.filter((point) => point.line === line).sort((a, b) => a.x - b.x);
    const style = `stroke: ${colour(line)}; fill: ${colour(line)}`;
    shape(svg, "polyline", { class: "curve", style: `stroke: ${colour(line)}`, "stroke-width": 1.8,
      "stroke-dasharray": dashes(line),
      points: points.map((p) => `${x(p.x).toFixed(1)},${y(p.figures[column.key].mean).toFixed(1)}`)
        .join(" ") });
    for (const point of points) {
      const { mean, least, greatest } = point.figures[column.key];
      if (least !== greatest) {
        shape(svg, "line", { style, x1: x(point.x), x2: x(point.x), y1: y(least), y2: y(greatest) });
      }
      const dot = shape(svg, "circle", { style, cx: x(point.x), cy: y(mean), r: 3 });
      const spread = least === greatest ? "" : `\n${number(least)} – ${number(greatest)}`;
      dot.addEventListener("pointermove", (event) => showTooltip(event,
        `${data.lines[line] || column.label}\n${data.x.name} ${data.x.values[point.x]}: `
        + `${number(mean)} ${column.unit}${spread}`));
      dot.addEventListener("pointerleave", hideTooltip);
    }
  }
}

function drawPoints() {
  const header = element("tr");
  for (const axis of data.axes) header.append(element("th", { scope: "col" }, axis));
  for (const { label, unit } of data.columns) {
    header.append(element("th", { scope: "col" }, unit ? `${label} (${unit})` : label));
  }
  byId("points").append(element("thead", {}, header));
  const body = element("tbody");
  for (const { values, figures } of data.points) {
    const row = element("tr", {}, element("th", { scope: "row" }, String(values[0])));
    for (const value of values.slice(1)) row.append(element("td", {}, String(value)));
    for (const { key } of data.columns) row.append(element("td", {}, number(figures[key].mean)));
    body.append(row);
  }
  byId("points").append(body);
}

chooseTheme();
fillText();
byId("charts-title").textContent = `Over ${data.x.name}`;
byId("charts-hint").textContent = data.num_seeds > 1
  ? `Dots are means of ${data.num_seeds} seeds, bars the least and the greatest.` : "One seed.";
if (data.lines.length > 1) {
  legend(byId("lines-legend"), data.lines.map((label, line) => (
    { label, paint: colour(line), line: true, dash: dashes(line) })));
}
for (const column of data.columns) drawFigure(byId("charts"), column);
drawPoints();
