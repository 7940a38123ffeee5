// Draws the pipeline schedule that the form names, from the table in the page.
document.addEventListener("DOMContentLoaded", () => {
  // A heading of another page may have the picture's name.
  const data = document.getElementById("schedules-data");
  if (!data) return;
  const picture = document.getElementById("schedules"), table = JSON.parse(data.textContent);
  const form = picture.querySelector("form");
  const KINDS = { f: "forward", b: "backward", i: "gradient of the input", w: "gradient of the weights" };
  const LEFT = 60, ROW = 34;

  const fill = (name, values, chosen) => {
    form[name].replaceChildren(...values.map((value) => new Option(value, value, false, String(value) === String(chosen))));
  };
  const allowed = () => {
    // Only what the table has: interleaved takes several chunks, and micro-batches in groups of P.
    const interleaved = form.schedule.value === "interleaved";
    const chunks = table.chunks.filter((v) => (v > 1) === interleaved);
    fill("chunks", chunks, chunks.includes(Number(form.chunks.value)) ? form.chunks.value : chunks[0]);
    const counts = table.microBatches.filter((m) => !interleaved || m % Number(form.stages.value) === 0);
    fill("microBatches", counts, counts.includes(Number(form.microBatches.value)) ? form.microBatches.value : counts.at(-1));
  };

  const described = (stage, kind, m, chunk) =>
    `stage ${stage}: ${KINDS[kind]} of micro-batch ${m}${chunk ? `, chunk ${chunk}` : ""}`;
  const waited = (rows, stage, [kind, m, , start]) => {
    // What a stage has waited for has just ended, on another one.
    const before = Math.max(0, ...rows[stage].map((event) => event[4]).filter((end) => end <= start));
    const causes = rows.flatMap((events, s) => events.filter((event) => s !== stage && event[4] === start).map((event) => [s, ...event]));
    const cause = causes.find(([, of, n]) => of === kind && n === m) ?? causes[0];
    return before < start && cause ? `, after waiting ${start - before} for ${described(...cause)}` : "";
  };

  const draw = (rows) => {
    const end = Math.max(...rows.flat().map((event) => event[4]));
    const width = Math.max(picture.clientWidth, 640), scale = (width - LEFT) / end, height = rows.length * ROW;
    const boxes = rows.flatMap((events, stage) => events.map(([kind, m, chunk, start, stop]) => {
      const name = `${described(stage, kind, m, chunk)}${waited(rows, stage, [kind, m, chunk, start, stop])}`;
      const text = `<text x="${LEFT + (start + stop) / 2 * scale}" y="${stage * ROW + 20}">${m}</text>`;
      return `<g tabindex="0" role="img" aria-label="${name}" class="event ${kind} chunk${chunk % 4}"><rect x="${LEFT + start * scale}"` +
        ` y="${stage * ROW + 2}" width="${(stop - start) * scale - 1}" height="${ROW - 6}"></rect>${text}</g>`;
    }));
    const waits = rows.map((_, s) => `<rect class="waiting" x="${LEFT}" y="${s * ROW + 2}" width="${end * scale}" height="${ROW - 6}"></rect>`);
    const labels = rows.map((_, s) => `<text class="stage" x="0" y="${s * ROW + 20}">stage ${s}</text>`);
    picture.querySelector(".drawing").innerHTML =
      `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">${waits.join("")}${labels.join("")}${boxes.join("")}</svg>`;
    for (const box of picture.querySelectorAll(".event")) {
      const say = () => { picture.querySelector(".hover").textContent = box.getAttribute("aria-label"); };
      box.addEventListener("mouseenter", say);
      box.addEventListener("focus", say);
    }
  };

  const show = () => {
    allowed();
    const { schedule, stages, microBatches, chunks } = form;
    const entry = table.schedules[[schedule.value, stages.value, microBatches.value, chunks.value].join(" ")];
    const ideal = entry.bubble / (1 - entry.bubble);
    // With the numbers in it, where it is what was simulated: a zero bubble needs micro-batches for each stage.
    const idle = stages.value - 1, zero = schedule.value === "zero-bubble";
    const work = zero ? 3 * microBatches.value : chunks.value * microBatches.value;
    const name = zero ? "3M" : Number(chunks.value) > 1 ? "VM" : "M";
    const holds = Math.abs(idle / (work + idle) - entry.bubble) < 1e-4;
    picture.querySelector(".numbers").textContent =
      `bubble ${(100 * entry.bubble).toFixed(1)} % of all time${holds ? ` = (P − 1)/(${name} + P − 1) = ${idle}/(${work} + ${idle})` : ""}, ` +
      `which is ${(100 * ideal).toFixed(1)} % of the time at work${holds ? ` = (P − 1)/${name} = ${idle}/${work}` : ""}; ` +
      `at once, stages hold ${entry.held.join(", ")} ${Number(chunks.value) > 1 ? "chunks of micro-batches" : "micro-batches"}`;
    draw(entry.events);
  };

  const own = async (file) => {
    // A trace in Chrome's format, as --timeline writes it: microseconds, a thread for each stage.
    const trace = JSON.parse(await file.text());
    const events = (trace.traceEvents ?? trace).filter((event) => event.ph === "X");
    const first = Math.min(...events.map((event) => event.ts));
    const stages = [...new Set(events.map((event) => event.tid))].sort((a, b) => a - b);
    const rows = stages.map((stage) => events.filter((event) => event.tid === stage).map((event) =>
      [event.name[0], (event.name.match(/\d+/) ?? [""])[0], 0, event.ts - first, event.ts - first + event.dur]));
    const end = Math.max(...rows.flat().map((event) => event[4]));
    const busy = rows.flat().reduce((sum, event) => sum + event[4] - event[3], 0);
    picture.querySelector(".numbers").textContent = `bubble ${(100 - 100 * busy / (end * rows.length)).toFixed(1)} % of all time, in ${file.name}`;
    draw(rows);
  };

  fill("schedule", ["1f1b", "afab", "interleaved", "zero-bubble"], "1f1b");
  fill("stages", table.stages, 4);
  fill("microBatches", table.microBatches, 8);
  fill("chunks", [1], 1);
  form.addEventListener("change", show);
  picture.querySelector("input[type=file]").addEventListener("change", (event) => own(event.target.files[0]));
  picture.addEventListener("dragover", (event) => event.preventDefault());
  picture.addEventListener("drop", (event) => { event.preventDefault(); own(event.dataTransfer.files[0]); });
  show();
});
