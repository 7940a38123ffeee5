// Draws what ranks hold between the turns of a collective, and what they send in one, from the table in the page.
document.addEventListener("DOMContentLoaded", () => {
  const data = document.getElementById("collectives-data");
  if (!data) return;
  const table = JSON.parse(data.textContent);
  const CELL = 34, GAP = 26, TOP = 60;
  const color = (rank, ranks) => `hsl(${360 * rank / ranks} 65% 72%)`;

  // A number, or a part of a tensor, in stripes of the ranks that have added to it.
  const cell = (x, y, size, of, ranks, text, marked) => {
    const stripe = size / Math.max(of.length, 1);
    const stripes = of.map((rank, i) => `<rect x="${x + i * stripe}" y="${y}" width="${stripe}" height="${size}" fill="${color(rank, ranks)}"></rect>`);
    return `${stripes.join("")}<rect class="cell${marked ? " marked" : ""}" x="${x}" y="${y}" width="${size}" height="${size}"></rect>` +
      `<text x="${x + size / 2}" y="${y + size / 2 + 4}">${text}</text>`;
  };
  // From above one rank to above another.
  const arrow = (from, to) => {
    const height = Math.min(32, 12 + Math.abs(to - from) / 20);
    return `<path class="arrow" marker-end="url(#head)" d="M${from},${TOP - 6} C${from},${TOP - 6 - 2 * height} ${to},${TOP - 6 - 2 * height} ${to},${TOP - 6}"></path>`;
  };
  const HEAD = '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="tip" d="M0,0 L8,4 L0,8 z"></path></marker></defs>';
  const svg = (width, height, inside, name) =>
    `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" aria-label="${name}">${HEAD}${inside}</svg>`;
  const center = (rank, width) => rank * (width + GAP) + width / 2 + GAP / 2;
  // The slider has as many places as there are turns.
  const at = (form, last) => { form.turn.max = last; return Math.min(form.turn.value, last); };

  const calls = document.getElementById("collectives"), callsForm = calls.querySelector("form");
  const showCall = () => {
    const frames = table.calls[callsForm.call.value], turn = at(callsForm, frames.length - 1), frame = frames[turn];
    const ranks = frame.held.length, width = CELL * ranks;
    const cells = frame.held.flatMap((own, rank) =>
      own.map(([number, of], i) => cell(center(rank, width) - width / 2 + i * CELL, TOP, CELL - 2, of, ranks, number)));
    const labels = frame.held.map((_, rank) => `<text class="label" x="${center(rank, width)}" y="${TOP + CELL + 16}">rank ${rank}</text>`);
    const arrows = frame.messages.map(([from, to]) => arrow(center(from, width), center(to, width)));
    calls.querySelector(".drawing").innerHTML =
      svg(ranks * (width + GAP), TOP + CELL + 24, cells.join("") + labels.join("") + arrows.join(""), callsForm.call.value);
    calls.querySelector(".numbers").textContent = turn === 0 ? `${callsForm.call.value}: what ranks start with`
      : `${callsForm.call.value}, turn ${turn} of ${frames.length - 1}: ` +
        frame.messages.map(([from, to, numbers]) => `${from} → ${to}: ${numbers.join(" ")}`).join(", ");
  };

  const rings = document.getElementById("ring-all-reduce"), ringForm = rings.querySelector("form");
  const showRing = () => {
    const ranks = Number(ringForm.ranks.value), { bytes, held, passes, sent } = table.rings[ranks];
    const turn = at(ringForm, 2 * ranks - 2);
    const cells = held[turn].flatMap((parts, rank) => parts.map((of, part) =>
      cell(center(rank, CELL * 1.6) - CELL / 2, TOP + part * CELL, CELL - 2, of, ranks, part, turn > 0 && passes[turn - 1][(rank + ranks - 1) % ranks] === part)));
    const labels = held[turn].map((_, rank) => `<text class="label" x="${center(rank, CELL * 1.6)}" y="${TOP + ranks * CELL + 16}">rank ${rank}</text>`);
    const arrows = turn ? held[turn].map((_, rank) => arrow(center(rank, CELL * 1.6), center((rank + 1) % ranks, CELL * 1.6))) : [];
    rings.querySelector(".drawing").innerHTML = svg(ranks * (CELL * 1.6 + GAP), TOP + ranks * CELL + 24,
      cells.join("") + labels.join("") + arrows.join(""), "ring all-reduce");
    const now = turn === 0 ? "before" : turn < ranks ? `turn ${turn}, of the reduce-scatter` : `turn ${turn}, of the all-gather`;
    const so = `each rank has sent ${sent[turn].toLocaleString("en")} of ${bytes.toLocaleString("en")} bytes`;
    const factor = turn === 2 * ranks - 2 ? ` = 2(${ranks} − 1)/${ranks} · ${bytes.toLocaleString("en")}` : ` = ${turn}/${ranks} of them`;
    rings.querySelector(".numbers").textContent = `D = ${ranks}, ${now}: ${so}${turn ? factor : ""}`;
    ringForm.querySelector("output").textContent = ranks;
  };

  callsForm.call.replaceChildren(...Object.keys(table.calls).map((name) => new Option(name, name)));
  callsForm.call.addEventListener("change", () => { callsForm.turn.value = 0; });
  callsForm.addEventListener("input", showCall);
  callsForm.addEventListener("change", showCall);
  ringForm.ranks.addEventListener("input", () => { ringForm.turn.value = 0; });
  ringForm.addEventListener("input", showRing);
  showCall();
  showRing();
});
