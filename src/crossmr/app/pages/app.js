"use strict";
// One page is one study, or a few: files are sent, recognised, corrected, completed, looked at and downloaded.
// The server knows all of it; the page asks for the state and shows it.

const BUSY_MS = 600, IDLE_MS = 10000, AWAY_MS = 3000, AT_ONCE = 3;
const $ = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem("page"), limit: 0, choices: {}, together: false, sending: null, timer: 0, shown: "", quiet: false,
  known: null, loaded: false, downloaded: false, announced: "", away: false, changed: false };

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---- asking the server

const AWAY = "The program does not answer at the moment; this page tries again. If it was ended, what was sent and made is deleted.";

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error(AWAY);
  }
  const body = answer.headers.get("content-type")?.includes("json") ? await answer.json() : null;
  if (!answer.ok) throw Object.assign(new Error(body?.error ?? `The program answered ${answer.status}.`), { status: answer.status });
  return body;
}

const post = (path, body = {}) => ask(path, { method: "POST", body: JSON.stringify(body) });
const page = (rest = "") => `pages/${state.key}${rest}`;

async function open() {
  if (state.key) return;
  const made = await post("pages");
  state.key = made.key;
  state.limit = made.limit;
  sessionStorage.setItem("page", made.key);
}

function alertOf(error) {
  $("alert").textContent = error?.message ?? error ?? "";
  $("alert").hidden = !error;
}

function announce(text) {
  if (text === state.announced) return;
  state.announced = text;
  $("announce").textContent = text;
}

const guarded = (act) => async (...given) => {
  try {
    alertOf("");
    await act(...given);
  } catch (error) {
    if (error.status === 404 && state.key) forgetHere();
    alertOf(error);
  }
};

// ---- steps

function goTo(step) {
  if (state.shown === step) return;
  const first = state.shown === "";
  state.shown = step;
  document.body.dataset.step = step;
  for (const section of document.querySelectorAll(".step")) section.hidden = section.id !== step;
  for (const item of document.querySelectorAll(".steps li")) {
    if (item.dataset.of === step) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  }
  $("restart").hidden = step === "study" && !state.key;
  if (step !== "result") $("viewer").replaceChildren(); // its memory is given back
  if (!first) document.querySelector(`#${step} h2`).focus();
}

function forgetHere() {
  sessionStorage.removeItem("page");
  clearTimeout(state.timer);
  Object.assign(state, { key: null, choices: {}, together: false, known: null, downloaded: false, quiet: false, changed: false, away: false });
  goTo("study");
  offer([]);
  $("restart").hidden = true;
}

// ---- sending

async function* entriesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((found, failed) => entry.file(found, failed));
    yield { path: entry.fullPath.replace(/^\/+/, ""), file };
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((found, failed) => reader.readEntries(found, failed));
    if (!some.length) return;
    for (const one of some) yield* entriesOf(one);
  }
}

async function dropped(transfer) {
  // all of them at once: the browser forgets them at the first pause
  const held = [...transfer.items].filter((item) => item.kind === "file").map((item) => [item.webkitGetAsEntry(), item.getAsFile()]);
  const found = [];
  for (const [entry, file] of held) {
    if (entry) for await (const one of entriesOf(entry)) found.push(one);
    else if (file) found.push({ path: file.name, file });
  }
  return found;
}

function sendOne({ path, file }, progressed, sending) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    sending.requests.add(request);
    request.open("POST", `${page("/files")}?path=${encodeURIComponent(path)}`);
    request.upload.onprogress = (event) => progressed(event.loaded);
    request.onloadend = () => {
      sending.requests.delete(request);
      if (sending.stopped) return failed(new Error("Stopped. What had arrived is kept; start over to delete it."));
      if (request.status >= 200 && request.status < 300) return done(progressed(file.size));
      let said = "The program does not answer, or broke off.";
      try { said = JSON.parse(request.responseText).error ?? said; } catch { /* no answer of the program's */ }
      failed(Object.assign(new Error(said), { status: request.status }));
    };
    request.send(file);
  });
}

async function send(files) {
  if (!files.length) return;
  if (state.sending) throw new Error("Files are being received. Wait until they are there.");
  const total = files.reduce((sum, { file }) => sum + file.size, 0);
  await open();
  if (state.limit && total > state.limit) throw new Error(`${size(total)} is more than the ${size(state.limit)} that a page may send. Start the program with a larger --limit-gib.`);
  goTo("study");
  const sending = { requests: new Set(), stopped: false }, loaded = new Map(), left = [...files], refused = [];
  state.sending = sending;
  $("sending").hidden = false;
  $("drop").hidden = true;
  let arrived = 0;
  const show = () => {
    const sum = [...loaded.values()].reduce((a, b) => a + b, 0);
    $("sending-bar").value = total ? Math.min(1, sum / total) : 0;
    $("sending-text").textContent = `Receiving ${arrived} of ${files.length} files, ${size(sum)} of ${size(total)}`;
  };
  const worker = async () => {
    for (let one; !sending.stopped && (one = left.shift());) {
      try {
        await sendOne(one, (bytes) => { loaded.set(one, bytes); show(); }, sending);
      } catch (error) {
        if (sending.stopped || error.status === 404 || !error.status) throw error;
        refused.push(error.message);
      }
      arrived += 1;
      show();
    }
  };
  show();
  announce(`Receiving ${files.length} files`);
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  } finally {
    sending.stopped = true;
    for (const request of sending.requests) request.abort();
    state.sending = null;
    $("sending").hidden = true;
    $("drop").hidden = false;
  }
  if (refused.length < files.length) await recognise();
  if (refused.length) alertOf(refused.slice(0, 3).join(" ") + (refused.length > 3 ? ` And ${refused.length - 3} more.` : ""));
}

const size = (bytes) => bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${Math.ceil(bytes / 1024)} KiB`;

// ---- asking for work

async function recognise() {
  state.known = null;
  await post(page("/recognise"), { choices: state.choices, together: state.together });
  await refresh();
}

async function complete(targets = null) {
  state.downloaded = false;
  await post(page("/complete"), { targets });
  await refresh();
}

async function refresh() {
  clearTimeout(state.timer);
  if (!state.key) return;
  let told;
  try {
    told = await ask(page());
  } catch (error) {
    if (!error.status) { // a lost connection; what was made is still there
      state.away = true;
      state.timer = setTimeout(poll, AWAY_MS);
    }
    throw error;
  }
  if (state.away) alertOf("");
  state.away = false;
  if (!state.loaded) Object.assign(state, { loaded: true, choices: told.choices, together: told.together });
  show(told);
  const busy = told.job && ["waiting", "running"].includes(told.job.state);
  state.timer = setTimeout(poll, busy ? BUSY_MS : IDLE_MS);
}

function poll() {
  const key = state.key;
  refresh().catch((error) => {
    if (error.status === 404 && state.key === key) forgetHere();
    alertOf(error);
  });
}

// ---- showing

function show(told) {
  const { job } = told, busy = job && ["waiting", "running"].includes(job.state);
  $("restart").hidden = false;
  if (busy && state.quiet && job.verb === "recognise") {
    $("go").textContent = job.place ? `Waiting: ${jobs(job.place)} done before` : "Reading again";
    return;
  }
  if (busy) return showJob(job);
  if (state.quiet) state.known = null;
  state.quiet = false;
  if (state.changed) {
    state.changed = false;
    guarded(recogniseQuietly)();
    return;
  }
  if (job?.state === "failed") alertOf(job.error);
  if (told.results && state.shown !== "check") return showResults(told.results);
  if (told.recognised) return showCheck(told);
  goTo("study");
  if (told.files) offer([[`Continue with ${told.files} ${told.files === 1 ? "file" : "files"} that are here`, recognise]]);
}

const jobs = (number) => number === 1 ? "one job is" : `${number} jobs are`;

function offer(ways) {
  $("earlier").hidden = !ways.length;
  $("earlier").querySelector("ul").replaceChildren(...ways.map(([textContent, act]) => {
    const button = element("button", { type: "button", className: "plain", textContent });
    button.addEventListener("click", guarded(act));
    return element("li", {}, button);
  }));
}

function showJob(job) {
  goTo("run");
  const { text = "", done, total, unit = "" } = job.progress, waiting = job.state === "waiting";
  $("run-title").textContent = job.verb === "recognise" ? "Recognising" : "Synthesising what is missing";
  $("run-text").textContent = waiting ? (job.place ? `Waiting: ${jobs(job.place)} done before this one` : "Starting the program's worker") : text;
  if (total) { $("run-bar").max = total; $("run-bar").value = done; } else $("run-bar").removeAttribute("value");
  $("run-detail").textContent = waiting ? "" : `${total ? `${done} of ${total} ${unit} · ` : ""}${Math.round(job.seconds)} s so far`;
  announce(total ? `${text}, ${Math.floor(4 * done / total) * 25} percent` : $("run-text").textContent);
}

function showCheck(told) {
  const same = JSON.stringify([told.recognised, told.remarks]);
  goTo("check");
  if (state.known === same) return;
  state.known = same;
  const { cases, contrasts, dicom, said, together } = told.recognised;
  const focused = document.activeElement?.dataset?.key;
  $("remarks").replaceChildren(...remarksOf(told.remarks, said));
  $("cases").replaceChildren(...cases.map((one) => caseCard(one, contrasts, dicom)));
  $("together-label").hidden = dicom || (cases.length < 2 && !together);
  $("together").checked = together;
  const order = Object.keys(contrasts), missing = [...new Set(cases.flatMap((one) => one.failed ? [] : one.synthesise))];
  const wanted = missing.sort((a, b) => order.indexOf(a) - order.indexOf(b)).map((m) => contrasts[m] ?? m);
  $("go").textContent = wanted.length ? `Synthesise ${wanted.join(", ")}` : "Nothing to synthesise";
  $("go").disabled = !wanted.length;
  if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  announce(`${cases.length} ${cases.length === 1 ? "study" : "studies"} recognised. ${$("go").textContent}`);
}

function remarksOf(remarks, said) {
  const lines = [...Object.entries(remarks).map(([name, why]) => `${name} ${why}.`), ...said];
  if (!lines.length) return [];
  const list = element("ul", {}, ...lines.slice(0, 100).map((line) => element("li", { textContent: line })));
  const details = element("details", { open: lines.length < 4 }, element("summary", { textContent: `${lines.length} ${lines.length === 1 ? "remark" : "remarks"}` }), list);
  return [details];
}

function caseCard(one, contrasts, dicom) {
  const rows = one.rows.map((row) => {
    const select = element("select");
    select.dataset.key = row.key;
    select.setAttribute("aria-label", `Contrast of ${row.name}`);
    const options = row.readable ? { ...contrasts } : {};
    if (row.contrast === "unknown" || !row.readable) options.unknown = row.readable ? "not known" : "cannot be read";
    options.unused = "not used";
    if (!(row.contrast in options)) options[row.contrast] = row.contrast;
    for (const [value, text] of Object.entries(options)) select.append(element("option", { value, textContent: text, selected: value === row.contrast }));
    select.addEventListener("change", guarded(async () => {
      state.choices[row.key] = select.value;
      await recogniseQuietly();
    }));
    const kind = ["unused", "unknown"].includes(row.contrast) ? row.contrast : "";
    return element("tr", { className: kind },
      element("td", { textContent: row.name + (row.images ? ` · ${row.images} ${row.images === 1 ? "image" : "images"}` : "") }),
      element("td", { className: "why", textContent: row.why }), element("td", { className: "choice" }, select));
  });
  const head = element("tr", {}, element("th", { scope: "col", textContent: dicom ? "Series" : "File" }), element("th", { scope: "col", className: "why", textContent: "Recognised" }), element("th", { scope: "col", className: "choice", textContent: "Contrast" }));
  const names = (list) => list.map((m) => contrasts[m] ?? m).join(", ");
  const outcome = element("div", { className: "outcome" });
  if (one.failed) outcome.append(element("p", { className: "bad", textContent: one.failed }));
  else if (one.synthesise.length) outcome.append(element("p", { className: "will", textContent: `Would synthesise ${names(one.synthesise)} from ${names(one.acquired)}` }));
  else outcome.append(element("p", { textContent: Object.keys(one.not_synthesised).length ? "Nothing would be synthesised" : "Nothing is missing" }));
  for (const [why, missing] of byReason(one.not_synthesised)) outcome.append(element("p", { className: "not", textContent: `Not ${names(missing)}: ${why}` }));
  return element("section", { className: "card case" }, element("h3", {}, one.case, one.whose ? element("small", { className: "quiet", textContent: one.whose }) : null), element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)), outcome);
}

function byReason(reasons) {
  const found = new Map();
  for (const [m, why] of Object.entries(reasons)) found.set(plain(why), [...(found.get(plain(why)) ?? []), m]);
  return found;
}

// what the command line would say of its options means nothing here
const plain = (text) => text.replace(/ To synthesise \S+ all the same, pass --targets \S+\.$/, "").replace(/; name it,? (such as|with) --map \S+='[^']*'/gi, "");

async function recogniseQuietly() {
  if (state.quiet) { // one reading at a time: the next one has all that was chosen meanwhile
    state.changed = true;
    return;
  }
  state.quiet = true;
  $("go").disabled = true;
  try {
    await post(page("/recognise"), { choices: state.choices, together: state.together });
  } catch (error) {
    state.quiet = state.changed = false;
    throw error;
  }
  await refresh();
}

// ---- results

const WORDS = { use: ["Use", "Nothing speaks against it. Look at it all the same."], look: ["Look", "Look at these before you use it."], refuse: ["Refuse", "Do not use it."],
  failed: ["Failed", "Nothing was synthesised."] };
const LABELS = { t1n: "T1", t1c: "T1ce", t2w: "T2", t2f: "FLAIR", pdw: "PD" };

function showResults(results) {
  goTo("result");
  const same = JSON.stringify(results);
  if (state.known === same) return;
  state.known = same;
  const all = [...results.cases, ...Object.entries(results.failed).map(([name, why]) => ({ case: name, verdict: "failed", reasons: [why], notes: [], synthetic: {}, acquired: [], not_filled: {}, refused: [], warnings: [], view: false }))];
  const select = $("case");
  select.replaceChildren(...all.map((one, index) => element("option", { value: index, textContent: `${one.case}: ${WORDS[one.verdict][0].toLowerCase()}` })));
  $("case-label").hidden = all.length < 2;
  $("result-title").className = all.length < 2 ? "" : "unseen";
  select.onchange = () => showCase(all[select.value], true);
  showCase(all[0], false);
  showDownloads(results, all.some((one) => Object.keys(one.synthetic).length));
  announce(`Finished. ${all.map((one) => `${one.case}: ${WORDS[one.verdict][0]}`).join(". ")}`);
}

function showCase(one, said) {
  const [word, what] = WORDS[one.verdict];
  const card = element("div", { className: `verdict ${one.verdict}` }, element("b", { textContent: `Verdict: ${word}` }), element("p", { textContent: what }));
  if (one.reasons.length) card.append(element("ul", {}, ...one.reasons.map((text) => element("li", { textContent: plain(text) }))));
  const notes = one.notes.filter((text) => !one.reasons.includes(text));
  if (notes.length) card.append(element("details", {}, element("summary", { textContent: `${notes.length} more ${notes.length === 1 ? "note" : "notes"}` }), element("ul", {}, ...notes.map((text) => element("li", { textContent: plain(text) })))));
  $("verdict").replaceChildren(card);
  const list = element("dl"), order = Object.keys(LABELS);
  const known = [...new Set([...one.acquired, ...Object.keys(one.synthetic), ...Object.keys(one.not_filled)])];
  for (const m of known.sort((a, b) => order.indexOf(a) - order.indexOf(b))) {
    const how = m in one.synthetic ? { className: "synthetic", textContent: `SYNTHETIC, from ${one.synthetic[m].from.map((s) => LABELS[s] ?? s).join(", ")}` }
      : { textContent: m in one.not_filled ? `missing: ${plain(one.not_filled[m])}` : "acquired" };
    list.append(element("dt", { textContent: LABELS[m] ?? m }), element("dd", how));
  }
  $("result-title").textContent = one.case;
  $("anyway").hidden = !one.refused.length || $("case").options.length > 1;
  $("anyway").textContent = `Synthesise ${one.refused.map((m) => LABELS[m] ?? m).join(", ")} all the same`;
  $("anyway").onclick = guarded(() => complete([...Object.keys(one.synthetic), ...one.refused]));
  $("made").replaceChildren(element("div", { className: "card made" }, list, ...one.warnings.map((text) => element("p", { textContent: plain(text) }))));
  const viewer = one.view ? element("iframe", { title: `Viewer of ${one.case}: acquired and synthetic volumes`, src: page(`/view/${encodeURIComponent(one.case)}/index.html`) }) : element("p", { textContent: "There is nothing to look at: nothing was synthesised." });
  $("viewer").replaceChildren(viewer);
  if (said) announce(`${one.case}: ${word}`);
}

function showDownloads(results, some) {
  const kinds = [["nifti", "NIfTI"], ...(results.dicom ? [["dicom", "DICOM"]] : []), ["bids", "BIDS"]];
  if (!some) return $("downloads").replaceChildren();
  $("downloads").replaceChildren(element("span", { textContent: "Download" }), ...kinds.map(([kind, textContent]) => {
    const link = element("a", { href: page(`/download/${kind}.zip`), download: "", textContent });
    link.setAttribute("aria-label", `Download ${textContent} as a zip`);
    link.addEventListener("click", () => { state.downloaded = true; });
    return link;
  }), ...(results.dicom ? [] : [element("small", { textContent: "DICOM is made of studies that came as DICOM." })]));
}

// ---- the hands

const listed = (input) => [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"], ["more", "files"]]) $(button).addEventListener("click", () => $(input).click());
for (const input of ["files", "folder"]) $(input).addEventListener("change", guarded(async () => {
  const files = listed($(input));
  $(input).value = "";
  await send(files);
}));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) window.addEventListener(name, (event) => {
  event.preventDefault();
  document.body.classList.toggle("over", name === "dragenter" || name === "dragover");
});
window.addEventListener("drop", guarded(async (event) => {
  if (!["study", "check"].includes(state.shown)) throw new Error("Start over to give another study.");
  await send(await dropped(event.dataTransfer));
}));
$("stop-sending").addEventListener("click", () => {
  state.sending.stopped = true;
  for (const request of state.sending.requests) request.abort();
});
$("together").addEventListener("change", guarded(async () => {
  state.together = $("together").checked;
  await recogniseQuietly();
}));
$("go").addEventListener("click", guarded(() => complete()));
$("cancel").addEventListener("click", guarded(async () => {
  await post(page("/cancel"));
  state.known = null;
  await refresh();
  announce("Cancelled");
}));
$("again").addEventListener("click", guarded(async () => {
  goTo("check");
  state.known = null;
  await refresh();
}));
$("restart").addEventListener("click", guarded(async () => {
  const key = state.key;
  forgetHere();
  if (key) await ask(`pages/${key}`, { method: "DELETE" });
  announce("Deleted. Choose a study.");
}));
window.addEventListener("beforeunload", (event) => {
  if (state.sending || state.shown === "run" || (state.shown === "result" && !state.downloaded)) event.preventDefault();
});
window.addEventListener("pagehide", () => state.key && navigator.sendBeacon(page("/leave")));
window.addEventListener("pageshow", (event) => event.persisted && refresh().catch(alertOf));

async function earlier() {
  offer((await ask("pages")).map(({ key, name }) => [`Continue with ${name}`, async () => {
    state.key = key;
    sessionStorage.setItem("page", key);
    await refresh();
  }]));
}

guarded(async () => {
  if (!state.key) {
    goTo("study");
    return earlier();
  }
  try {
    await refresh();
  } catch (error) {
    if (error.status !== 404) throw error;
    forgetHere(); // of an earlier start of the program
    await earlier();
  }
})();
