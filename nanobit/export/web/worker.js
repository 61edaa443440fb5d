// Answers the messages of the page in a worker, so that the page stays responsive. Each answer has the id of
// its question; an error in an answer is sent as {type: "error", id, message}.

class ModelWorker {
  /** scope: what has postMessage and onmessage in a worker */
  constructor(scope) {
    this.scope = scope;
    this.channel = new MessageChannel();
    this.stops = 0; // messages {type: "stop"} so far
    this.last = Promise.resolve(); // one answer after another, since all use the same KV cache
    scope.onmessage = ({data}) => this.receive(data);
  }

  receive(message) {
    if (message.type === "stop") {
      this.stops += 1;
      return;
    }
    if (message.type === "matrix") {
      this.matrix(message); // without a turn, since it reads no text
      return;
    }
    const before = this.stops;
    const answer = () => this[message.type](message, () => this.stops > before);
    this.last = this.last.then(answer).catch((error) => {
      this.send("error", message, {message: error.message});
    });
  }

  send(type, question, fields) {
    this.scope.postMessage({type, id: question.id, ...fields});
  }

  /** Let messages in, without the 4 ms that a timer would wait. */
  pause() {
    return new Promise((resolve) => {
      this.channel.port1.onmessage = resolve;
      this.channel.port2.postMessage(null);
    });
  }

  /** {model, tokenizer, weights}: the JSON elements of the page, and its base64 text */
  load(question) {
    const start = performance.now();
    const text = atob(question.weights);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    this.model = new Model(question.model, bytes.buffer);
    this.spec = question.tokenizer;
    this.tokenizer = makeTokenizer(this.spec);
    this.send("ready", question, {seconds: secondsSince(start)});
  }

  /** Return the ids of a text that begins here. */
  encode(text) {
    return [this.spec.bos, ...this.tokenizer.encode(text)];
  }

  /** {prompt or messages, max_new_tokens, temperature, top_k, top_p, seed}: the text comes token by token.
   *  An answer in a conversation has half of the context at most, and what comes before it the rest. */
  async generate(question, isStopped) {
    const {prompt, messages} = question;
    const options = {...question};
    let ids;
    if (messages) {
      const size = this.model.settings.seq_len;
      options.max_new_tokens = Math.min(question.max_new_tokens, Math.floor(size / 2));
      ids = conversationIds(this.tokenizer, this.spec, messages, size - options.max_new_tokens);
    } else {
      ids = this.encode(prompt);
    }
    const stream = new TextStream(this.tokenizer, ids);
    const sendText = (text) => this.send("text", question, {text});
    let reason = "length";
    let newTokens = 0;
    let firstToken = 0; // when it came
    for (const token of generate(this.model, ids, options, makeRandom(question.seed))) {
      if (token !== null) {
        newTokens += 1;
        if (newTokens === 1) firstToken = performance.now();
        if (token === this.spec.eot) {
          reason = "end";
          break;
        }
        sendText(stream.add(token));
      }
      await this.pause();
      if (isStopped()) {
        reason = "stopped";
        break;
      }
    }
    sendText(stream.end());
    this.send("done", question, {
      reason,
      new_tokens: newTokens,
      decode_seconds: secondsSince(firstToken), // of all new tokens but the first
    });
  }

  /** {texts}: the log probabilities (V) of the token after each text, and of the text itself */
  next(question) {
    const logprobs = [];
    const sums = [];
    for (const text of question.texts) {
      let sum = 0;
      let ahead = null;
      this.model.reset();
      for (const token of this.encode(text)) {
        if (ahead) sum += ahead[token];
        ahead = logSoftmax(this.model.forward(token));
      }
      logprobs.push(Array.from(ahead));
      sums.push(sum);
    }
    this.send("next", question, {logprobs, sums});
  }

  /** {name}, as in model.tensors: the codes of a ternary matrix, or the values of another, row after row */
  matrix(question) {
    const matrix = this.model.matrix(question.name);
    this.send("matrix", question, {shape: matrix.shape, codes: matrix.values()});
  }
}

function secondsSince(start) {
  return (performance.now() - start) / 1000;
}

// Node, in which the tests run these scripts, has no such function.
if (typeof importScripts === "function") new ModelWorker(self);
