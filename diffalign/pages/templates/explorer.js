// The images of a comparison: filter, sort, and two of them under a slider.
"use strict";
for (const root of document.querySelectorAll(".explorer")) explore(root);

function explore(root) {
  const { models, scorers, tolerance, rows } = JSON.parse(
    root.querySelector("script[type='application/json']").textContent,
  );
  const find = (selector) => root.querySelector(selector);
  const form = find("form.toolbar");
  const entries = find(".entries");
  const viewer = find("dialog.viewer");
  const keys = find("dialog.keys");
  const severalSeeds = new Set(rows.map((row) => row.seed)).size > 1;
  const CHUNK = 24;
  let shown = []; // rows that pass the filter, in their order
  let made = 0; // how many of them have an entry
  let current = -1; // the one with the focus, or in the viewer
  let right = 1; // model on the right of the viewer
  let falling = true;

  for (const row of rows) row.text = row.prompt.toLowerCase();
  options(form.elements.model, models);
  options(form.elements.scorer, scorers);
  form.elements.model.value = Math.min(1, models.length - 1);

  function options(select, names) {
    names.forEach((name, i) => select.append(make("option", { value: i }, name)));
  }

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // --- figures ---

  const score = (row, model, scorer) => row.cells[model].scores[scorer];

  function difference(row, model, scorer) {
    const [before, after] = [score(row, 0, scorer), score(row, model, scorer)];
    return model === 0 || before === null || after === null ? null : after - before;
  }

  const digits = (value) => Number(value.toPrecision(4)).toString();

  function outcome(row, model, scorer) {
    const by = difference(row, model, scorer);
    if (by === null) return "none";
    return by > tolerance ? "won" : by < -tolerance ? "lost" : "tied";
  }

  function figures(row, model) {
    const lines = make("div", { class: "figures" });
    scorers.forEach((name, scorer) => {
      const value = score(row, model, scorer);
      const line = make("div", {}, scorers.length > 1 ? `${name} ` : "");
      line.append(value === null ? "no score" : digits(value));
      const by = difference(row, model, scorer);
      if (by !== null) {
        const kind = { won: "gain", lost: "loss", tied: "open", none: "open" };
        const text = `${by > 0 ? "+" : ""}${digits(by)}`;
        line.append(" ", make("span", { class: kind[outcome(row, model, scorer)] }, text));
      }
      lines.append(line);
    });
    return lines;
  }

  // --- the list ---

  function select() {
    const words = form.elements.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [model, scorer] = [Number(form.elements.model.value), Number(form.elements.scorer.value)];
    const [sort, show] = [form.elements.sort.value, form.elements.show.value];
    shown = rows.filter(
      (row) =>
        words.every((word) => row.text.includes(word)) &&
        (show === "all" || outcome(row, model, scorer) === show),
    );
    if (sort !== "order") {
      const value = sort === "score" ? score : difference;
      const lowest = falling ? -Infinity : Infinity; // what has no figure comes last
      const figure = new Map(shown.map((row) => [row, value(row, model, scorer) ?? lowest]));
      const sign = falling ? -1 : 1;
      shown.sort((a, b) => (figure.get(a) < figure.get(b) ? -sign : figure.get(a) > figure.get(b) ? sign : 0));
    } else if (!falling) shown.reverse();
    const plain = sort === "order";
    form.elements.direction.textContent = falling
      ? plain ? "first to last" : "highest first"
      : plain ? "last to first" : "lowest first";
    const noun = severalSeeds ? "prompts and seeds" : "prompts";
    find("[role=status]").textContent =
      `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${noun}`;
    entries.replaceChildren();
    made = 0;
    current = -1;
    extend();
  }

  function extend() {
    const chunk = shown.slice(made, made + CHUNK).map((row, i) => entry(row, made + i));
    entries.append(...chunk);
    made += chunk.length;
  }

  function entry(row, index) {
    const element = make("article", { class: "entry", tabindex: "0" });
    const caption = make("div", { class: "caption" }, row.prompt);
    if (severalSeeds) caption.append(make("small", {}, `seed ${row.seed}`));
    const images = make("div", { class: "images-of-models" });
    images.style.setProperty("--columns", models.length);
    row.cells.forEach((cell, model) => {
      const figure = make("figure", { class: "image" });
      figure.append(make("div", { class: "side" }, models[model]));
      const source = cell.image ?? cell.file;
      if (source === null) figure.append(make("div", { class: "missing" }, "no image"));
      else {
        const alt = `${models[model]}: ${row.prompt}`;
        const image = make("img", { alt, loading: "lazy", decoding: "async", src: source });
        if (source.startsWith("data:image/png")) image.classList.add("small");
        image.addEventListener("load", () => sharpen(image), { once: true });
        image.addEventListener("error", () =>
          image.replaceWith(make("div", { class: "missing" }, "no image")));
        image.addEventListener("click", () => open(index, model));
        figure.append(image);
      }
      figure.append(figures(row, model));
      images.append(figure);
    });
    element.append(caption, images);
    element.addEventListener("focus", () => { current = index; });
    return element;
  }

  function sharpen(image) { // small images are enlarged without smoothing
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
  }

  function go(step) {
    const next = Math.min(Math.max(current + step, 0), shown.length - 1);
    while (made <= next && made < shown.length) extend();
    entries.children[next]?.focus();
    entries.children[next]?.scrollIntoView({ block: "nearest" });
  }

  // --- the viewer ---

  const pair = find(".pair");
  const range = find("input[type=range]");
  const sides = [find(".left"), find(".right")];

  models.forEach((name, model) => {
    if (model === 0) return;
    const button = make("button", { type: "button", title: `key ${model}` }, name);
    button.addEventListener("click", () => { right = model; view(); });
    find(".models").append(button);
  });

  function open(index, model) {
    current = index;
    if (model) right = model;
    slide(50);
    if (!viewer.open) viewer.showModal();
    view();
    range.focus({ preventScroll: true });
  }

  function view() {
    const row = shown[current];
    find(".prompt").textContent = row.prompt;
    const seed = severalSeeds ? `, seed ${row.seed}` : "";
    find(".place").textContent = `${(current + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}${seed}`;
    [0, right].forEach((model, side) => {
      const cell = row.cells[model];
      const image = sides[side].querySelector("img");
      show(image, cell);
      image.alt = `${models[model]}: ${row.prompt}`;
      sides[side].querySelector("figcaption").replaceChildren(
        make("strong", {}, models[model]), figures(row, model));
    });
    [...find(".models").children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(i + 1 === right)));
  }

  function show(image, cell) {
    image.removeAttribute("src");
    image.onload = () => sharpen(image);
    const source = cell.image ?? cell.file;
    if (source !== null) image.src = source;
    if (cell.image === null || cell.file === null) return;
    const full = new Image(); // the whole file, where it lies next to the page
    full.onload = () => { if (image.getAttribute("src") === source) image.src = cell.file; };
    full.src = cell.file;
  }

  function slide(to) {
    range.value = to;
    pair.style.setProperty("--seen", `${range.value}%`);
  }

  function move(step) {
    const next = current + step;
    if (next < 0 || next >= shown.length) return;
    current = next;
    view();
  }

  function turn(name) {
    const pressed = viewer.classList.toggle(name);
    const button = find(`button[name=${name}]`);
    button.setAttribute("aria-pressed", String(pressed));
  }

  // --- what people do ---

  form.addEventListener("input", select);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.direction.addEventListener("click", () => { falling = !falling; select(); });
  find("button[name=help]").addEventListener("click", () => keys.showModal());
  find("button[name=close]").addEventListener("click", () => viewer.close());
  find("button[name=previous]").addEventListener("click", () => move(-1));
  find("button[name=next]").addEventListener("click", () => move(1));
  find("button[name=side]").addEventListener("click", () => turn("side"));
  find("button[name=zoom]").addEventListener("click", () => turn("zoom"));
  range.addEventListener("input", () => slide(range.value));
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => {
    while (made <= current && made < shown.length) extend();
    entries.children[current]?.focus();
  });
  new IntersectionObserver(
    (seen) => { if (seen.some((each) => each.isIntersecting)) extend(); },
    { rootMargin: "1200px" },
  ).observe(find(".more"));

  const inViewer = {
    ArrowLeft: () => move(-1),
    ArrowRight: () => move(1),
    a: () => slide(Number(range.value) - 5),
    d: () => slide(Number(range.value) + 5),
    " ": () => slide(Number(range.value) < 50 ? 100 : 0),
    s: () => turn("side"),
    z: () => turn("zoom"),
  };
  const inList = {
    "/": () => form.elements.filter.focus(),
    j: () => go(1),
    k: () => go(-1),
    r: () => form.elements.direction.click(),
    Enter: () => { if (current >= 0) open(current); },
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    const typing = event.target.matches?.("input:not([type=range]), select, textarea");
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing) return;
    if (event.key === "?") return void keys.showModal();
    if (viewer.open && /^[1-9]$/.test(event.key) && Number(event.key) < models.length) {
      right = Number(event.key);
      return view();
    }
    const onButton = event.target.matches?.("button, a, summary");
    if (onButton && (event.key === " " || event.key === "Enter")) return;
    const action = (viewer.open ? inViewer : inList)[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  select();
}
