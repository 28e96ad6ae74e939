"use strict";
// What both pages draw with, from the JSON in #data. No library, nothing fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(parent, name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

const colour = (index) => `var(--series-${index % 8})`;
// Past eight policies colours come round again, with another stroke.
const dashes = (index) => ["", "6 4", "2 3"][Math.floor(index / 8) % 3];

function number(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (value === 0 || size >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(size)))));
}

const tooltip = byId("tooltip");
function showTooltip(event, text) {
  tooltip.textContent = text;
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  const right = event.clientX + 14 + box.width < innerWidth;
  tooltip.style.left = `${right ? event.clientX + 14 : event.clientX - 14 - box.width}px`;
  tooltip.style.top = `${Math.min(event.clientY + 14, innerHeight - box.height - 8)}px`;
}
function hideTooltip() { tooltip.hidden = true; }

function chooseTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => { root.dataset.theme = dark.matches ? "dark" : "light"; };
  apply();
  dark.addEventListener("change", apply);
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
}

function legend(parent, entries) {
  for (const { label, paint, line, dash } of entries) {
    const entry = element("span");
    if (line) {
      const swatch = shape(entry, "svg", { class: "swatch-line", viewBox: "0 0 26 6" });
      shape(swatch, "line", { x1: 0, x2: 26, y1: 3, y2: 3, style: `stroke: ${paint}`,
        "stroke-width": 3, "stroke-dasharray": dash || "" });
    } else {
      const swatch = element("i", { class: "swatch" });
      swatch.style.background = paint;
      entry.append(swatch);
    }
    entry.append(label);
    parent.append(entry);
  }
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const digit of [1, 2, 5]) {
      const tick = digit * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  if (ticks.length < 3) return evenTicks(low, high);
  const step = Math.ceil(ticks.length / 7);
  return ticks.filter((_, index) => index % step === 0);
}

// Of a narrow range: three to six round numbers, evenly apart.
function evenTicks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}

function fillText() {
  byId("subtitle").textContent = data.subtitle;
  for (const [name, value] of data.settings) {
    byId("settings").append(element("dt", {}, name), element("dd", {}, value));
  }
  for (const note of data.notes) byId("notes").append(element("li", {}, note));
  for (const name of ["warnings", "remarks"]) {
    for (const text of data[name]) byId(name).append(element("li", {}, text));
    byId(name).hidden = data[name].length === 0;
  }
  byId("tracebacks").textContent = data.tracebacks.join("\n\n");
  byId("tracebacks").hidden = data.tracebacks.length === 0;
}
