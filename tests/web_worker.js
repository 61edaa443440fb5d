// Asks worker.js in Node, as the page does in a browser.

/** Return [type, answer] of all that a worker answers to questions about a page; a question with stop_after is
 *  stopped after so many pieces of text. */
async function answersOf({model, tokenizer, weights}, questions) {
  const answers = [];
  const scope = {};
  scope.postMessage = (answer) => {
    answers.push(answer);
    const {stop_after} = questions.find((question) => question.id === answer.id) || {};
    const pieces = answers.filter(({id, type}) => id === answer.id && type === "text");
    if (pieces.length === stop_after) scope.onmessage({data: {type: "stop"}});
  };
  const worker = new ModelWorker(scope);
  scope.onmessage({data: {type: "load", model, tokenizer, weights}});
  await worker.last; // each message to a real worker is a task of its own
  for (const data of questions) scope.onmessage({data});
  await worker.last;
  return answers;
}
