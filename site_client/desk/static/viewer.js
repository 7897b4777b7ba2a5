// One case in the browser: slices, window, and the mask over the image. NiiVue draws; this file is its controls.
"use strict";

const byId = (name) => document.getElementById(name);
const canvas = byId("canvas");
const said = byId("said");

// For each plane: NiiVue's slice type, and the axis (x, y, z in RAS) along which its slices lie.
const PLANES = { axial: [0, 2], coronal: [1, 1], sagittal: [2, 0], all: [3, 2] };
// NIFTI_INTENT_LABEL: without it NiiVue reads the values as intensities, and colours the background.
const LABELS = 1002;
// One colour a class, 1 to 255; the background shows the image.
const COLOURS = [[230, 60, 60], [60, 160, 230], [240, 200, 40], [90, 200, 90], [190, 100, 220], [240, 140, 50]];

const labelColours = () => {
  const values = Array.from({ length: 256 }, (_, value) => value);
  const of = (channel) => values.map((value) => (value === 0 ? 0 : COLOURS[(value - 1) % COLOURS.length][channel]));
  return { R: of(0), G: of(1), B: of(2), A: values.map((value) => (value === 0 ? 0 : 255)), I: values, labels: values.map(String) };
};

// The middle of what the mask marks, as a voxel (x, y, z in RAS); null if it marks nothing.
const middle = (mask) => {
  const [columns, rows] = mask.dimsRAS.slice(1, 3);
  const sums = [0, 0, 0];
  let marked = 0;
  mask.img2RAS().forEach((value, place) => {
    if (value === 0) return;
    marked += 1;
    sums[0] += place % columns;
    sums[1] += Math.floor(place / columns) % rows;
    sums[2] += Math.floor(place / columns / rows);
  });
  return marked === 0 ? null : sums.map((sum) => Math.round(sum / marked));
};

const start = async () => {
  const viewer = new niivue.Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 0.85, 0, 0.6],
    crosshairWidth: 0.3,
    crosshairWidthUnit: "percent",
    dragAndDropEnabled: false,
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    logLevel: "error",
    show3Dcrosshair: false,
  });
  if (!(await viewer.attachToCanvas(canvas))) throw new Error("this browser has no WebGL2");
  const answer = await fetch(canvas.dataset.image);
  if (!answer.ok) throw new Error(answer.status === 422 ? await answer.text() : "its file cannot be read; ingest again");
  await viewer.loadFromArrayBuffer(await answer.arrayBuffer(), "image.nii");
  const image = viewer.volumes[0];
  if (canvas.dataset.mask !== "") {
    await viewer.addVolumeFromUrl({ url: canvas.dataset.mask, name: "mask.nii", opacity: 0.5 });
    viewer.volumes[1].hdr.intent_code = LABELS;
    viewer.volumes[1].setColormapLabel(labelColours());
    viewer.updateGLVolume();
    const voxel = middle(viewer.volumes[1]);
    if (voxel !== null) viewer.scene.crosshairPos = viewer.vox2frac(voxel);
  }
  connect(viewer, image);
  window.viewer = viewer;
  document.body.dataset.state = "ready";
};

const connect = (viewer, image) => {
  const size = () => image.dimsRAS.slice(1, 4);
  const axis = () => PLANES[byId("plane").value][1];
  const first = [image.cal_min, image.cal_max];

  const tell = () => {
    const [low, high] = [image.cal_min, image.cal_max];
    byId("low").value = Number(low.toPrecision(6));
    byId("high").value = Number(high.toPrecision(6));
  };
  const window_ = (low, high) => {
    if (!(Number.isFinite(low) && Number.isFinite(high) && low < high)) return;
    [image.cal_min, image.cal_max] = [low, high];
    viewer.updateGLVolume();
    tell();
  };
  const place = () => {
    const voxel = viewer.frac2vox(viewer.scene.crosshairPos);
    byId("slice").max = size()[axis()] - 1;
    byId("slice").value = voxel[axis()];
    byId("place").textContent = `${voxel[axis()] + 1} of ${size()[axis()]}`;
  };
  const go = (number) => {
    const voxel = Array.from(viewer.frac2vox(viewer.scene.crosshairPos));
    voxel[axis()] = number;
    viewer.scene.crosshairPos = viewer.vox2frac(voxel);
    viewer.drawScene();
    viewer.createOnLocationChange();
  };
  const plane = () => {
    viewer.setSliceType(PLANES[byId("plane").value][0]);
    place();
  };

  viewer.onLocationChange = (found) => {
    const [value, mask] = found.values.map((one) => one.value);
    const where = Array.from(viewer.frac2vox(viewer.scene.crosshairPos)).join(", ");
    said.textContent = `voxel ${where}: ${Number(value.toPrecision(6))}${mask === undefined ? "" : `, mask ${mask}`}`;
    place();
  };
  viewer.onIntensityChange = tell;
  byId("plane").addEventListener("change", plane);
  byId("slice").addEventListener("input", (event) => go(Number(event.target.value)));
  byId("low").addEventListener("change", () => window_(Number(byId("low").value), image.cal_max));
  byId("high").addEventListener("change", () => window_(image.cal_min, Number(byId("high").value)));
  byId("preset").addEventListener("change", (event) => window_(...(event.target.value === "" ? first : event.target.value.split(",").map(Number))));
  byId("opacity")?.addEventListener("input", (event) => viewer.setOpacity(1, Number(event.target.value)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  tell();
  plane();
  viewer.createOnLocationChange();
};

start().catch((error) => {
  said.textContent = `The image cannot be shown: ${error.message}`;
  document.body.dataset.state = "failed";
});
