// Line charts as plain SVG: one colour and one dash for each seed, so that they are told apart by
// more than colour; the table below has the same numbers.

const SPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 190, 36, 10, 8, 28];

function draw(tag, attributes, parent, text) {
  const element = document.createElementNS(SPACE, tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/** A chart in `host`: `reset(steps, range)`, then `add(line, step, value)`, then `show()`. */
export function chart(host, label, { marks = [] } = {}) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, host);
  const frame = draw("g", {}, svg);
  const body = draw("g", {}, svg);
  let lines = new Map();
  let [steps, low, high] = [50, 0, 1];
  const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / steps;
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));

  function ticks() {
    const unit = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20].find((size) => (high - low) / size <= 5) ?? 50;
    const first = Math.ceil(low / unit - 1e-9);
    return Array.from({ length: Math.floor(high / unit + 1e-9) - first + 1 }, (_, n) => (first + n) * unit);
  }

  function show() {
    frame.replaceChildren();
    body.replaceChildren();
    for (const value of ticks()) {
      draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }, frame);
      draw("text", { x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, frame, +value.toFixed(2));
    }
    for (const value of marks.filter((mark) => mark >= low && mark <= high)) {
      draw("line", { class: "mark", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }, frame);
    }
    const every = steps > 25 ? 10 : 5;
    for (let step = 0; step <= steps; step += every) {
      draw("text", { x: x(step), y: HEIGHT - 12, "text-anchor": "middle" }, frame, step);
    }
    draw("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 1, "text-anchor": "middle" }, frame, "state");
    for (const [name, points] of lines) {
      const path = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      draw("polyline", { class: `line ${name}`, points: path }, body);
    }
  }

  return {
    reset(count, range) {
      lines = new Map();
      steps = count;
      [low, high] = range;
      show();
    },
    add(name, step, value) {
      if (!Number.isFinite(value)) return;
      if (!lines.has(name)) lines.set(name, []);
      lines.get(name).push([step, value]);
      low = Math.min(low, Math.floor(value * 4) / 4);
      high = Math.max(high, Math.ceil(value * 4) / 4);
    },
    show,
  };
}
