// Rows of a label, a bar and a number. `values` are [label, value, text]; `most` is the length of a whole line.
const bars = (values, most) => {
  const row = ([label, value, text]) =>
    `<div class="bar" data-value="${value}"><span>${label}</span><i class="${label.split(" ")[0]}"><b style="width:${100 * Math.min(value / most, 1)}%"></b></i>` +
    `<span>${text}</span></div>`;
  return `<div class="bars">${values.map(row).join("")}</div>`;
};
