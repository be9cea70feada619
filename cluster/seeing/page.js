"use strict";
const lanes = document.querySelector(".lanes"), frame = lanes.parentElement;
const natural = parseFloat(lanes.dataset.width);
let width = natural;
function zoom(wanted) {
  const middle = (frame.scrollLeft + frame.clientWidth / 2) / lanes.clientWidth;
  width = Math.min(Math.max(wanted, frame.clientWidth), 400000);
  lanes.style.width = width + "px";
  frame.scrollLeft = middle * lanes.clientWidth - frame.clientWidth / 2;
}
const does = {
  closer: () => zoom(width * 2),
  away: () => zoom(width / 2),
  whole: () => zoom(0),
  theme: () => {
    const root = document.documentElement, now = getComputedStyle(root).colorScheme;
    root.dataset.theme = now === "dark" ? "light" : "dark";
  },
};
for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", does[button.dataset.does]);
  button.hidden = false;
}
