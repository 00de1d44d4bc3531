"use strict";
// The layer viewer: one layer's singular values, weights and rank metrics at the epoch of the slider.
(() => {
  const root = document.getElementById("moving");
  if (!root) return;
  const data = JSON.parse(document.getElementById("pictures").textContent);
  const at = (name) => document.getElementById("moving-" + name);
  const runChoice = at("run"), layerChoice = at("layer"), slider = at("time"), play = at("play");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const letters = data.letters, decades = data.decades;
  const code = new Map([...letters].map((letter, index) => [letter, index]));
  let run, layer, readings, timer = 0;

  // Numbers as written, and the singular values as packed: two letters, logarithmic.
  const text = (value, digits = 3) =>
    value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString();
  const unpacked = (packed) => {
    const shares = [];
    for (let i = 0; i < packed.length; i += 2)
      shares.push((code.get(packed[i]) * 64 + code.get(packed[i + 1])) / 4095);
    return shares; // 1 is the largest value of all readings, 0 is 10^-decades of it or less
  };

  const SVG = "http://www.w3.org/2000/svg";
  const draw = (parent, tag, attributes, content) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (content !== undefined) made.textContent = content;
    parent.append(made);
    return made;
  };
  const line = (parent, points, attributes) => {
    // A point without a value breaks the line; one between two of them is a dot.
    let path = "", pen = "M";
    const has = (i) => points[i] && points[i][1] !== null && Number.isFinite(points[i][1]);
    points.forEach(([x, y], i) => {
      if (!has(i)) { pen = "M"; return; }
      path += pen + x.toFixed(1) + " " + y.toFixed(1);
      pen = "L";
      if (!has(i - 1) && !has(i + 1))
        draw(parent, "circle", { cx: x, cy: y, r: 3, fill: attributes.stroke, class: "dot" });
    });
    draw(parent, "path", { d: path, class: "path", ...attributes });
  };
  // Drawn at the available width, so that text keeps its size on a narrow screen.
  const sized = (svg, height) => {
    const width = Math.max(svg.clientWidth, 260);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    return width;
  };
  const label = (parent, x, y, words, anchor = "middle") =>
    draw(parent, "text", { x, y, "text-anchor": anchor }, words);

  // The index of the last reading at or before the epoch, or -1.
  const latest = (epochs, epoch) => {
    let found = -1;
    epochs.forEach((value, index) => { if (value <= epoch) found = index; });
    return found;
  };
  const formAt = (epoch) =>
    layer.forms.find(([start, end]) => start <= epoch && epoch < end) || layer.forms.at(-1);

  function spectrum(epoch) {
    const svg = at("spectrum"), left = 46, right = sized(svg, 290) - 12, top = 12, bottom = 250;
    const x = (share) => left + share * (right - left);
    const y = (share) => bottom - share * (bottom - top);
    for (let power = 0; power <= decades; power++) {
      const height = y(1 - power / decades);
      draw(svg, "line", { x1: left, x2: right, y1: height, y2: height, class: "axis" });
      label(svg, left - 6, height + 4, power ? "1e-" + power : "1", "end");
    }
    for (const share of [0, 0.25, 0.5, 0.75, 1]) label(svg, x(share), bottom + 16, String(share));
    label(svg, (left + right) / 2, bottom + 32, "i / n, largest first");
    if (layer.rank && layer.rank < layer.full) {
      const place = x(layer.rank / layer.full);
      draw(svg, "line", { x1: place, x2: place, y1: top, y2: bottom, stroke: "var(--soft)", "stroke-dasharray": "2 3" });
      label(svg, place + 4, top + 10, "low rank " + layer.rank, "start");
    }
    const curve = (packed) => {
      const shares = unpacked(packed);
      return shares.map((share, i) => [x(shares.length > 1 ? i / (shares.length - 1) : 0), share > 0 ? y(share) : null]);
    };
    const index = latest(run.epochs, epoch), first = layer.spectra.find((packed) => packed);
    if (first) line(svg, curve(first), { stroke: "var(--soft)", opacity: 0.6 });
    if (index >= 0 && layer.spectra[index]) line(svg, curve(layer.spectra[index]), { stroke: "var(--ink)" });
    else label(svg, (left + right) / 2, (top + bottom) / 2, first ? "not finite, or not read at this epoch" : "no singular values were recorded");
  }

  function weights(epoch) {
    const canvas = at("weights"), note = at("weights-note"), picture = layer.picture;
    const index = latest(run.pictureEpochs, epoch);
    const cells = picture && index >= 0 ? picture.cells[index] : null;
    canvas.hidden = !cells;
    note.textContent = cells
      ? "Epoch " + text(run.pictureEpochs[index], 4) + "; brightest: mean |w| " + text(picture.top)
      : "No heat-map of this layer's weights at this epoch.";
    if (!cells) return;
    canvas.width = picture.columns;
    canvas.height = picture.rows;
    canvas.style.aspectRatio = "1";
    const pen = canvas.getContext("2d"), image = pen.createImageData(picture.columns, picture.rows);
    [...cells].forEach((letter, cell) => {
      const value = code.get(letter);
      image.data.set(value === undefined ? [128, 128, 128, 255] : [...data.colors[value], 255], 4 * cell);
    });
    pen.putImageData(image, 0, 0);
  }

  function timeline(epoch) {
    const svg = at("timeline"), left = 46, right = sized(svg, 132) - 12, top = 8, bottom = 92;
    const x = (at) => left + (at / (run.end || 1)) * (right - left);
    const y = (share) => bottom - share * (bottom - top);
    for (const share of [0, 0.5, 1]) {
      draw(svg, "line", { x1: left, x2: right, y1: y(share), y2: y(share), class: "axis" });
      label(svg, left - 6, y(share) + 4, String(share), "end");
    }
    const hatch = draw(draw(svg, "defs", {}), "pattern", {
      id: "moving-hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
    });
    draw(hatch, "line", { x1: 0, x2: 0, y1: 0, y2: 5, stroke: "var(--ink)", "stroke-width": 2.5, opacity: 0.6 });
    for (const [start, end, form, rank] of layer.forms) {
      const place = { x: x(start), width: Math.max(x(end) - x(start), 1), y: bottom + 4, height: 14 };
      const band = draw(svg, "rect", {
        ...place,
        fill: data.forms[form] || "var(--soft)",
        opacity: form === "full-rank" || !rank || !layer.full ? 1 : 0.25 + 0.75 * Math.min(rank / layer.full, 1),
      });
      draw(band, "title", {}, form + (rank ? ", rank " + rank : "") + ", epoch " + text(start, 4) + " to " + text(end, 4));
      if (data.hatched.includes(form)) draw(svg, "rect", { ...place, fill: "url(#moving-hatch)", "pointer-events": "none" });
    }
    label(svg, left, bottom + 34, "epoch 0", "start");
    label(svg, right, bottom + 34, text(run.end, 4), "end");
    const curve = (pick) => run.epochs.map((at, i) => [x(at), layer.measures[i] === null ? null : pick(layer.measures[i])]);
    line(svg, curve((m) => (m[2] === null ? null : y(m[2]))), { stroke: "var(--ink)", "stroke-dasharray": "6 4" });
    line(svg, curve((m) => (m[0] === null ? null : y(m[0] / layer.full))), { stroke: "var(--ink)" });
    draw(svg, "line", { x1: x(epoch), x2: x(epoch), y1: top - 4, y2: bottom + 20, stroke: "var(--ink)", "stroke-width": 1.5, class: "now" });
  }

  function readout(epoch) {
    const form = formAt(epoch), index = latest(run.epochs, epoch);
    const m = index >= 0 && layer.measures[index];
    const parts = ["Epoch " + text(epoch, 4)];
    if (form) parts.push(form[2] + (form[3] ? ", rank " + form[3] : "") + (layer.full ? " of " + layer.full : ""));
    if (m) {
      parts.push("λ " + text(m[2]), "effective rank " + text(m[0]), "stable rank " + text(m[1]));
      if (m[3] !== null) parts.push("update rank " + text(m[3]));
    }
    at("readout").textContent = parts.join(" · ");
    slider.setAttribute("aria-valuetext", parts.slice(0, 2).join(", "));
  }

  function show() {
    const epoch = readings[Number(slider.value)];
    spectrum(epoch);
    weights(epoch);
    timeline(epoch);
    readout(epoch);
  }

  function options(select, names) {
    select.replaceChildren(...names.map((name, index) => new Option(name, index)));
  }
  function chooseLayer() {
    layer = run.layers[Number(layerChoice.value)];
    show();
  }
  // The same layer as before, or one that changes form; at the change.
  function chooseRun() {
    const before = layer && layer.name;
    run = data.runs[Number(runChoice.value)];
    options(layerChoice, run.layers.map((each) => each.name));
    const same = run.layers.findIndex((each) => each.name === before);
    const changes = run.layers.findIndex((each) => each.forms.length > 1);
    layerChoice.value = String(Math.max(same >= 0 ? same : changes, 0));
    readings = [...new Set([...run.epochs, ...run.pictureEpochs])].sort((a, b) => a - b);
    slider.max = String(readings.length - 1);
    const forms = run.layers[Number(layerChoice.value)].forms;
    const after = forms.length > 1 ? readings.findIndex((epoch) => epoch >= forms[1][0]) : -1;
    slider.value = String(after >= 0 ? after : readings.length - 1);
    chooseLayer();
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    name();
  }
  const name = () => { play.textContent = still.matches ? "Next reading" : timer ? "Pause" : "Play"; };
  const step = () => {
    const next = Number(slider.value) + 1;
    slider.value = String(next > Number(slider.max) ? 0 : next);
    show();
  };
  play.addEventListener("click", () => {
    if (still.matches) return step(); // with reduced motion, one reading per click
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = "0";
    show();
    timer = setInterval(() => { step(); if (slider.value === slider.max) stop(); }, 350);
    name();
  });
  still.addEventListener("change", stop);
  slider.addEventListener("input", () => { stop(); show(); });
  layerChoice.addEventListener("change", chooseLayer);
  runChoice.addEventListener("change", () => { stop(); chooseRun(); });

  options(runChoice, data.runs.map((each) => each.name));
  runChoice.value = String(data.opening);
  at("run-label").hidden = data.runs.length < 2;
  name();
  root.hidden = false; // before drawing: hidden elements have no width
  chooseRun();
  new ResizeObserver(show).observe(root);
  for (const picture of document.querySelectorAll(".static")) picture.hidden = true;
})();
