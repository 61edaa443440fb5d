// A ternary language model: the forward pass of quant.py and model.py in the same order, for one token at a
// time and in doubles.
//
// The matrix of a ternary layer holds only -1, 0 and 1, and one scale s. The input of the layer is rounded to
// integers of 8 bits with a scale a, the integers are added up, and the sums are divided by both scales.
//
// Shapes, as in model.py: C = n_embd, H = n_head, K = n_kv_head, D = C / H, V = vocab_size. A vector is a
// Float64Array; a matrix (out, in) multiplies a vector of length `in`.

// The smallest max|x|: an all-zero input divides by this, not by zero.
const EPS = 1e-5;

/** Return the nearest integer; a half goes to the even neighbour, as everywhere in Python. */
function roundHalfToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** Return {q, scale} of x: q = round(x * scale) as int8, with zeros at the end up to a multiple of 4. */
function quantizeActivations(x) {
  let largest = EPS;
  for (const value of x) largest = Math.max(largest, Math.abs(value));
  const scale = 127 * (1 / largest);
  const q = new Int8Array(4 * Math.ceil(x.length / 4));
  for (let i = 0; i < x.length; i++) {
    q[i] = Math.min(127, Math.max(-128, roundHalfToEven(x[i] * scale)));
  }
  return {q, scale};
}

/** Codes -1, 0 and 1 with one scale. A byte holds code + 1 of four neighbours in a row, lowest bits first.
 *  All rows of the first four columns come first, then those of the next four. Missing columns are zeros. */
class TernaryMatrix {
  constructor(buffer, {shape, offset, scale}) {
    this.shape = shape;
    this.scale = scale;
    this.groups = Math.ceil(shape[1] / 4);
    this.bytes = new Uint8Array(buffer, offset, this.groups * shape[0]);
  }

  /** Return W x: integer sums, then the scales. No row multiplies: two neighbouring inputs, each taken with
   *  -1, 0 or 1, have only nine sums. These stand in a table, each at the 4 bits of its two codes, and each
   *  row adds what it finds at its own bits. */
  multiply(x) {
    const [nRows] = this.shape;
    const bytes = this.bytes;
    const {q, scale} = quantizeActivations(x);
    const sums = new Int32Array(nRows);
    const lowHalf = new Int32Array(16);
    const highHalf = new Int32Array(16);
    for (let group = 0; group < this.groups; group++) {
      const i = 4 * group;
      for (let first = -1; first <= 1; first++) {
        for (let second = -1; second <= 1; second++) {
          const bits = (first + 1) | ((second + 1) << 2);
          lowHalf[bits] = first * q[i] + second * q[i + 1];
          highHalf[bits] = first * q[i + 2] + second * q[i + 3];
        }
      }
      const start = group * nRows;
      for (let row = 0; row < nRows; row++) {
        const byte = bytes[start + row];
        sums[row] += lowHalf[byte & 15] + highHalf[byte >> 4];
      }
    }
    return Float64Array.from(sums).map((sum) => sum / (this.scale * scale));
  }

  /** Return the codes (out, in), row after row, as int8. */
  values() {
    const [nRows, nColumns] = this.shape;
    const codes = new Int8Array(nRows * nColumns);
    for (let row = 0; row < nRows; row++) {
      for (let column = 0; column < nColumns; column++) {
        const byte = this.bytes[(column >> 2) * nRows + row];
        codes[row * nColumns + column] = ((byte >> (2 * (column & 3))) & 3) - 1;
      }
    }
    return codes;
  }
}

/** Rows of numbers, each row with a divisor: value = number / divisor. For an embedding of int8 these are the
 *  scales of its rows, in fp32 after the rows; floats of 16 bits are the values themselves. */
class RowMatrix {
  constructor(buffer, {shape, type, offset}) {
    const [nRows, nColumns] = shape;
    this.shape = shape;
    if (type === "int8") {
      this.numbers = new Int8Array(buffer, offset, nRows * nColumns);
      this.divisors = new Float32Array(buffer, 4 * Math.ceil((offset + nRows * nColumns) / 4), nRows);
    } else {
      const bits = new Uint16Array(buffer, offset, nRows * nColumns);
      this.numbers = new Float32Array(bits.length);
      for (let i = 0; i < bits.length; i++) this.numbers[i] = HALVES[bits[i]];
      this.divisors = new Float32Array(nRows).fill(1);
    }
  }

  /** Return row i, the embedding of token i. */
  row(i) {
    const [, nColumns] = this.shape;
    const numbers = this.numbers.subarray(i * nColumns, (i + 1) * nColumns);
    return Float64Array.from(numbers, (number) => number / this.divisors[i]);
  }

  /** Return W x. */
  multiply(x) {
    const [nRows, nColumns] = this.shape;
    const y = new Float64Array(nRows);
    for (let row = 0; row < nRows; row++) {
      const numbers = this.numbers.subarray(row * nColumns, (row + 1) * nColumns);
      let sum = 0;
      for (let i = 0; i < nColumns; i++) sum += numbers[i] * x[i];
      y[row] = sum / this.divisors[row];
    }
    return y;
  }

  /** Return all values (out, in), row after row. */
  values() {
    const [nRows, nColumns] = this.shape;
    return Float32Array.from(this.numbers, (number, i) => number / this.divisors[Math.floor(i / nColumns)]);
  }
}

/** All floats of 16 bits: one bit for the sign, 5 for the exponent, 10 for the fraction (IEEE 754). */
const HALVES = Float32Array.from({length: 65536}, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return exponent === 0 ? sign * fraction * 2 ** -14 : sign * (1 + fraction) * 2 ** (exponent - 15);
});

/** Return x / rms(x) * weight. */
function rmsNorm(x, weight, eps) {
  const meanSquare = x.reduce((sum, value) => sum + value * value, 0) / x.length;
  const inverse = 1 / Math.sqrt(meanSquare + eps);
  return x.map((value, i) => weight[i] * (value * inverse));
}

/** Rotate each pair (x_i, x_{i + D/2}) of each head by its angle, in place; cos, sin (D/2). */
function rotate(x, cos, sin) {
  const half = cos.length;
  for (let head = 0; head < x.length; head += 2 * half) {
    for (let i = 0; i < half; i++) {
      const first = x[head + i];
      const second = x[head + half + i];
      x[head + i] = first * cos[i] - second * sin[i];
      x[head + half + i] = second * cos[i] + first * sin[i];
    }
  }
}

/** Return e^x / sum(e^x). The largest x is taken off first, so that no power overflows. */
function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b));
  const powers = x.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** Return log(softmax(x)). */
function logSoftmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b));
  const sum = x.reduce((total, value) => total + Math.exp(value - largest), 0);
  return x.map((value) => value - largest - Math.log(sum));
}

function add(a, b) {
  return a.map((value, i) => value + b[i]);
}

/** A plain Llama. settings: the JSON element "model" of the page; buffer: the bytes of all its tensors. */
class Model {
  constructor(settings, buffer) {
    this.settings = settings;
    this.buffer = buffer;
    this.headDim = settings.n_embd / settings.n_head;
    this.embed = this.matrix("embed.weight");
    this.head = settings.tie_embeddings ? this.embed : this.matrix("head.weight");
    this.norm = this.vector("norm.weight");
    this.blocks = [];
    for (let i = 0; i < settings.n_layer; i++) {
      const path = `blocks.${i}`;
      const block = {attnNorm: this.vector(`${path}.attn_norm.weight`)};
      block.ffnNorm = this.vector(`${path}.ffn_norm.weight`);
      for (const name of ["q", "k", "v", "o"]) block[name] = this.matrix(`${path}.attn.${name}_proj.weight`);
      for (const name of ["gate", "up", "down"]) block[name] = this.matrix(`${path}.ffn.${name}_proj.weight`);
      this.blocks.push(block);
    }
    this.reset();
  }

  matrix(name) {
    const tensor = this.settings.tensors[name];
    const Matrix = tensor.type === "ternary" ? TernaryMatrix : RowMatrix;
    return new Matrix(this.buffer, tensor);
  }

  vector(name) {
    const {offset, shape} = this.settings.tensors[name];
    return new Float32Array(this.buffer, offset, shape[0]);
  }

  /** Forget all tokens. The KV cache of a block has the keys and the values (K D) of each token. */
  reset() {
    this.position = 0;
    for (const block of this.blocks) Object.assign(block, {keys: [], values: []});
  }

  /** Read the next token; return the logits (V) of the one after it. */
  forward(token) {
    return this.head.multiply(this.read(token));
  }

  /** Read the next token; return what the head makes logits of (C). */
  read(token) {
    const eps = this.settings.norm_eps;
    const pairs = Array.from({length: this.headDim / 2}, (_, i) => i);
    const angles = pairs.map((i) => this.position / this.settings.rope_theta ** ((2 * i) / this.headDim));
    const cos = angles.map(Math.cos);
    const sin = angles.map(Math.sin);
    let x = this.embed.row(token);
    for (const block of this.blocks) {
      x = add(x, this.attention(block, rmsNorm(x, block.attnNorm, eps), cos, sin));
      x = add(x, this.feedForward(block, rmsNorm(x, block.ffnNorm, eps)));
    }
    this.position += 1;
    return rmsNorm(x, this.norm, eps);
  }

  /** Each of H query heads compares itself with the keys of all tokens so far, and mixes their values. H / K
   *  neighbouring heads share a key and a value. */
  attention(block, x, cos, sin) {
    const D = this.headDim;
    const {n_head, n_kv_head} = this.settings;
    const q = block.q.multiply(x); // (H D)
    const k = block.k.multiply(x); // (K D)
    rotate(q, cos, sin);
    rotate(k, cos, sin);
    block.keys.push(k);
    block.values.push(block.v.multiply(x));
    const y = new Float64Array(q.length);
    for (let head = 0; head < n_head; head++) {
      const own = head * D; // where its part of q and y begins
      const shared = Math.floor(head / (n_head / n_kv_head)) * D;
      const scores = block.keys.map((key) => {
        let sum = 0;
        for (let i = 0; i < D; i++) sum += q[own + i] * key[shared + i];
        return sum / Math.sqrt(D);
      });
      softmax(scores).forEach((weight, t) => {
        const value = block.values[t];
        for (let i = 0; i < D; i++) y[own + i] += weight * value[shared + i];
      });
    }
    return block.o.multiply(y);
  }

  /** SwiGLU: down(silu(gate(x)) * up(x)) */
  feedForward(block, x) {
    const up = block.up.multiply(x);
    const gate = block.gate.multiply(x);
    return block.down.multiply(gate.map((value, i) => (value / (1 + Math.exp(-value))) * up[i]));
  }
}

/** Return a function that draws numbers in [0, 1): xorshift of 32 bits (Marsaglia, Xorshift RNGs, 2003). */
function makeRandom(seed) {
  let state = ((seed >>> 0) % 0xffffffff) + 1; // the lowest 32 bits, but not 0: it would stay 0
  const random = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 20; i++) random(); // the first numbers of small seeds are small
  return random;
}

/** Return a token for logits (V): the most probable at temperature 0, else one drawn from the top_k most
 *  probable (0 = all), and of these from the smallest set whose total probability reaches top_p. */
function sampleToken(logits, {temperature, top_k, top_p}, random) {
  if (temperature === 0) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  let ids = Array.from(logits.keys());
  if (top_k > 0 || top_p < 1) ids.sort((a, b) => logits[b] - logits[a]);
  if (top_k > 0 && top_k < ids.length) {
    const smallest = logits[ids[top_k - 1]];
    ids = ids.filter((id) => logits[id] >= smallest);
  }
  const probabilities = softmax(ids.map((id) => logits[id] / temperature));
  let total = 0;
  let kept = 0;
  do {
    total += probabilities[kept];
    kept += 1;
  } while (kept < ids.length && (top_p === 1 || total < top_p));
  let rest = random() * total;
  for (let i = 0; i < kept; i++) {
    rest -= probabilities[i];
    if (rest < 0) return ids[i];
  }
  return ids[0]; // the subtractions left a last bit
}

/** Read the ids of a prompt and yield null after each, then the new tokens. When the context is full, its
 *  later half is read again. options: those of sampleToken, and max_new_tokens. */
function* generate(model, ids, options, random) {
  const size = model.settings.seq_len;
  const all = ids.slice(-size);
  let unread = all;
  model.reset();
  for (let n = 0; n < options.max_new_tokens; n++) {
    if (model.position + unread.length > size) {
      model.reset();
      unread = all.slice(-Math.floor(size / 2));
    }
    let last;
    for (const token of unread) {
      last = model.read(token);
      yield null;
    }
    unread = [sampleToken(model.head.multiply(last), options, random)];
    all.push(unread[0]);
    yield unread[0];
  }
}
