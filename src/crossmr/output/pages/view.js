"use strict";
const volumes = JSON.parse(document.getElementById("volumes").textContent);
const images = volumes.filter((v) => v.kind !== "standard deviation");
const { Niivue, NVImage } = niivue;
const lookAt = JSON.parse(document.getElementById("look-at").textContent);
// width of the window as a multiple of the contrast's own
const state = { white: 1, overlay: false, opacity: 0.6, layout: 0 };
const find = (modality, kind) => images.find((v) => v.modality === modality && v.kind === kind);

const options = { backColor: [0, 0, 0, 1], crosshairColor: [0.88, 0.64, 0.35, 0.6], crosshairWidth: 1, crosshairWidthUnit: "mm", crosshairGap: 6, show3Dcrosshair: false,
  isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarShowRender: 0, multiplanarForceRender: false,
  dragAndDropEnabled: false, isColorbar: false, loadingText: "", fontSizeScaling: 0.4, logLevel: "error",
  viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
  dragMode: 0 }; // none: by dragging, one pane alone would get another window, or move
const NIIVUES = "hjklmv"; // keys that NiiVue would take, for one pane alone
const layouts = [["all planes", 3], ["axial", 0], ["coronal", 1], ["sagittal", 2]];

const panes = ["left", "right"].map((id) => ({ id, nv: new Niivue({ ...options }), shown: null, busy: Promise.resolve() }));

async function decoded(entry) {
  if (entry.url) return (await fetch(entry.url)).arrayBuffer();
  const text = atob(entry.data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

async function load(pane, entry) {
  pane.cache ??= new Map();
  if (!pane.cache.has(entry)) {
    const { black, white } = entry;
    const colormap = entry.kind === "standard deviation" ? "inferno" : "gray";
    const image = await NVImage.loadFromUrl({ url: entry.name + ".nii.gz", name: entry.name + ".nii.gz",
      buffer: await decoded(entry), colormap, cal_min: black, cal_max: white, trustCalMinMax: false });
    image.cal_min = black; // NiiVue chooses another where it is given as 0
    image.cal_max = white;
    image.black = black;
    image.white = white;
    pane.cache.set(entry, image);
  }
  return pane.cache.get(entry);
}

function show(pane, entry) {
  pane.shown = entry;
  for (const button of document.querySelectorAll(`#${pane.id} nav button`))
    button.setAttribute("aria-pressed", button.textContent.endsWith(entry.name));
  const name = document.querySelector(`#${pane.id} .name`);
  name.textContent = entry.kind === "synthetic" ? `SYNTHETIC ${entry.name.replace(" synthetic", "")}` : entry.name;
  name.className = `name ${entry.kind}`;
  pane.busy = pane.busy.then(async () => {
    if (pane.shown !== entry) return;
    const { nv } = pane, layers = [await load(pane, entry)];
    const std = volumes.find((v) => v.kind === "standard deviation" && v.modality === entry.modality);
    if (state.overlay && std && entry.kind === "synthetic") layers.push(await load(pane, std));
    layers[0].cal_min = layers[0].black;
    layers[0].cal_max = layers[0].black + state.white * (layers[0].white - layers[0].black);
    if (layers[1]) layers[1].opacity = state.opacity;
    const at = nv.volumes.length ? [...nv.scene.crosshairPos] : null;
    nv.volumes = layers;
    nv.volumes.forEach((image, index) => nv.setVolume(image, index));
    nv.updateGLVolume();
    if (at) nv.scene.crosshairPos = at;
    nv.drawScene();
    report();
  });
  return pane.busy;
}

const again = () => Promise.all(panes.map((pane) => show(pane, pane.shown)));

function report() {
  const position = panes[0].nv.frac2mm(panes[0].nv.scene.crosshairPos);
  const values = panes.filter((pane) => pane.nv.volumes.length).map((pane) =>
    `${pane.shown.name} ${pane.nv.volumes.map((image) => {
      const voxel = image.mm2vox([position[0], position[1], position[2]]);
      return image.getValue(voxel[0], voxel[1], voxel[2]).toFixed(3);
    }).join(" ± ")}`);
  document.getElementById("values").textContent =
    `${[0, 1, 2].map((i) => position[i].toFixed(1)).join(", ")} mm   ${values.join("   ")}`;
}

function setLayout(index) {
  state.layout = (index + layouts.length) % layouts.length;
  for (const pane of panes) pane.nv.setSliceType(layouts[state.layout][1]);
  document.querySelectorAll("#layouts button").forEach((button, i) => button.setAttribute("aria-pressed", i === state.layout));
}

function setWhite(value) {
  state.white = Math.min(2, Math.max(0.3, value));
  document.getElementById("white").value = state.white;
  return again();
}

function setOverlay(on) {
  state.overlay = on;
  document.getElementById("overlay").checked = on;
  return again();
}

function flip() {
  const { modality, kind } = panes[1].shown;
  const other = kind === "synthetic" ? find(modality, "truth") ?? panes[0].shown : find(modality, "synthetic") ?? panes[0].shown;
  return show(panes[1], other);
}

function goTo(position) {
  for (const { nv } of panes) { nv.scene.crosshairPos = [...position]; nv.drawScene(); }
  report();
}

const steps = { ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1],
  PageDown: [0, 0, -1] };
window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=range]")) return;
  if (event.code === "Space" && event.target.matches("button, input")) return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  if (digit && images[digit[1] - 1]) show(panes[event.shiftKey ? 0 : 1], images[digit[1] - 1]);
  else if (event.code === "Space") flip();
  else if (event.key === "u") setOverlay(!state.overlay);
  else if (event.key === "l") setLayout(state.layout + 1);
  else if (event.key === "+" || event.key === "=") setWhite(state.white - 0.05);
  else if (event.key === "-") setWhite(state.white + 0.05);
  else if (NIIVUES.includes(event.key.toLowerCase())) { /* nothing */ }
  else if (steps[event.key]) { panes[0].nv.moveCrosshairInVox(...steps[event.key]); goTo(panes[0].nv.scene.crosshairPos); }
  else return;
  event.preventDefault();
  event.stopPropagation();
}, true);

// after a click of the mouse the keys are the viewer's again; who came by the keyboard stays where they are
const released = (event) => event.detail && event.currentTarget.blur();

async function start() {
  for (const pane of panes) {
    await pane.nv.attachToCanvas(document.querySelector(`#${pane.id} canvas`));
    pane.nv.onLocationChange = report;
    const nav = document.querySelector(`#${pane.id} nav`);
    images.forEach((entry, index) => {
      const button = document.createElement("button");
      button.className = entry.kind;
      button.textContent = `${index + 1} ${entry.name}`;
      button.addEventListener("click", (event) => { show(pane, entry); released(event); });
      nav.append(button);
    });
  }
  layouts.forEach(([name], index) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.addEventListener("click", (event) => { setLayout(index); released(event); });
    document.getElementById("layouts").append(button, " ");
  });
  document.getElementById("overlay-label").hidden = !volumes.some((v) => v.kind === "standard deviation");
  document.getElementById("white").addEventListener("input", (event) => setWhite(Number(event.target.value)));
  document.getElementById("overlay").addEventListener("change", (event) => setOverlay(event.target.checked));
  document.getElementById("opacity").addEventListener("input", (event) => { state.opacity = Number(event.target.value); again(); });
  const synthetic = images.find((v) => v.kind === "synthetic") ?? images[1] ?? images[0];
  const beside = find(synthetic.modality, "truth") ?? images[0];
  await show(panes[0], beside);
  await show(panes[1], synthetic);
  panes[0].nv.broadcastTo([panes[1].nv], { "2d": true, "3d": true });
  panes[1].nv.broadcastTo([panes[0].nv], { "2d": true, "3d": true });
  setLayout(0);
  goTo(lookAt ? panes[0].nv.mm2frac(lookAt) : [0.45, 0.5, 0.6]);
  document.body.dataset.ready = "yes";
}
start();
