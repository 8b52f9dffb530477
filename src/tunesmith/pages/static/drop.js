// A file that is dropped or chosen goes to the folder of data, with its progress; then its page is opened.
"use strict";
import {say} from "./page.js";

const zone = document.querySelector("[data-drop]");
const field = zone?.querySelector("input[type=file]");

function send(file) {
  const request = new XMLHttpRequest(); // which tells how far it is
  const words = zone.querySelector("[data-progress]");
  request.open("PUT", `/v1/local_files/${encodeURIComponent(file.name)}`);
  request.setRequestHeader("X-Tunesmith", "1");
  request.upload.onprogress = event => {
    if (event.lengthComputable) words.textContent = `${file.name}: ${Math.round(100 * event.loaded / event.total)} %`;
  };
  request.onload = () => {
    let values = {};
    try { values = JSON.parse(request.responseText); } catch { /* said below */ }
    if (request.status === 200) location.assign(`/ui/data?file=${encodeURIComponent(values.name)}`);
    else { words.textContent = ""; say(values.error?.message ?? `The server answered with status ${request.status}.`); }
  };
  request.onerror = () => { words.textContent = ""; say("The file did not arrive: the server does not answer."); };
  request.send(file);
}

if (zone) {
  for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, event => { event.preventDefault(); zone.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", event => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
  });
  field.addEventListener("change", () => { if (field.files[0]) send(field.files[0]); });
}
