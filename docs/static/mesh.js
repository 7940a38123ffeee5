// Draws 16 ranks and the groups of the one that was clicked, from the table in the page.
document.addEventListener("DOMContentLoaded", () => {
  // A heading of another page may have the picture's name.
  const data = document.getElementById("mesh-data");
  if (!data) return;
  const picture = document.getElementById("mesh"), table = JSON.parse(data.textContent);
  const form = picture.querySelector("form");
  let chosen = 0;

  const sizes = () => table.axes.map((axis) => Number(form[axis].value));
  const settle = (changed) => {
    // Sixteen ranks: what one axis takes, the others give back, the last one first.
    const now = Object.fromEntries(table.axes.map((axis) => [axis, Number(form[axis].value)]));
    const others = [...table.axes].reverse().filter((axis) => axis !== changed);
    const product = () => table.axes.reduce((all, axis) => all * now[axis], 1);
    while (product() > 16) { const axis = others.find((a) => now[a] > 1); now[axis] /= 2; }
    while (product() < 16) now[others.find((axis) => now[axis] < 16)] *= 2;
    for (const axis of table.axes) form[axis].value = now[axis];
  };

  const show = () => {
    const groups = table.layouts[sizes().join(" ")];
    const of = {};
    for (const axis of table.axes) of[axis] = groups[axis].find((group) => group.includes(chosen));
    const shared = (rank) => table.axes.filter((axis) => rank !== chosen && of[axis].includes(rank));
    picture.querySelector(".drawing").replaceChildren(...Array.from({ length: 16 }, (_, rank) => {
      const button = document.createElement("button");
      const axes = shared(rank);
      button.textContent = axes.length ? `${rank} ${axes.join(" ")}` : String(rank);
      button.className = `${rank === chosen ? "chosen" : axes.join(" ")} node${Math.floor(rank / table.node)}`;
      button.setAttribute("aria-pressed", rank === chosen);
      button.addEventListener("click", () => {
        chosen = rank;
        show();
        picture.querySelectorAll("button")[rank].focus();
      });
      return button;
    }));
    const text = table.axes.filter((axis) => of[axis].length > 1).map((axis) => `${axis} ${of[axis].join(", ")}`);
    picture.querySelector(".numbers").textContent = `rank ${chosen} | ${text.join(" | ")}`;
    const [[layers, columns, tokens, sequences], held, sent] = table.ranks[sizes().join(" ")][chosen];
    const inside = (axis) => new Set(of[axis].map((rank) => Math.floor(rank / table.node))).size === 1;
    picture.querySelector(".hover").textContent = `It holds layers ${layers}, columns ${columns} of each MLP, tokens ${tokens} ` +
      `of ${sequences} sequences: ${(held / 2 ** 30).toFixed(1)} GiB in all.`;
    const sends = table.axes.flatMap((axis, i) => of[axis].length > 1
      ? [[axis, sent[i], `${(sent[i] / 1e9).toFixed(2)} GB, ${inside(axis) ? "inside its node" : "between nodes"}`]] : []);
    picture.querySelector(".sent").innerHTML = bars(sends, Math.max(...sent));
  };

  for (const axis of table.axes) {
    form[axis].replaceChildren(...[1, 2, 4, 8, 16].map((size) => new Option(size, size, false, size === 2)));
    form[axis].addEventListener("change", () => { settle(axis); show(); });
  }
  show();
});
