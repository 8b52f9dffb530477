// What every page has: acts, copying, light and dark, keys, and a content that is asked for again while something moves.
"use strict";

const html = document.documentElement;
const main = () => document.getElementById("main");
const policy = window.trustedTypes
  ? trustedTypes.createPolicy("tunesmith", {createHTML: text => text}) // our own server's pages alone go through it
  : {createHTML: text => text};

/** Show a line to the person, also to who hears pages. @param {string} text */
export function say(text) {
  const said = document.getElementById("said");
  if (!said) return;
  said.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { said.textContent = ""; }, 6000);
}

/** The words of an answer that refuses. @param {Response} answer */
export async function failure(answer) {
  try { return (await answer.json()).error.message; } catch { return `The server answered with status ${answer.status}.`; }
}

/** An act: a request that only a page of this server can make. Throws an Error with the server's words. */
export async function act(method, address, body) {
  const headers = {"X-Tunesmith": "1"};
  if (body !== undefined && !(body instanceof Blob)) headers["Content-Type"] = "application/json";
  const answer = await fetch(address, {method, headers, body: body === undefined || body instanceof Blob ? body : JSON.stringify(body)});
  if (!answer.ok) throw new Error(await failure(answer));
  return answer.json();
}

// Live: the page is asked for again and its content morphed, so that focus, folds and what is typed stay.
const morphing = {
  morphStyle: "outerHTML",
  callbacks: {
    beforeNodeMorphed(old, fresh) {
      if (old.nodeType !== Node.ELEMENT_NODE) return true;
      if (old.hasAttribute("data-island")) {
        old.setAttribute("data-live", fresh.getAttribute?.("data-live") ?? "");
        old.dispatchEvent(new CustomEvent("island:fresh"));
        return !old.dataset.taken;
      }
      if (old.hasAttribute("data-keep")) return false;
      if (old.tagName === "DETAILS" && fresh.tagName === "DETAILS") fresh.open = old.open;
      if (/^(INPUT|TEXTAREA|SELECT)$/.test(old.tagName) && (old === document.activeElement || isChanged(old))) return false;
      return true;
    },
  },
};

/** Whether a person chose or typed something else than the server had put into a field. */
function isChanged(field) {
  if (field.tagName === "SELECT") return field.selectedIndex !== Math.max(0, [...field.options].findIndex(option => option.defaultSelected));
  return field.type === "checkbox" || field.type === "radio" ? field.checked !== field.defaultChecked : field.value !== field.defaultValue;
}

let misses = 0, shown = "";

export async function refresh() {
  const address = location.href;
  const answer = await fetch(address, {headers: {"Accept": "text/html"}});
  if (answer.status === 401) return reload();
  const text = await answer.text();
  if ((answer.ok && text === shown) || address !== location.href) return;
  const fresh = new DOMParser().parseFromString(policy.createHTML(text), "text/html");
  const content = fresh.getElementById("main");
  if (!answer.ok || !content || fresh.body.classList.contains("bare")) {
    if (answer.status === 404) return reload();
    throw new Error(`status ${answer.status}`);
  }
  const sheets = [...fresh.querySelectorAll("link[rel=stylesheet]")].map(sheet => sheet.getAttribute("href"));
  const isNewer = !sheets.every(sheet => document.querySelector(`link[href="${sheet}"]`));
  if (isNewer || (document.body.dataset.then === "reload" && !fresh.body.dataset.live)) {
    return reload(); // a newer version runs here, or what was waited for needs its scripts
  }
  shown = text;
  Idiomorph.morph(main(), content, morphing);
  const machine = fresh.getElementById("machine");
  if (machine) document.getElementById("machine").textContent = machine.textContent;
  document.title = fresh.title;
  document.body.dataset.live = fresh.body.dataset.live ?? "";
  ready(main());
}

/** Load the whole page again, and ask for nothing until it is there. */
function reload() {
  document.body.dataset.live = "";
  location.reload();
}

/** The page after an act, whose button is off until then. */
async function refreshAfterAct() {
  document.body.dataset.live ||= "1";
  shown = "";
  await refresh();
}

/** Go to another part of what the page shows, which is there sooner than a page loaded anew. @param {URL} address */
async function goWithin(address) {
  history.pushState(null, "", address);
  try {
    await refresh();
    document.querySelector(address.hash)?.focus();
  } catch { reload(); }
}
addEventListener("popstate", () => refresh().catch(reload));

function pause() {
  const seconds = Number(document.body.dataset.live || 0);
  return misses ? Math.min(30, 2 ** misses) : seconds;
}

async function live() {
  for (;;) {
    const seconds = pause();
    await new Promise(resolve => setTimeout(resolve, 1000 * (seconds || 1)));
    if (!document.body.dataset.live || document.hidden) continue;
    try {
      await refresh();
      if (misses) {
        document.getElementById("banner").hidden = true;
        for (const button of document.querySelectorAll("[data-was-on]")) { button.disabled = false; delete button.dataset.wasOn; }
      }
      misses = 0;
    } catch {
      if (!misses) {
        const banner = document.getElementById("banner");
        banner.textContent = `No answer from the server since ${new Date().toLocaleTimeString()}; trying again. Runs go on without it.`;
        banner.hidden = false;
        for (const button of document.querySelectorAll("[data-post]:not(:disabled)")) { button.disabled = true; button.dataset.wasOn = "1"; }
      }
      misses += 1;
    }
  }
}

/** Show what needs scripts, below an element, and let keys reach what scrolls sideways. */
function ready(root) {
  for (const box of root.querySelectorAll(".scroll, .plot, pre")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  for (const button of root.querySelectorAll("[data-post], [data-copy], [data-theme-toggle], [data-keys-toggle], [data-script]")) button.hidden = false;
}

document.addEventListener("click", async event => {
  const button = event.target.closest?.("button");
  if (!button) return;
  if (button.dataset.post) {
    button.disabled = true;
    try {
      const body = button.dataset.body ? JSON.parse(button.dataset.body) : {};
      const values = await act(button.dataset.method ?? "POST", button.dataset.post, body);
      if (button.dataset.fill) { // a key, which is shown once
        const place = document.querySelector(button.dataset.fill);
        place.textContent = place.textContent.replace(/Bearer [^"]+/, `Bearer ${values.key}`);
        button.disabled = false;
        await refresh(); // its name is among the keys
      } else if (button.dataset.go) location.assign(button.dataset.go.replace("NAME", encodeURIComponent(values.name ?? "")));
      else await refreshAfterAct();
    } catch (error) {
      button.disabled = false;
      say(error.message);
    }
  } else if (button.dataset.copy) {
    try {
      await navigator.clipboard.writeText(document.querySelector(button.dataset.copy).textContent);
      say("Copied.");
    } catch { say("The browser did not allow copying: select the text."); }
  } else if ("themeToggle" in button.dataset) {
    const now = html.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    html.dataset.theme = now === "dark" ? "light" : "dark";
    document.cookie = `tunesmith-theme=${html.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
    dispatchEvent(new Event("themechange"));
  }
});

document.addEventListener("submit", async event => { // a form whose fields are an address within the page, or the body of an act
  const form = event.target;
  if ("within" in form.dataset) {
    event.preventDefault();
    const address = new URL(form.action);
    address.search = new URLSearchParams(new FormData(form));
    return goWithin(address);
  }
  if (!form.dataset.send) return;
  event.preventDefault();
  try {
    await act("POST", form.dataset.send, Object.fromEntries(new FormData(form)));
    await refreshAfterAct();
  } catch (error) { say(error.message); }
});

// Keys: / finds, g and a letter goes; never while something is typed, and who speaks to the machine switches them off.
const keys = document.querySelector("[data-keys-toggle]");
const areOn = () => localStorage.getItem("tunesmith-keys") !== "off";
function nameKeys() { if (keys) keys.textContent = areOn() ? "Keys on (?)" : "Keys off"; }
keys?.addEventListener("click", () => { localStorage.setItem("tunesmith-keys", areOn() ? "off" : "on"); nameKeys(); });
nameKeys();
const PLACES = {r: "/ui/", d: "/ui/data", n: "/ui/new", c: "/ui/chat"};
const WALKS = {n: [".group a", 1], p: [".group a", -1], j: [".reading .text", 1], k: [".reading .text", -1]};
let first = 0;

/** Give the focus to the next of the elements that a selector names, or to the one before. */
function walk(selector, by) {
  const stops = [...document.querySelectorAll(selector)].filter(stop => stop.checkVisibility());
  const at = stops.indexOf(document.activeElement);
  stops[at < 0 ? (by > 0 ? 0 : stops.length - 1) : at + by]?.focus();
}

document.addEventListener("keydown", event => {
  if (!areOn() || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable) return;
  if (event.key === "/") {
    const field = document.querySelector("input[type=search]");
    if (field) { event.preventDefault(); field.focus(); }
  } else if (event.key === "g") first = event.timeStamp;
  else if (PLACES[event.key] && first && event.timeStamp - first < 1000) location.assign(PLACES[event.key]);
  else if (WALKS[event.key]) walk(...WALKS[event.key]);
  else if (event.key === "?") say("Keys: / find · g r runs · g d data · g n new run · g c chat · n p problem · j k row · on a curve: arrows, + − 0");
});

ready(document);
live();
