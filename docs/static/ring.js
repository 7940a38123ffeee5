// Draws which squares of the causal mask each rank computes at a hop, from the table in the page.
document.addEventListener("DOMContentLoaded", () => {
  // A heading of another page may have the picture's name.
  const data = document.getElementById("ring-data");
  if (!data) return;
  const picture = document.getElementById("ring"), table = JSON.parse(data.textContent);
  const form = picture.querySelector("form");
  const SIZE = 320, LEFT = 70;
  const color = (rank, ranks, strong) => `hsl(${360 * rank / ranks} 60% ${strong ? 50 : 85}%)`;
  const work = (squares) => squares.reduce((sum, [q, k]) => sum + (q === k ? 0.5 : 1), 0);

  const show = () => {
    const cp = Number(form.cp.value);
    const { pieces, hops, documents } = table[`${form.split.value} ${cp}${form.documents.value === "1" ? "" : " documents"}`];
    form.hop.max = cp - 1;
    const hop = Math.min(form.hop.value, cp - 1);
    const unit = SIZE / (2 * cp);
    const square = ([q, k], fill) => {
      const [x, y, side] = [LEFT + k * unit, q * unit, unit - 1];
      // On the diagonal the mask hides one half.
      return q === k
        ? `<polygon points="${x},${y} ${x},${y + side} ${x + side},${y + side}" fill="${fill}"></polygon>`
        : `<rect x="${x}" y="${y}" width="${side}" height="${side}" fill="${fill}"></rect>`;
    };
    const squares = hops.slice(0, hop + 1).flatMap((ranks, h) =>
      ranks.flatMap((seen, rank) => seen.map((pair) => square(pair, color(rank, cp, h === hop)))));
    const labels = pieces.flatMap((own, rank) =>
      own.map((piece) => `<text class="stage" x="0" y="${(piece + 0.5) * unit + 4}">rank ${rank}</text>`));
    const borders = documents.slice(1).map((piece) => piece * unit).flatMap((at) => [
      `<line class="border" x1="${LEFT}" x2="${LEFT + SIZE}" y1="${at}" y2="${at}"></line>`,
      `<line class="border" x1="${LEFT + at}" x2="${LEFT + at}" y1="0" y2="${SIZE}"></line>`]);
    picture.querySelector(".drawing").innerHTML =
      `<svg width="${LEFT + SIZE}" height="${SIZE}" viewBox="0 0 ${LEFT + SIZE} ${SIZE}" role="img" aria-label="mask">` +
      `<rect class="waiting" x="${LEFT}" y="0" width="${SIZE}" height="${SIZE}"></rect>${squares.join("")}${borders.join("")}${labels.join("")}</svg>`;
    const now = hops[hop].map(work);
    const time = hops.reduce((sum, ranks) => sum + Math.max(...ranks.map(work)), 0);
    const all = hops.flat().reduce((sum, seen) => sum + work(seen), 0);
    picture.querySelector(".numbers").textContent = `hop ${hop}: squares per rank ${now.join(", ")} | all hops take the ` +
      `time of ${time} squares, ${(time * cp / all).toFixed(2)} × the mean of the ranks`;
    const whole = hops[0].map((_, rank) => hops.reduce((sum, ranks) => sum + work(ranks[rank]), 0));
    picture.querySelector(".hover").textContent = `squares per rank over all hops: ${whole.join(", ")}; now ` +
      now.map((_, rank) => `rank ${rank} has the keys of rank ${(rank - hop + cp) % cp}`).join(", ");
  };

  form.cp.replaceChildren(...[2, 4, 8].map((size) => new Option(size, size, false, size === 4)));
  form.split.replaceChildren(...["zigzag", "contiguous"].map((name) => new Option(name, name)));
  form.documents.replaceChildren(new Option("one", 1), new Option("three", 3));
  form.addEventListener("input", show);
  show();
});
