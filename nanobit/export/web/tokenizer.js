// Texts to token ids and back, with the same ids as nanobit/tokenizer.py and nanobit/chat.py.

/** Return the tokenizer of a spec (made by tokenizer_data.py): size, the number of ids; encode(text), the ids
 *  of a text; decode(ids), the text of these ids. */
function makeTokenizer(spec) {
  const kinds = {char: charTokenizer, sentencepiece: sentencePieceTokenizer, tiktoken: tiktokenTokenizer};
  return kinds[spec.kind](spec);
}

/** Characters: each character of the training text is a token. Its id is its place in spec.chars. */
function charTokenizer(spec) {
  const chars = Array.from(spec.chars); // whole characters: spec.chars[i] may be half of one
  const idOf = new Map(chars.map((char, id) => [char, id]));
  idOf.delete("\0"); // not text: its id is that of the end-of-text token
  const shown = Array.from(idOf.keys()).filter((char) => char > " ").slice(0, 200).join("");
  function encode(text) {
    const other = Array.from(text).find((char) => !idOf.has(char));
    if (other === undefined) return Array.from(text, (char) => idOf.get(char));
    throw new Error(`The model does not know the character ${JSON.stringify(other)}; it knows ${shown}`);
  }
  return {size: chars.length, encode, decode: (ids) => ids.map((i) => chars[i]).join("")};
}

/** Byte-pair encoding (BPE): two neighbours are joined if they make a token (ranks: Map of token to integer).
 *  The pair of the lowest rank comes first, of equal ones the leftmost, until no pair makes a token. */
function joinPairs(parts, ranks) {
  const n = parts.length;
  const next = parts.map((_, i) => i + 1); // places of the neighbours, which change when parts are joined
  const previous = parts.map((_, i) => i - 1);
  const keyOf = (i) => (next[i] < n ? ranks.get(parts[i] + parts[next[i]]) * n + i : NaN); // NaN: not a token
  let heap; // the keys of all pairs; the smallest is known without a search
  const add = (i) => {
    if (!Number.isNaN(keyOf(i))) heap = mergeHeaps(heap, { key: keyOf(i), depth: 1 });
  };
  parts.forEach((_, i) => add(i));
  while (heap) {
    const key = heap.key;
    heap = mergeHeaps(heap.left, heap.right);
    const i = key % n;
    if (key !== keyOf(i)) continue; // one of the two was joined with another part since then
    const right = next[i];
    parts[i] += parts[right];
    parts[right] = "";
    next[i] = next[right];
    next[right] = n;
    previous[next[i]] = i;
    add(previous[i]);
    add(i);
  }
  return parts.filter((part) => part);
}

/** Return one heap of two, in O(log n). A heap is undefined or {key, left, right, depth}: no key in left and
 *  right is smaller, and depth counts the heaps along right, which is kept the shorter side. */
function mergeHeaps(a, b) {
  if (!a || !b) return a ?? b;
  if (b.key < a.key) return mergeHeaps(b, a);
  a.right = mergeHeaps(a.right, b);
  if ((a.left?.depth ?? 0) < a.right.depth) [a.left, a.right] = [a.right, a.left];
  a.depth = (a.right?.depth ?? 0) + 1;
  return a;
}

const SPACE = "\u2581"; // a space in the pieces of SentencePiece
const UTF8 = {encoder: new TextEncoder(), decoder: new TextDecoder("utf-8", {ignoreBOM: true})};
const toBytes = (text) => Array.from(UTF8.encoder.encode(text));
const fromBytes = (bytes) => UTF8.decoder.decode(Uint8Array.from(bytes));
const nameOf = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`; // <0x0A> for 10

/** SentencePiece: BPE of the characters of the whole text, with a space put before it. Other characters than
 *  those of its pieces become tokens of their UTF-8 bytes, <0x00> to <0xFF>, or else the unknown token. */
function sentencePieceTokenizer(spec) {
  const idOf = new Map(spec.pieces.map(([piece], id) => [piece, id])); // pieces: [piece, score, kind]
  const normal = spec.pieces.filter(([, , kind]) => kind === "normal");
  const ranks = new Map(normal.map(([piece, score]) => [piece, -score])); // the best score is the lowest rank
  const unknown = spec.pieces.findIndex(([, , kind]) => kind === "unknown");
  function encode(text) {
    if (/\p{Surrogate}/u.test(text)) throw new Error("the text has half a surrogate pair");
    const characters = text ? Array.from((SPACE + text).replaceAll(" ", SPACE)) : [];
    return joinPairs(characters, ranks).flatMap((part, i, parts) => {
      if (idOf.has(part)) return idOf.get(part);
      if (idOf.has(nameOf(0))) return toBytes(part).map((byte) => idOf.get(nameOf(byte)));
      return i > 0 && !idOf.has(parts[i - 1]) ? [] : unknown; // one token for unknown characters side by side
    });
  }
  function decode(ids) {
    let text = "";
    let isFirst = true; // the space before the first token is the one that encode puts there
    const bytes = []; // of byte tokens side by side
    for (const [piece, , kind] of ids.filter((id) => id < spec.pieces.length).map((id) => spec.pieces[id])) {
      if (kind !== "byte") text += textOf(bytes.splice(0));
      if (kind === "byte") bytes.push(parseInt(piece.slice(1, 5), 16));
      if (kind === "unknown") text += spec.unknown_text;
      if (kind === "normal") text += (isFirst ? piece.replace(/^\u2581/, "") : piece).replaceAll(SPACE, " ");
      isFirst &&= kind === "control"; // which has no text
    }
    return text + textOf(bytes);
  }
  return {size: spec.pieces.length, encode, decode};
}

/** Return the text of bytes of UTF-8, with a U+FFFD for each byte that belongs to no character. */
function textOf(bytes) {
  const isText = (part) => toBytes(fromBytes(part)).join() === part.join();
  let text = "";
  for (let i = 0, size; i < bytes.length; i += size) {
    size = [1, 2, 3, 4].find((n) => isText(bytes.slice(i, i + n))) ?? 1;
    text += fromBytes(bytes.slice(i, i + size));
  }
  return text;
}

/** GPT-2 (tiktoken): a pattern cuts the text into words, each with the space before it. BPE joins the bytes
 *  of each word (UTF-8, a visible character for each byte). Names of special tokens are ordinary text. */
function tiktokenTokenizer(spec) {
  const charOf = Array.from(spec.bytes); // the character of each byte
  const ranks = new Map(spec.tokens.map((token, id) => [token, id])); // a token's rank is its id
  const special = new Map(Object.entries(spec.special).map(([name, id]) => [id, toBytes(name)]));
  const size = Math.max(spec.tokens.length, ...Array.from(special.keys(), (id) => id + 1));
  // JavaScript has no possessive ++ (like +, but fails sooner), and its \s is not Unicode's white space
  const plain = spec.pattern.replaceAll("++", "+").replaceAll("\\s", "\\p{White_Space}");
  const pattern = new RegExp(plain.replaceAll("\\S", "\\P{White_Space}"), "gu");
  const join = (word) => joinPairs(toBytes(word).map((byte) => charOf[byte]), ranks);
  const encode = (text) => (text.match(pattern) ?? []).flatMap(join).map((token) => ranks.get(token));
  const bytesOf = (token) => Array.from(token, (char) => charOf.indexOf(char));
  const decode = (ids) => fromBytes(ids.flatMap((id) => special.get(id) ?? bytesOf(spec.tokens[id] ?? "")));
  return {size, encode, decode};
}

/** The text of tokens that come one by one. A character of which only some tokens have come waits for the
 *  others, three at most. Decodes 8 to 16 tokens each time: all of them would take O(n^2). */
class TextStream {
  constructor(tokenizer, before) {
    this.decode = (ids) => Array.from(tokenizer.decode(ids)); // whole characters
    this.window = before.slice(-8);
    this.shown = this.decode(this.window).length;
  }
  add(token) {
    this.window.push(token);
    const text = this.decode(this.window);
    let end = text.length;
    while (end > text.length - 3 && text[end - 1] === "\ufffd") end--;
    const added = text.slice(this.shown, end);
    this.shown += added.length;
    if (this.window.length === 16) {
      this.window.splice(0, 8);
      this.shown -= text.length - this.decode(this.window).length;
    }
    return added.join("");
  }
  end() {
    return this.decode(this.window).slice(this.shown).join("");
  }
}

/** Return a message's text without white space around it, in which </s>, a special token, becomes < /s>. */
function cleaned(text, names) {
  const isText = (char) => !/[\x1c-\x1f\p{White_Space}]/u.test(char); // as Python's strip; trim differs
  const chars = Array.from(text);
  let clean = chars.slice(chars.findIndex(isText), chars.findLastIndex(isText) + 1).join("");
  for (const name of names) clean = clean.split(name).join(name.replace(/^./su, "$& "));
  if (names.some((name) => clean.includes(name))) throw new Error("a special token's name cannot be escaped");
  if (!clean) throw new Error("a message is empty");
  if (/\0|\p{Surrogate}/u.test(clean)) throw new Error("a message has a NUL or half a surrogate pair");
  return clean;
}

/** Return the ids of messages ({role, content}, the user's last) up to "Assistant:", before the answer. */
function promptIds(tokenizer, spec, messages) {
  let ids = [spec.bos];
  let head = "";
  for (const {role, content} of messages) {
    const text = cleaned(content, spec.special_names);
    if (role === "user") {
      head = `User: ${text}\nAssistant:`;
      continue;
    }
    const turn = tokenizer.encode(`${head} ${text}`);
    const isJoined = tokenizer.encode(head).some((id, i) => id !== turn[i]);
    if (isJoined) throw new Error("a token joins 'Assistant:' and its answer");
    ids = [...ids, ...turn, spec.eot];
    head = "";
  }
  return [...ids, ...tokenizer.encode(head)];
}

/** Return promptIds of the last turns, as many as take `room` ids. */
function conversationIds(tokenizer, spec, messages, room) {
  const ids = promptIds(tokenizer, spec, messages);
  if (ids.length <= room) return ids;
  if (messages.length < 3) throw new Error(`Shorten it: it has ${ids.length} tokens, and ${room} fit.`);
  return conversationIds(tokenizer, spec, messages.slice(2), room);
}
