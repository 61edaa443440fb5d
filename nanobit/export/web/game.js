// Tic-tac-toe against the model. A game is its moves, a text of squares 1 to 9, as in nanobit/tasks/game.py.
// It shares the names at the top of page.js.

const LINES = ["123", "456", "789", "147", "258", "369", "159", "357"];
const OTHER = {X: "O", O: "X"};
const tally = {won: 0, drawn: 0, lost: 0};
let game = {moves: "", answers: []};

const sideOf = (moves) => "XO"[moves.length % 2];
const markOf = (moves, square) => (moves.includes(square) ? sideOf(moves.split(square)[0]) : "");

/** Return the three squares in a line of the side that has just moved, or "". */
function lineOf(moves) {
  const mark = OTHER[sideOf(moves)];
  return LINES.find((line) => [...line].every((square) => markOf(moves, square) === mark)) || "";
}

/** Return the results that the model is given for the side to move, in turn. */
function resultsFor(moves) {
  const side = sideOf(moves);
  return byId("ask").value === "win" ? [side] : [OTHER[side], side, "D"];
}

/** Return [{square, probability, score}] of the free squares, the largest score to be played, as asked in
 *  nanobit/tasks/tictactoe.py. A line of the training text is a result (X or O won, D drawn) and the moves.
 *  win: P(square | this side won, moves), of the free squares. not_lose: 1 - P(the other side won | moves,
 *  square), by Bayes' rule from the probabilities of the three lines with this square. */
async function askSquares(moves) {
  const results = resultsFor(moves);
  const isWin = results.length === 1;
  const {logprobs, sums} = await ask({type: "next", texts: results.map((result) => result + moves)});
  const squares = [..."123456789"].filter((square) => !moves.includes(square));
  const lines = squares.map((square) => {
    return results.map((_, i) => Math.exp(sums[i] + logprobs[i][tokenizer.chars.indexOf(square)]));
  });
  const total = sum(lines.map(([p]) => p));
  return squares.map((square, i) => {
    const share = lines[i][0] / (isWin ? total : sum(lines[i]));
    return {square, probability: isWin ? share : 1 - share, score: isWin ? share : -share};
  });
}

/** Continue the game: show its end, let the model move, or wait for a person. before: what was just done. */
async function takeTurn(before = "") {
  const now = game;
  const side = sideOf(now.moves);
  const isYours = side === byId("side").value;
  now.answers = [];
  drawBoard();
  if (lineOf(now.moves) || now.moves.length === 9) {
    const outcome = lineOf(now.moves) ? (isYours ? "lost" : "won") : "drawn";
    tally[outcome] += 1;
    byId("turn").textContent = before + {won: "You win!", lost: "The model wins.", drawn: "A draw."}[outcome];
    byId("tally").textContent = `So far you won ${tally.won}, drew ${tally.drawn} and lost ${tally.lost}.`;
    return;
  }
  const way = byId("ask").value;
  const answers = await askSquares(now.moves);
  if (now !== game) return; // a new game has begun
  if (way !== byId("ask").value) {
    takeTurn(before);
    return;
  }
  if (!isYours) {
    const best = answers.reduce((a, b) => (b.score > a.score ? b : a));
    now.moves += best.square;
    takeTurn(`The model took ${best.square} (${percent(best.probability)}). `);
    return;
  }
  now.answers = answers;
  byId("turn").textContent = `${before}Your turn, ${side}.`;
  drawBoard();
}

/** Ask for the numbers again, in the other way, if a person is to move. */
function askAnew() {
  if (game.answers.length > 0) takeTurn();
  else drawBoard();
}

function newGame() {
  game = {moves: "", answers: []};
  takeTurn();
}

function play(square) {
  if (!game.answers.some((answer) => answer.square === square)) return; // taken, or not your turn
  game.moves += square;
  takeTurn();
}

function drawBoard() {
  const {moves, answers} = game;
  const highest = Math.max(...answers.map((answer) => answer.probability));
  for (const button of byId("board").children) {
    const mark = markOf(moves, button.value);
    const answer = byId("show").checked && answers.find(({square}) => square === button.value);
    const number = answer ? percent(answer.probability) : "";
    const [tint, middle, below] = button.children;
    tint.style.opacity = answer ? answer.probability / highest : 0;
    middle.textContent = mark;
    below.textContent = number;
    button.className = mark;
    button.classList.toggle("last", moves.endsWith(button.value));
    button.classList.toggle("won", lineOf(moves).includes(button.value));
    button.classList.toggle("best", Boolean(answer) && answer.probability === highest);
    button.setAttribute("aria-disabled", answers.length === 0 || mark !== "");
    button.setAttribute("aria-label", `square ${button.value}, ${mark || "empty"}${number && `, ${number}`}`);
  }
  byId("read").textContent = resultsFor(moves).map((result) => result + moves).join(", ");
  for (const text of all("[data-ask]")) text.hidden = text.dataset.ask !== byId("ask").value;
}

/** Move the focus on the board by the arrow keys. */
function moveOnBoard(event) {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -3, ArrowDown: 3}[event.key];
  if (!step) return;
  event.preventDefault(); // the page would scroll
  const target = byId("board").children[Number(event.target.value) - 1 + step];
  if (target) target.focus();
}
