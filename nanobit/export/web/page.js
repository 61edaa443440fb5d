// The page: what a person sees and touches. The model computes in a worker (model.js), so that the page stays
// responsive. What a person or the model writes enters the page as text (textContent), never as HTML.

const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const about = JSON.parse(byId("about").textContent);
const model = JSON.parse(byId("model").textContent);
const tokenizer = JSON.parse(byId("tokenizer").textContent);
const count = (n) => n.toLocaleString("en-US", {maximumFractionDigits: 4});
const percent = (p) => (p > 0 && p < 0.005 ? "<1%" : `${Math.round(100 * p)}%`);
const megabytes = (n) => `${count(Number((n / 1e6).toPrecision(2)))} MB`;
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** Add an element with a text and a class to the end of a parent; return it. */
function add(parent, tag, text = "", className = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;
  element.className = className;
  return element;
}

/** Show in one line what went wrong; an empty text removes the line. */
function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = text === "";
  byId("error").scrollIntoView({block: "nearest"});
}

// --- the worker: the messages that answer a question have its id

const questions = new Map(); // by id: {resolve, reject, onText}
let nQuestions = 0;
let worker;

function startWorker() {
  const source = new Blob([byId("worker").textContent], {type: "text/javascript"});
  worker = new Worker(URL.createObjectURL(source)); // a page that is a file can start no other worker
  worker.onerror = (event) => giveUp(`The model has stopped. ${event.message || "It could not start."}`);
  worker.onmessage = ({data}) => {
    const question = questions.get(data.id);
    if (data.type === "text") {
      question.onText(data.text);
      return;
    }
    questions.delete(data.id);
    if (data.type === "ready") whenReady(data.seconds);
    else if (data.type !== "error") question.resolve(data);
    else if (question) question.reject(new Error(data.message));
    else giveUp(data.message);
  };
  worker.postMessage({type: "load", model, tokenizer, weights: byId("weights").textContent});
}

/** Return a promise of the last message on a question; onText gets the pieces of text before it. */
function ask(question, onText) {
  return new Promise((resolve, reject) => {
    nQuestions += 1;
    questions.set(nQuestions, {resolve, reject, onText});
    worker.postMessage({...question, id: nQuestions});
  });
}

/** Show why the worker cannot continue, and leave no question open. */
function giveUp(text) {
  for (const {reject} of questions.values()) reject(new Error(text));
  questions.clear();
  byId("speed").textContent = "";
  byId("turn").textContent = "";
  showError(text);
}

function whenReady(seconds) {
  byId("speed").textContent = `The model is ready, after ${seconds.toFixed(2)} s.`;
  setBusy(false);
  if (about.kind === "tictactoe") newGame();
}

function setBusy(isBusy) {
  for (const button of all("[data-when]")) button.disabled = isBusy !== (button.dataset.when === "busy");
}

// --- text, sums and conversations: a prompt, and what the model writes after it

const messages = []; // {role, content} of a conversation, of user and assistant in turns

/** Let the model continue a text, complete a sum or answer a message; show both in a list. Return whether it
 *  did; if not, the error is shown and the prompt is in the box again. */
async function submit(prompt) {
  const isChat = about.kind === "chat";
  const options = {};
  for (const box of all("#settings input")) options[box.id] = box.valueAsNumber;
  if (Number.isNaN(options.seed)) options.seed = Math.floor(Math.random() * 1e6);
  const input = isChat ? {messages: [...messages, {role: "user", content: prompt}]} : {prompt};
  const item = add(byId("answers"), "li");
  if (!isChat) byId("answers").prepend(item); // the latest stands beside the box
  add(item, "span", prompt, "given");
  const place = add(item, "span", "", "new");
  (isChat ? byId("form") : item).scrollIntoView({block: "nearest"});
  showError("");
  setBusy(true);
  byId("speed").textContent = "Writing ...";
  let isDone = true;
  try {
    // an answer begins with the space after "Assistant:"
    const onText = (text) => place.append(isChat && !place.textContent ? text.trimStart() : text);
    const done = await ask({type: "generate", ...options, ...input}, onText);
    const text = place.textContent;
    const isReadable = text.trim() && !text.includes("\0");
    if (isChat && !isReadable && done.reason === "stopped") throw new Error("Stopped before an answer came.");
    if (isChat && !isReadable) throw new Error("The model gave no answer. Please ask again.");
    if (isChat) messages.push(...input.messages.slice(-1), {role: "assistant", content: text});
    if (about.kind === "arithmetic") addVerdict(item, prompt + text);
    byId("speed").textContent = describe(done, options);
    byId("spoken").textContent = text; // for a screen reader: once, not token by token
  } catch (error) {
    item.remove();
    byId("prompt").value = byId("prompt").value || prompt;
    byId("speed").textContent = "";
    showError(error.message);
    isDone = false;
  }
  setBusy(false);
  return isDone;
}

/** Return how a text ended, and its speed: the first token comes with the reading of the prompt. */
function describe({reason, new_tokens, decode_seconds}, {temperature, seed}) {
  const end = {end: "The model ended", stopped: "Stopped", length: "Length reached"}[reason];
  const texts = [`New tokens: ${count(new_tokens)}`];
  const speed = Math.round((new_tokens - 1) / decode_seconds);
  if (new_tokens > 1 && decode_seconds > 0) texts.push(`tokens per second: ${count(speed)}`);
  if (temperature > 0) texts.push(`seed: ${seed}`);
  return `${end}. ${texts.join(", ")}.`;
}

/** Add whether a sum such as 12+7=19 is right; nothing to another text. */
function addVerdict(item, text) {
  const [, a, sign, b, answer] = /^(\d+)([-+x])(\d+)=(.*)$/s.exec(text) || [];
  if (!sign) return;
  const right = {"+": (p, q) => p + q, "-": (p, q) => p - q, x: (p, q) => p * q}[sign](BigInt(a), BigInt(b));
  if (answer === String(right)) add(item, "span", "right", "verdict");
  else add(item, "span", `wrong, it is ${right}`, "verdict wrong");
}

function submitForm(event) {
  event.preventDefault();
  const {value} = byId("prompt");
  if (about.kind === "text") {
    submit(value);
  } else if (about.kind === "arithmetic") {
    submit(`${value.replace(/[\s=]/g, "").replace(/[*\u00d7]/g, "x")}=`);
  } else if (value.trim()) {
    byId("prompt").value = "";
    submit(value.trim());
  }
}

/** Let the model answer the last message again; keep the former answer if that fails. */
async function retry() {
  if (!messages.length || !byId("form").reportValidity()) return;
  const former = messages.splice(-2);
  const item = byId("answers").lastChild;
  item.remove();
  if (await submit(former[0].content)) return;
  messages.push(...former);
  byId("answers").append(item);
}

function resetChat() {
  messages.length = 0;
  showError("");
  byId("answers").replaceChildren();
  byId("prompt").focus();
}

// --- tabs, and what happens when

function selectTab(selected) {
  for (const tab of all("[role=tab]")) {
    tab.setAttribute("aria-selected", tab === selected);
    tab.tabIndex = tab === selected ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== selected;
  }
  drawFigures();
}

/** Move between the two tabs by the arrow keys. */
function moveToTab(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = all("[role=tab]").find((tab) => tab !== event.target);
  other.focus();
  selectTab(other);
}

/** Send the form by Enter; Shift and Enter begin a new line. */
function submitByKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!byId("go").disabled) byId("form").requestSubmit();
}

function start() {
  const fileSize = document.documentElement.outerHTML.length; // nothing was added yet; all of it is ASCII
  window.onerror = (message) => showError(`This browser cannot run the page. ${message}`);
  window.onunhandledrejection = (event) => showError(event.reason.message);
  document.body.className = about.kind;
  for (const part of all("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(about.kind);
  showFacts(fileSize);
  const prompts = about.prompts.filter((prompt) => prompt.trim());
  for (const prompt of prompts) {
    const button = add(byId("examples"), "button", prompt);
    button.type = "button";
    button.dataset.when = "ready";
    button.disabled = true;
    button.onclick = () => {
      byId("prompt").value = prompt;
      byId("form").requestSubmit();
    };
  }
  if (about.kind === "chat") byId("form").before(byId("answers"));
  if (about.kind === "arithmetic") {
    byId("temperature").value = 0;
    byId("prompt").rows = 1;
  }
  byId("prompt").value = about.kind === "chat" ? "" : prompts[0] || "";
  byId("form").onsubmit = submitForm;
  byId("prompt").onkeydown = submitByKey;
  byId("settings").addEventListener("invalid", () => byId("settings").open = true, true);
  byId("stop").onclick = () => worker.postMessage({type: "stop"});
  byId("retry").onclick = retry;
  byId("reset").onclick = resetChat;
  for (const button of byId("board").children) button.onclick = () => play(button.value);
  byId("board").onkeydown = moveOnBoard;
  byId("new").onclick = newGame;
  byId("side").onchange = newGame;
  byId("ask").onchange = askAnew;
  byId("show").onchange = drawBoard;
  for (const tab of all("[role=tab]")) tab.onclick = () => selectTab(tab);
  byId("tabs").onkeydown = moveToTab;
  byId("matrix-name").onchange = drawMatrix;
  window.onresize = drawFigures;
  matchMedia("(prefers-color-scheme: dark)").onchange = drawFigures;
  drawBoard();
  drawFigures();
  startWorker();
}

start();
