// The tab "What it is": numbers of the model, one matrix as a picture, the loss curve, a table of layers.
// It shares the names at the top of page.js.

/** Return the names of the matrices that can be shown. */
function matrices() {
  const isShown = ([, shape, type]) => (about.ternary ? type === "ternary" : shape.length === 2);
  return about.layers.filter(isShown).map(([name]) => name);
}

/** Show what does not change: the numbers, the names of the matrices and the table of layers. */
function showFacts(fileSize) {
  const type = about.ternary ? "ternary" : "float";
  const bits = (8 * about.bytes / about.parameters).toFixed(2);
  byId("name").textContent = about.name;
  const size = `${count(about.parameters)} parameters in a page of ${megabytes(fileSize)}`;
  byId("summary").textContent = `A ${type} language model: ${size}, no network needed.`;
  const hasLoss = about.val_loss !== null; // that of a card may be of fewer tokens
  const scores = Object.entries(about.score).filter(([name]) => name !== "val_loss" || !hasLoss);
  const facts = [
    ["Kind", about.ternary ? "ternary (BitNet b1.58)" : "float"],
    ["Parameters", count(about.parameters)],
    ["Of these -1, 0 or +1", about.ternary ? count(about.ternary_parameters) : ""],
    ["Weights", `${megabytes(about.bytes)}, ${bits} bits for each parameter`],
    ["This file", megabytes(fileSize)],
    ["Training", `${count(about.step)} steps on ${about.dataset}`],
    ["Validation loss", hasLoss ? `${count(about.val_loss)} nats per token` : ""],
    ...scores.map(([name, score]) => [`Score: ${name.replaceAll("_", " ")}`, count(score)]),
    ["Layers", `${model.n_layer} of width ${model.n_embd}, feed-forward ${model.ffn_dim}`],
    ["Attention heads", `${model.n_head}, of keys and values ${model.n_kv_head}`],
    ["Vocabulary", `${count(model.vocab_size)} tokens`],
    ["Context", `${count(model.seq_len)} tokens`],
  ];
  for (const [term, text] of facts.filter((fact) => fact[1])) {
    const fact = add(byId("facts"), "div");
    add(fact, "dt", term);
    add(fact, "dd", text);
  }
  for (const name of matrices()) add(byId("matrix-name"), "option", name);
  for (const [name, shape, stored] of about.layers) {
    const row = add(byId("layers"), "tr");
    const n = shape.reduce((a, b) => a * b);
    for (const text of [name, shape.join(" x "), count(n), stored]) add(row, "td", text);
  }
}

let drawn = {}; // the worker's message on the matrix that is shown

/** Show the codes of the chosen matrix, a small square each. Those of a float matrix are what quant.py would
 *  make of it: its values over the mean of their sizes, rounded to -1, 0 or +1. */
async function drawMatrix() {
  const name = byId("matrix-name").value;
  if (drawn.name !== name) drawn = {...(await ask({type: "matrix", name})), name};
  const {shape: [rows, columns], codes} = drawn;
  const scale = about.ternary ? 1 : codes.length / sum([...codes].map(Math.abs));
  const canvas = byId("matrix");
  canvas.width = columns;
  canvas.height = rows;
  const room = Math.min(byId("matrix-section").clientWidth / columns, 560 / rows);
  canvas.style.width = `${columns * Math.max(1, Math.min(5, Math.floor(room)))}px`;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const palette = ["--minus", "--zero", "--plus"].map((color) => {
    context.fillStyle = getComputedStyle(document.body).getPropertyValue(color);
    context.fillRect(0, 0, 1, 1);
    return new Uint32Array(context.getImageData(0, 0, 1, 1).data.buffer)[0];
  });
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const counts = [0, 0, 0];
  codes.forEach((value, i) => {
    const code = Math.max(-1, Math.min(1, Math.round(value * scale)));
    pixels[i] = palette[code + 1];
    counts[code + 1] += 1;
  });
  context.putImageData(image, 0, 0);
  all("#legend span").forEach((place, i) => {
    place.textContent = `${["-1", "0", "+1"][i]}: ${(100 * counts[i] / codes.length).toFixed(1)}%`;
  });
  const s = model.tensors[name].scale;
  const meaning = about.ternary ? `a weight is its code divided by ${count(s)}, the scale of the matrix`
    : "this model is not ternary: these are the codes that its weights would be rounded to";
  const size = `${count(rows)} rows (outputs), ${count(columns)} columns (inputs)`;
  byId("matrix-text").textContent = `${size}; ${meaning}.`;
}

/** Add an SVG element with attributes and a text to a parent; return it. */
function addShape(parent, tag, attributes, text = "") {
  const shape = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  shape.textContent = text;
  return shape;
}

/** Return round numbers from low to high, about n of them: 1, 2 or 5 times a power of ten apart. */
function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) values.push(Number((i * step).toPrecision(9)));
  return values;
}

/** Draw about.curve, [[step, nats per token]], as wide as the page is now. */
function drawCurve() {
  const [width, height, left, bottom] = [byId("curve").clientWidth, 240, 40, 200];
  const steps = about.curve.map((point) => point[0]);
  const losses = about.curve.map((point) => point[1]);
  const guess = Math.log(model.vocab_size); // the loss of equal probabilities
  const low = Math.floor(Math.min(...losses));
  const high = Math.max(guess, ...losses);
  const last = Math.max(1, ...steps);
  const x = (step) => left + (width - left - 20) * step / last;
  const y = (loss) => bottom - (bottom - 34) * (loss - low) / (high - low);
  const text = `Validation loss, first ${count(losses[0])}, at step ${count(last)} ${count(losses.at(-1))}`;
  byId("curve").replaceChildren();
  const picture = addShape(byId("curve"), "svg", {width, height, role: "img", "aria-label": text});
  addShape(picture, "line", {class: "grid", x1: left, x2: width - 20, y1: bottom, y2: bottom});
  for (const loss of ticks(low, high, 5)) {
    addShape(picture, "line", {class: "grid", x1: left, x2: width - 20, y1: y(loss), y2: y(loss)});
    addShape(picture, "text", {x: left - 8, y: y(loss) + 4, class: "end"}, count(loss));
  }
  for (const step of ticks(0, last, width / 120)) {
    addShape(picture, "text", {x: x(step), y: bottom + 18, class: "middle"}, count(step));
  }
  addShape(picture, "text", {x: 0, y: 14}, "validation loss (nats per token)");
  addShape(picture, "text", {x: width - 20, y: bottom + 36, class: "end"}, "training step");
  addShape(picture, "line", {class: "guess", x1: left, x2: width - 20, y1: y(guess), y2: y(guess)});
  addShape(picture, "text", {x: width - 20, y: y(guess) - 5, class: "end"}, `guessing: ${guess.toFixed(2)}`);
  const points = about.curve.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ");
  addShape(picture, "polyline", {class: "loss", points});
}

/** Draw what depends on the width and the colors of the page, if it is visible. */
function drawFigures() {
  byId("ternary").hidden = !about.ternary;
  byId("matrix-section").hidden = matrices().length === 0;
  byId("curve-section").hidden = about.curve.length === 0;
  if (byId("what").hidden) return;
  if (about.curve.length) drawCurve();
  if (matrices().length > 0) drawMatrix();
}
