// Draws the box that a release keeps, in the pixels of the whole image. The fields can be filled in by hand as well.
"use strict";

const picture = document.getElementById("picture");
const box = document.getElementById("box");
const names = ["left", "top", "width", "height"];
const form = document.getElementById("decide");
const fields = form === null ? [] : names.map((name) => form.elements.namedItem(name));

if (picture !== null && fields.length > 0 && fields.every((field) => field !== null)) {
  const rows = Number(picture.dataset.rows);
  const columns = Number(picture.dataset.columns);
  let start = null;

  const at = (event) => {
    const frame = picture.getBoundingClientRect();
    const clamp = (value, most) => Math.min(Math.max(Math.round(value), 0), most);
    return [
      clamp(((event.clientX - frame.left) / frame.width) * columns, columns),
      clamp(((event.clientY - frame.top) / frame.height) * rows, rows),
    ];
  };

  const show = () => {
    const [left, top, width, height] = fields.map((field) => Number(field.value));
    box.hidden = fields.some((field) => field.value === "");
    box.style.left = `${(100 * left) / columns}%`;
    box.style.top = `${(100 * top) / rows}%`;
    box.style.width = `${(100 * width) / columns}%`;
    box.style.height = `${(100 * height) / rows}%`;
  };

  const put = (values) => {
    fields.forEach((field, place) => { field.value = values[place]; });
    show();
  };

  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    picture.setPointerCapture(event.pointerId);
    start = at(event);
  });
  picture.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const [column, row] = at(event);
    put([Math.min(start[0], column), Math.min(start[1], row), Math.abs(column - start[0]), Math.abs(row - start[1])]);
  });
  picture.addEventListener("pointerup", () => { start = null; });
  fields.forEach((field) => field.addEventListener("input", show));
  document.getElementById("whole").addEventListener("click", () => put(["", "", "", ""]));
}
