// Runs a page in Node, for export.py --verify and the tests: the scripts and the weights that it holds.

/** Return {Model, ..., model, tokenizer, bos} of a page. */
function openPage(path) {
  const page = require("fs").readFileSync(path, "utf8");
  const element = (id) => {
    const start = page.indexOf(">", page.indexOf(` id="${id}">`)) + 1;
    return page.slice(start, page.indexOf("</script>", start));
  };
  const names = "{Model, makeTokenizer, generate, logSoftmax}";
  const scripts = new Function(`${element("worker")}\nreturn ${names};`)();
  const {buffer} = Uint8Array.from(Buffer.from(element("weights"), "base64"));
  const settings = JSON.parse(element("model"));
  const tokenizer = scripts.makeTokenizer(JSON.parse(element("tokenizer")));
  return {...scripts, model: new scripts.Model(settings, buffer), tokenizer, bos: settings.bos};
}

/** Return the ids of a prompt. */
function tokenize(path, text) {
  const {tokenizer, bos} = openPage(path);
  return [bos, ...tokenizer.encode(text)];
}

/** Return the logits (B, T, V) after each token of rows (B, T). */
function logitsOf(path, rows) {
  const {model} = openPage(path);
  return rows.map((ids) => {
    model.reset();
    return ids.map((id) => Array.from(model.forward(id)));
  });
}

/** Return the cross entropy in nats, summed over the targets that count (not -100), of windows [inputs,
 *  targets]. */
function natsOf(path, windows) {
  const {model, logSoftmax} = openPage(path);
  let nats = 0;
  for (const [inputs, targets] of windows) {
    model.reset();
    inputs.forEach((id, i) => {
      const logprobs = logSoftmax(model.forward(id));
      if (targets[i] >= 0) nats -= logprobs[targets[i]];
    });
  }
  return nats;
}

/** Return n greedy tokens after ids. */
function greedy(path, ids, n) {
  const {model, generate} = openPage(path);
  const options = {temperature: 0, max_new_tokens: n};
  return [...generate(model, ids, options, Math.random)].filter((token) => token !== null);
}
