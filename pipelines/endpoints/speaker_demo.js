// The page of `goldcrest serve --demo`: record or upload, enrol, verify, see the score.
// Whatever comes from the server or the user is set as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const RATE = 16000; // Hz, what the model hears
let recording = null; // a WAV file as a Blob
let models = [];

// ------------------------------------------------------------------------------------- server

async function call(method, path, form) {
  const token = byId("token").value;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { method, headers, body: form });
  const answer = await response.json();
  if (response.status === 401) byId("door").hidden = false;
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

function form() {
  const made = new FormData();
  made.append("speaker", byId("speaker").value);
  made.append("model", byId("model").value);
  made.append("audio", recording, "recording.wav");
  return made;
}

async function refresh() {
  models = (await call("GET", "models")).models;
  byId("door").hidden = true;
  const chosen = byId("model").value;
  byId("model").replaceChildren(...models.map((model) => new Option(model.name)));
  if (models.some((model) => model.name === chosen)) byId("model").value = chosen;
  const { speakers } = await call("GET", "speakers");
  byId("known").replaceChildren(...speakers.map((row) => new Option(row.speaker)));
  byId("speakers").replaceChildren(...speakers.map(speakerLine));
}

function speakerLine(row) {
  const line = document.createElement("li");
  line.textContent = `${row.speaker} (${row.model ?? "another model"}, ${row.recordings} recordings) `;
  const forget = document.createElement("button");
  forget.textContent = "forget";
  forget.onclick = act(async () => {
    await call("DELETE", `speakers/${encodeURIComponent(row.speaker)}`);
    await refresh();
    say(`${row.speaker} is forgotten`);
  });
  line.append(forget);
  return line;
}

// -------------------------------------------------------------------------------------- audio

// Any format that the browser can decode, as 16-bit mono WAV: what every server build can read.
async function toWav(blob) {
  const context = new OfflineAudioContext(1, 1, RATE);
  const audio = await context.decodeAudioData(await blob.arrayBuffer()); // resampled to RATE
  const view = new DataView(new ArrayBuffer(44 + 2 * audio.length));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * audio.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * audio.length, true);
  const channels = Array.from({ length: audio.numberOfChannels }, (_, c) => audio.getChannelData(c));
  for (let i = 0; i < audio.length; i++) {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, mean)) * 32767, true);
  }
  return new Blob([view], { type: "audio/wav" });
}

async function take(blob) {
  recording = await toWav(blob);
  byId("play").src = URL.createObjectURL(recording);
  byId("play").hidden = false;
  say(`a recording of ${((recording.size - 44) / 2 / RATE).toFixed(1)} s is ready`);
}

let recorder = null;

async function record() {
  if (recorder) return recorder.stop();
  if (!navigator.mediaDevices) throw new Error("browsers record on https and on localhost only");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = act(async () => {
    stream.getTracks().forEach((track) => track.stop());
    recorder = null;
    byId("record").textContent = "Record";
    byId("record").setAttribute("aria-pressed", "false");
    await take(new Blob(pieces));
  });
  recorder.start();
  byId("record").textContent = "Stop";
  byId("record").setAttribute("aria-pressed", "true");
}

// ------------------------------------------------------------------------------------- result

function say(text, bad = false) {
  byId("say").textContent = text;
  byId("say").classList.toggle("bad", bad);
}

// Runs an action of the user; what goes wrong is said on the page.
function act(action) {
  return async (event) => {
    try {
      await action(event);
    } catch (error) {
      say(error.message, true);
    }
  };
}

function draw({ score, threshold, model }) {
  const svg = byId("scores");
  const found = models.find((each) => each.name === model);
  const histogram = found && found.calibration && found.calibration.histogram;
  svg.replaceChildren();
  svg.hidden = byId("legend").hidden = !histogram;
  if (!histogram) return;
  const { edges } = histogram;
  const [left, right] = [edges[0], edges[edges.length - 1]];
  const x = (value) => (600 * (Math.min(right, Math.max(left, value)) - left)) / (right - left);
  for (const kind of ["target", "nontarget"]) {
    const most = Math.max(...histogram[kind], 1);
    histogram[kind].forEach((count, bin) => {
      const height = (170 * count) / most;
      const at = { x: x(edges[bin]), y: 180 - height, width: x(edges[bin + 1]) - x(edges[bin]), height };
      shape("rect", kind, at);
    });
  }
  shape("line", "threshold", { x1: x(threshold), x2: x(threshold), y1: 0, y2: 180 });
  shape("line", "score", { x1: x(score), x2: x(score), y1: 0, y2: 180 });
  shape("text", "axis", { x: 0, y: 196 }).textContent = left.toFixed(1);
  shape("text", "axis", { x: 575, y: 196 }).textContent = right.toFixed(1);

  function shape(name, kind, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    made.setAttribute("class", kind);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
    return made;
  }
}

function ready() {
  if (!recording) throw new Error("record something or choose a file first");
  if (!byId("speaker").value) throw new Error("give a name first");
}

async function enroll() {
  ready();
  const answer = await call("POST", "enroll", form());
  await refresh();
  say(`${answer.speaker} is enrolled with ${answer.recordings} recording(s)`);
}

async function verify() {
  ready();
  const answer = await call("POST", "verify", form());
  const name = byId("speaker").value;
  byId("verdict").hidden = false;
  byId("verdict").textContent = answer.accept ? `This is ${name}.` : `This is not ${name}.`;
  say(`score ${answer.score.toFixed(3)}, accepted from ${answer.threshold.toFixed(3)}`);
  draw(answer);
}

byId("file").onchange = act(async (event) => {
  if (event.target.files.length) await take(event.target.files[0]);
});
byId("record").onclick = act(record);
byId("enroll").onclick = act(enroll);
byId("verify").onclick = act(verify);
byId("enter").onclick = act(refresh);
act(refresh)();
