// Looks a layout up in the page's table, and divides what it computes and sends by what the reader's GPUs can do.
document.addEventListener("DOMContentLoaded", () => {
  // A heading of another page may have the picture's name.
  const data = document.getElementById("costs-data");
  if (!data) return;
  const picture = document.getElementById("costs"), table = JSON.parse(data.textContent);
  const form = picture.querySelector("form");
  const names = Object.keys(table.choices);
  const say = (text) => { picture.querySelector(".numbers").textContent = text; };
  const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const seconds = (s) => `${s < 0.0995 ? (1000 * s).toPrecision(2) + " ms" : s.toFixed(2) + " s"}`;
  const many = (n) => { const i = Math.min(6, Math.floor(Math.log10(Math.max(n, 1)) / 3)); return `${(n / 1000 ** i).toFixed(i && 1)} ${["", "K", "M", "G", "T", "P", "E"][i]}`; };

  // The slowest link on the way of an axis's bytes. Ranks of tp are neighbours, then those of cp, dp, pp.
  const link = (axis, size, stride) => {
    const [inside, between] = [form.inside, form.between].map((input) => 1e9 * input.value);
    if (axis === "pp" || axis === "cp") {
      const distance = stride * (size - 1);
      return distance < table.node ? ["inside", inside] : ["between", between];
    }
    // A ring through several ranks of each node: as many rings share the links of a node.
    const together = Math.max(1, Math.min(size, Math.floor(table.node / stride)));
    return size > together ? ["between", Math.min(inside, between * together)] : ["inside", inside];
  };

  const show = () => {
    const [model, gpus, tp, pp, cp, zero] = names.map((name) => form[name].value);
    const dp = gpus / (tp * pp * cp);
    const row = table.rows[names.map((name) => form[name].value).join(" ")];
    picture.classList.toggle("none", !row);
    if (!row) {
      say(dp < 1 ? `No such layout: tp ${tp} · pp ${pp} · cp ${cp} is more than ${gpus} GPUs.`
        : `No such layout: ZeRO ${zero} reduces gradients after each micro-batch, and pp ${pp} needs many at once.`);
      return;
    }
    const held = row.slice(0, 4), [flops, idle] = row.slice(4), wires = row.slice(6, 10), microBatches = row[10];
    const sizes = { dp: [dp * cp, tp], tp: [tp, 1], cp: [cp, tp], pp: [pp, dp * cp * tp] };
    const compute = flops / (1e12 * form.flops.value);
    const parts = [["compute", compute, `${many(flops)}FLOP`], ["bubble", idle * compute, idle ? `${(100 * idle).toFixed(1)} % of compute` : ""]];
    const resources = { computing: compute + parts[1][1], "links inside nodes": 0, "links between nodes": 0 };
    table.axes.forEach((axis, i) => {
      const [where, rate] = link(axis, ...sizes[axis].map(Number));
      parts.push([axis, wires[i] / rate, wires[i] ? `${many(wires[i])}B ${where} nodes` : ""]);
      resources[where === "inside" ? "links inside nodes" : "links between nodes"] += wires[i] / rate;
    });
    const total = parts.reduce((sum, part) => sum + part[1], 0), least = Math.max(...Object.values(resources));
    const binds = Object.keys(resources).find((name) => resources[name] === least);
    const all = held.reduce((sum, bytes) => sum + bytes, 0), room = table.usable * table.machines[form.machine.value].memory;
    const rate = (s) => Math.round(table.tokens / s / gpus).toLocaleString("en");
    say(`${model}: dp ${dp} · tp ${tp} · pp ${pp} · cp ${cp}, ${microBatches} micro-batches. ${gib(all)} ` +
      `${all <= room ? "fit into" : "do not fit into"} ${gib(room)}. A step takes ${seconds(least)} to ${seconds(total)}: ` +
      `${rate(total)} to ${rate(least)} tokens/s of each GPU. What binds: ${binds}.`);
    picture.querySelector(".memory").innerHTML =
      bars(table.kinds.map((kind, i) => [kind, held[i], gib(held[i])]), Math.max(all, room));
    picture.querySelector(".time").innerHTML =
      bars(parts.map(([name, s, text]) => [name, s, text ? `${seconds(s)}, ${text}` : "none"]), Math.max(...parts.map((part) => part[1])));
  };

  const preset = () => {
    const machine = table.machines[form.machine.value];
    form.flops.value = Math.round(machine.flops * machine.efficiency / 1e12);
    form.inside.value = machine.inside / 1e9;
    form.between.value = machine.between / 1e9;
  };
  const chosen = { model: "llama-3.1-8b", gpus: 64, tp: 4, zero: 1 };
  for (const name of names) form[name].replaceChildren(...table.choices[name].map((value) => new Option(value, value, false, value === chosen[name])));
  form.machine.replaceChildren(...Object.keys(table.machines).map((name) => new Option(name, name)));
  form.machine.addEventListener("change", preset);
  form.addEventListener("input", show);
  preset();
  show();
});
