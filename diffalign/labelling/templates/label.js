"use strict";
// One item at a time: the next is shown when the answer to this one is on the server's disk.

const find = (selector) => document.querySelector(selector);
const all = (selector) => document.querySelectorAll(selector);
const body = document.body;
const ofImages = body.dataset.shows === "images";
const SHORT_MS = 120; // for which a choice is seen before the next item
const AGAIN_MS = 1000; // between tries to reach the server

let state = null;
let busy = true;
let ranking = []; // of places on the page, in classes, best first
let nextTies = false;
let seen = { since: null, before: 0 }; // when the item came into view, and for how long it was before
const ahead = new Map(); // images that are loaded before they are needed

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function element(name, options = {}, ...children) {
  const made = Object.assign(document.createElement(name), options);
  made.append(...children);
  return made;
}

// --- the server -----------------------------------------------------------------------------------

function tell(text) {
  const notice = find(".notice");
  notice.textContent = text;
  notice.hidden = !text;
}

async function ask(path, sent) {
  const options = sent === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(sent),
  };
  for (;;) {
    let response = null;
    try {
      response = await fetch(path, options);
    } catch {
      tell("Not saved yet: the server does not answer. This goes on by itself when it does.");
      await wait(AGAIN_MS);
      continue;
    }
    if (response.status === 401) {
      location.assign(".");
      return new Promise(() => {});
    }
    if (response.status === 409) {
      tell("");
      return ask("state");
    }
    const found = await response.json();
    if (response.ok) {
      tell("");
      return found;
    }
    tell(`Not saved. ${found.error}`);
    if (response.status !== 507) return null;
    await wait(AGAIN_MS); // the disk may have room again
  }
}

async function send(path, sent, feedback = () => {}) {
  if (busy) return;
  busy = true;
  feedback();
  body.classList.add("waiting");
  const [found] = await Promise.all([ask(path, sent), wait(SHORT_MS)]);
  body.classList.remove("waiting");
  if (found === null) {
    busy = false;
    return;
  }
  await show(found);
}

// --- what is shown --------------------------------------------------------------------------------

function address(token) {
  return `image/${token}`;
}

function loaded(token) {
  if (!ahead.has(token)) {
    const image = element("img", { alt: "", draggable: false });
    image.src = address(token);
    ahead.set(token, image.decode().catch(() => {}).then(() => {
      image.style.setProperty("--shape", image.naturalWidth / image.naturalHeight || 1);
      image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
      return image;
    }));
  }
  return ahead.get(token);
}

function minutes(seconds) {
  if (seconds === null) return "";
  if (seconds < 90) return ", about a minute left";
  if (seconds < 5400) return `, about ${Math.round(seconds / 60)} minutes left`;
  return `, about ${(seconds / 3600).toFixed(1)} hours left`;
}

function grid(count, shape) {
  // As many columns as make the images largest in the window.
  const room = find("main").getBoundingClientRect();
  let best = { size: 0, columns: count };
  for (let columns = 1; columns <= count; columns += 1) {
    const rows = Math.ceil(count / columns);
    const size = Math.min(room.width / columns, (room.height / rows) * shape);
    if (size > best.size) best = { size, columns };
  }
  return best.columns;
}

async function show(found) {
  const item = found.item;
  const images = item === null ? [] : await Promise.all(item.images.map(loaded));
  state = found;
  ranking = [];
  const done = `${found.done} of ${found.total}`;
  find(".count").textContent = item === null ? done : done + minutes(found.seconds_left);
  document.title = `${done} · Label`;
  const bar = find(".progress");
  bar.setAttribute("aria-valuenow", found.done);
  bar.setAttribute("aria-valuemax", found.total);
  bar.firstElementChild.style.width = `${(100 * found.done) / Math.max(1, found.total)}%`;
  const sides = item === null ? [] : ofImages ? images : item.responses;
  const isPair = sides.length === 2;
  body.classList.toggle("two-sided", isPair);
  body.classList.remove("chosen-one");
  setZoom(false);
  find(".over").hidden = item !== null;
  body.classList.toggle("answered", item === null);
  find(".tally").textContent =
    `${found.done === 1 ? "Your answer is" : `Your ${found.done} answers are`} kept.` +
    (found.not_shown ? ` ${found.not_shown} could not be shown.` : "") +
    " You can close this page.";
  find(".prompt").textContent = item === null ? "" : item.prompt;
  find(".prompt").hidden = item === null || !item.prompt;
  showContext(item, images);
  find(".sides").hidden = item === null;
  find(".sides").replaceChildren(...sides.map((side, place) => sideOf(side, place, isPair)));
  if (item !== null) {
    const shape = ofImages ? images[0].naturalWidth / images[0].naturalHeight || 1 : 1;
    const columns = isPair ? 2 : grid(sides.length, shape);
    find(".sides").style.setProperty("--columns", columns);
    find(".sides").style.setProperty("--rows", Math.ceil(sides.length / columns));
  }
  for (const keys of all(".keys")) {
    keys.hidden = keys.classList.contains("two") ? sides.length > 2 : sides.length <= 2;
    for (const button of keys.querySelectorAll("button")) {
      button.disabled = button.dataset.does === "undo" ? found.done === 0 : item === null;
    }
  }
  mark();
  const needed = new Set([...found.ahead, ...(item === null ? [] : item.images)]);
  for (const token of ahead.keys()) if (!needed.has(token)) ahead.delete(token);
  found.ahead.forEach(loaded);
  seen = { since: document.hidden ? null : performance.now(), before: 0 };
  busy = false;
}

function showContext(item, images) {
  const context = find(".context");
  context.hidden = item === null || ofImages;
  if (context.hidden) return;
  const turns = item.turns.map((turn) => {
    const made = element("div", { className: "turn", textContent: turn.text });
    if (item.turns.length > 1) made.dataset.role = turn.role;
    return made;
  });
  context.replaceChildren(...images, element("div", { className: "turns" }, ...turns));
  context.scrollTop = 0;
}

function sideOf(side, place, isPair) {
  const made = element("button", { className: "side", type: "button" });
  made.dataset.place = place;
  const name = isPair ? ["Left", "Right"][place] : `Number ${place + 1}`;
  made.setAttribute("aria-label", ofImages ? `${name} image` : `${name} response: ${side}`);
  made.append(ofImages ? element("span", { className: "frame" }, side) : element("span", {}, side));
  if (!isPair) {
    made.firstElementChild.append(element("span", { className: "number", textContent: place + 1 }));
  }
  return made;
}

// --- what is answered -----------------------------------------------------------------------------

function seconds() {
  const now = seen.since === null ? 0 : performance.now() - seen.since;
  return (seen.before + now) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && seen.since !== null) {
    seen = { since: null, before: seen.before + performance.now() - seen.since };
  } else if (!document.hidden && seen.since === null) {
    seen.since = performance.now();
  }
});

function answer(choice) {
  if (busy || state.item === null) return;
  const two = all(".side").length === 2;
  if (!two && choice !== "skip") return;
  send("answer", { item: state.item.token, answer: choice, seconds: seconds() }, () => {
    const place = { left: 0, right: 1 }[choice];
    if (place !== undefined) {
      all(".side")[place].classList.add("chosen");
      body.classList.add("chosen-one");
    }
  });
}

function undo() {
  if (!busy && state.done) send("undo", { answered: state.done });
}

function place(number) {
  if (busy || state.item === null || number >= all(".side").length) return;
  const before = ranking.length;
  ranking = ranking.map((same) => same.filter((n) => n !== number)).filter((same) => same.length);
  const wasThere = ranking.flat().length < all(".side.placed").length;
  if (!wasThere) {
    if (nextTies && before) ranking[ranking.length - 1].push(number);
    else ranking.push([number]);
  }
  nextTies = false;
  mark();
}

function mark() {
  const places = all(".side");
  places.forEach((side, number) => {
    const at = ranking.findIndex((same) => same.includes(number));
    side.classList.toggle("placed", at >= 0);
    side.querySelector(".place")?.remove();
    if (at >= 0) {
      const better = ranking.slice(0, at).flat().length;
      const tied = ranking[at].length > 1 ? "=" : "";
      side.firstElementChild.append(element("span", { className: "place", textContent: `${tied}${better + 1}.` }));
    }
  });
  const save = find('[data-does="save"]');
  if (save) save.disabled = ranking.flat().length < 2;
  find('[data-does="same"]')?.setAttribute("aria-pressed", nextTies);
}

function save() {
  if (busy || state.item === null || ranking.flat().length < 2) return;
  send("answer", { item: state.item.token, answer: "ranking", ranking, seconds: seconds() });
}

function setZoom(on) {
  body.classList.toggle("zoomed", on);
  for (const button of all('[data-does="zoom"]')) button.setAttribute("aria-pressed", on);
}

const deeds = {
  undo,
  save,
  zoom: () => setZoom(!body.classList.contains("zoomed")),
  same: () => { nextTies = !nextTies && ranking.length > 0; mark(); },
  clear: () => { ranking = []; nextTies = false; mark(); },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.disabled || button.closest("form")) return;
  button.blur(); // so that Enter and the space bar do not press it again
  if (button.dataset.answer) answer(button.dataset.answer);
  else if (button.dataset.does) deeds[button.dataset.does]();
  else if (all(".side").length === 2) answer(["left", "right"][Number(button.dataset.place)]);
  else place(Number(button.dataset.place));
});

const keys = {
  ArrowLeft: () => answer("left"),
  ArrowRight: () => answer("right"),
  ArrowDown: () => answer("tie"),
  b: () => answer("both_bad"),
  s: () => answer("skip"),
  u: undo,
  Backspace: undo,
  z: () => ofImages && deeds.zoom(),
};

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.altKey || event.metaKey || state === null) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey) {
    if (key === "z") { event.preventDefault(); undo(); }
    return;
  }
  const many = all(".side").length > 2;
  let deed = keys[key];
  if (key === "t") deed = many ? deeds.same : () => answer("tie");
  if (many && key === "Enter") deed = save;
  if (many && (key === "c" || key === "Escape")) deed = deeds.clear;
  if (many && /^[1-9]$/.test(key)) deed = () => place(Number(key) - 1);
  if (!many && (key === "1" || key === "2")) deed = () => answer(["left", "right"][key - 1]);
  if (deed) {
    event.preventDefault();
    deed();
  }
});

document.addEventListener("mousemove", (event) => {
  // Zoomed images show the same part of each, that under the pointer.
  const frame = body.classList.contains("zoomed") && event.target.closest(".side")?.querySelector(".frame");
  if (!frame) return;
  const box = frame.getBoundingClientRect();
  const within = (at, start, length) => Math.min(100, Math.max(0, (100 * (at - start)) / length));
  find(".sides").style.setProperty("--x", `${within(event.clientX, box.left, box.width)}%`);
  find(".sides").style.setProperty("--y", `${within(event.clientY, box.top, box.height)}%`);
});

ask("state").then(show);
