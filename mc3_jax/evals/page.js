"use strict";
// Draws the figures, sorts the tables, and gives clips their pictures and sounds when they come near the screen.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const coarse = matchMedia("(pointer: coarse)").matches;

  for (const box of document.querySelectorAll("[data-figure]")) {
    const { data, layout } = read(`figure-${box.dataset.figure}`);
    if (coarse) layout.dragmode = false; // a finger scrolls the page
    Plotly.newPlot(box, data, layout, { responsive: true, displayModeBar: false, showTips: false });
  }

  const compare = (a, b, numeric, direction) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing stays last
    return direction * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en"));
  };
  const sort = (header) => {
    const table = header.closest("table");
    const numeric = header.dataset.kind === "number";
    const before = header.getAttribute("aria-sort");
    // Of numbers the highest come first.
    const rising = before ? before === "descending" : !numeric;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => row.cells[header.cellIndex].dataset.sort;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(key(a), key(b), numeric, rising ? 1 : -1));
    table.tBodies[0].append(...rows);
  };
  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  const fill = (element, clip, frame) => {
    const stored = read(`media-${clip}`);
    if (element.tagName === "IMG") element.src = `data:image/jpeg;base64,${stored.frames[frame]}`;
    else element.src = `data:audio/mpeg;base64,${stored.audio}`;
  };
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      fill(target, target.dataset.clip, target.dataset.frame);
    }
  }, { rootMargin: "600px" });
  for (const element of document.querySelectorAll("[data-clip]")) near.observe(element);

  const plot = document.querySelector("[data-figure=map]");
  if (!plot) return;
  const { clips, places } = read("map-clips");
  const panel = document.getElementById("map-clip");
  const tower = document.getElementById("map-tower");
  const part = (name) => panel.querySelector(`[data-part=${name}]`);
  const ring = plot.data.length - 1;
  let selected = null;

  const encircle = () => {
    if (selected === null) return;
    const [x, y] = places[tower.value][selected];
    Plotly.restyle(plot, { x: [[x]], y: [[y]] }, [ring]);
  };
  const select = (row) => {
    selected = row;
    const clip = clips[row];
    const picture = part("picture");
    picture.hidden = false;
    picture.alt = `frame of ${clip.narration}`;
    fill(picture, clip.index, clip.middle);
    const sound = part("sound");
    sound.hidden = !clip.has_sound;
    if (clip.has_sound) fill(sound, clip.index);
    part("narration").textContent = clip.narration;
    part("facts").textContent = clip.facts;
    part("id").textContent = clip.clip_id;
    part("count").textContent = `clip ${row + 1} of ${clips.length}`;
    encircle();
  };
  const step = (by) => select(selected === null ? (by > 0 ? 0 : clips.length - 1) : (selected + by + clips.length) % clips.length);
  document.getElementById("map-next").addEventListener("click", () => step(1));
  document.getElementById("map-previous").addEventListener("click", () => step(-1));
  plot.on("plotly_click", ({ points }) => { if (points[0].customdata !== undefined) select(points[0].customdata); });
  tower.addEventListener("change", () => {
    const rows = plot.data.slice(0, ring).map((trace) => Array.from(trace.customdata));
    const along = (axis) => rows.map((list) => list.map((row) => places[tower.value][row][axis]));
    Plotly.restyle(plot, { x: along(0), y: along(1) }, rows.map((_, i) => i));
    Plotly.relayout(plot, { "xaxis.autorange": true, "yaxis.autorange": true });
    encircle();
  });
})();
