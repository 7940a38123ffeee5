// Draws live bytes by kind along a step, from the table in the page.
document.addEventListener("DOMContentLoaded", () => {
  // A heading of another page may have the picture's name.
  const data = document.getElementById("memory-data");
  if (!data) return;
  const picture = document.getElementById("memory"), table = JSON.parse(data.textContent);
  const form = picture.querySelector("form");
  const names = Object.keys(table.choices), HEIGHT = 260, LEFT = 64, BOTTOM = 40;
  const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(2)} MiB`;
  const sum = (values) => values.reduce((all, value) => all + value, 0);
  // One scale for all choices, so that they can be compared.
  const most = Math.max(...Object.values(table.steps).flatMap((step) => step.bytes.map(sum)));

  const show = () => {
    const { phases, bytes } = table.steps[names.map((name) => form[name].value).join(" ")];
    const width = Math.max(picture.clientWidth, 560), column = (width - LEFT) / bytes.length;
    const rects = bytes.flatMap((kinds, i) => {
      let below = HEIGHT;
      return kinds.map((value, kind) => {
        const height = HEIGHT * value / most;
        below -= height;
        return `<rect class="kind${kind}" x="${LEFT + i * column}" y="${below}" width="${column + 0.3}" height="${height}"></rect>`;
      });
    });
    const marks = phases.map(([phase, first], i) => {
      const last = i + 1 < phases.length ? phases[i + 1][1] : bytes.length, x = LEFT + first * column;
      const wide = (last - first) * column > 50;
      return `<line class="mark" x1="${x}" x2="${x}" y1="0" y2="${HEIGHT + 8}"></line>` +
        (wide ? `<text class="label" x="${LEFT + (first + last) / 2 * column}" y="${HEIGHT + 20}">${phase}</text>` : "");
    });
    const totals = bytes.map(sum), peak = totals.indexOf(Math.max(...totals));
    const y = HEIGHT - HEIGHT * totals[peak] / most;
    const top = `<line class="peak" x1="${LEFT}" x2="${width}" y1="${y}" y2="${y}"></line>` +
      `<text class="stage" x="0" y="${Math.max(y + 4, 12)}">${mib(totals[peak])}</text>`;
    picture.querySelector(".drawing").innerHTML = `<svg width="${width}" height="${HEIGHT + BOTTOM}" viewBox="0 0 ${width} ${HEIGHT + BOTTOM}" ` +
      `role="img" aria-label="live bytes along a step">${rects.join("")}${marks.join("")}${top}</svg>`;
    const phase = phases.findLast(([, first]) => first <= peak)[0];
    picture.querySelector(".numbers").textContent = `peak ${totals[peak].toLocaleString("en")} bytes, in ${phase}: ` +
      table.kinds.map((kind, i) => `${kind} ${bytes[peak][i].toLocaleString("en")}`).join(", ");
    const point = (event) => {
      const box = event.currentTarget.getBoundingClientRect(), i = Math.floor((event.clientX - box.left - LEFT) / column);
      if (!bytes[i]) return;
      picture.querySelector(".hover").textContent = `${phases.findLast(([, first]) => first <= i)[0]}: ${mib(totals[i])}, ` +
        table.kinds.map((kind, k) => `${kind} ${mib(bytes[i][k])}`).join(", ");
    };
    picture.querySelector(".drawing svg").addEventListener("mousemove", point);
  };

  for (const name of names) form[name].replaceChildren(...table.choices[name].map((value) => new Option(value, value)));
  form.addEventListener("change", show);
  picture.querySelector(".legend").innerHTML =
    table.kinds.map((kind, i) => `<span><svg width="12" height="12"><rect class="kind${i}" width="12" height="12"></rect></svg> ${kind}</span>`).join(" ");
  show();
});
