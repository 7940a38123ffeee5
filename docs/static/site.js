// What the theme leaves out for keyboards and screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("[role=heading]:not([aria-level])")) caption.ariaLevel = "2";
  for (const box of document.querySelectorAll("pre, .table-wrapper, .drawing")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
