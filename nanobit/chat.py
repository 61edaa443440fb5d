"""Conversations as text and tokens. The text needs no special tokens but the two that every tokenizer has:

    <begin>System: {system}
    User: {question}
    Assistant: {answer}<end>User: {question}
    Assistant: {answer}<end>

<begin> is the id that begins a text (bos_of), the system message is optional, and an end-of-text token
(<end>) follows each answer. A prompt ends in "Assistant:", and the answer begins with its space. A message
is a dict {"role", "content"}, whose role is system, user or assistant, and its content a text."""

import functools
import json

from nanobit.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, bos_of, make_tokenizer

FORMAT = "user-assistant"  # the name of this format in a tokenizer entry, as spec["chat"]
ROLES = ("system", "user", "assistant")
LETTERS = "System: \nUser: \nAssistant: "  # what the format itself needs of a tokenizer
CHAR_END = "<|endoftext|>"  # the name of a char tokenizer's end-of-text token in exported files
EXPECTED = 'expected {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"} or {"instruction", '
EXPECTED += '"output"} with an optional "input"'
# the same text for other programs; escapes: what escaped() does to the text of a message
JINJA = (
    "{{ bos_token }}{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for message in messages %}{% set text = message['content'].strip(){escapes} %}"
    "{% if message['role'] == 'system' and loop.first %}{{ 'System: ' + text + '\\n' }}"
    "{% elif message['role'] == 'user' and loop.index0 % 2 == first %}{{ 'User: ' + text + '\\n' }}"
    "{% elif message['role'] == 'assistant' and loop.index0 % 2 != first %}"
    "{{ 'Assistant: ' + text + eos_token }}"
    "{% else %}{{ raise_exception('roles must alternate: user, assistant, after an optional system') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class BadConversation(ValueError):
    """What is wrong with a conversation, in one line."""


def messages_of(row):
    """Return the messages of a row in any of three forms: {"messages"}, {"prompt", "completion"} or
    {"instruction", "input", "output"}, whose instruction and input are joined by a blank line. White space
    around a text is dropped, so is an empty system message; line ends become \\n. Raises BadConversation."""
    if not isinstance(row, dict):
        raise BadConversation(f"a row is {type(row).__name__}; {EXPECTED}")
    if "messages" in row:
        pairs = pairs_of(row["messages"])
    elif {"prompt", "completion"} <= row.keys():
        pairs = [("user", row["prompt"]), ("assistant", row["completion"])]
    elif {"instruction", "output"} <= row.keys():
        question = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(text, str) for text in question):
            raise BadConversation("instruction or input is not a text")
        pairs = [("user", "\n\n".join(filter(None, question))), ("assistant", row["output"])]
    else:
        raise BadConversation(f"a row has {', '.join(row) or 'no fields'}; {EXPECTED}")
    for role, text in pairs:
        if not isinstance(text, str):
            raise BadConversation(f"the text of {role!r} is {type(text).__name__}, not a text")
    messages = [{"role": role, "content": "\n".join(text.split("\r\n")).strip()} for role, text in pairs]
    if messages and messages[0] == {"role": "system", "content": ""}:
        del messages[0]
    return messages


def pairs_of(messages):
    """Return [(role, text)] of what should be a list of messages."""
    if not isinstance(messages, list):
        raise BadConversation(f"messages is {type(messages).__name__}, expected a list")
    for number, message in enumerate(messages, 1):
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise BadConversation(f"message {number} is not an object with role and content")
    return [(message["role"], message["content"]) for message in messages]


def check(messages, last="assistant"):
    """Check that user and assistant alternate after an optional system message, that the last message is of
    this role, and that each has a text. Raises BadConversation."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    skipped = len(messages) - len(turns)
    for number, message in enumerate(turns):
        wanted = ROLES[1 + number % 2]
        if message["role"] != wanted:
            place = f"message {number + skipped + 1} has the role {message['role']!r}"
            raise BadConversation(f"{place}, expected {wanted!r}: user and assistant alternate")
    for number, message in enumerate(messages, 1):
        if fault := text_fault(message["content"]):
            raise BadConversation(f"message {number} ({message['role']}) {fault}")
    if last == "assistant" and len(turns) < 2:
        raise BadConversation("no answer: it has no message of the role 'assistant'")
    if not turns or turns[-1]["role"] != last:
        raise BadConversation(f"the last message is not of the role {last!r}")


def text_fault(text):
    """Return what is wrong with the text of a message, or ''."""
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return f"has a NUL character, at {text.index(chr(0)):,}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair, at {error.start:,}"
    return ""


def check_tokenizer(tokenizer, spec):
    """Check that a tokenizer has the letters of the format, and line ends that do not end a text. Raises
    BadConversation."""
    try:
        ids = tokenizer.encode(LETTERS)
    except ValueError as error:
        raise BadConversation(f"conversations need the letters of {LETTERS!r}, but {error}") from None
    if {spec["eot"], bos_of(spec)} & {*ids} or tokenizer.decode(ids) != LETTERS:
        raise BadConversation(f"the tokenizer does not keep the letters and line ends of {LETTERS!r}")


def encode(tokenizer, spec, messages):
    """Return (ids, mask) of a conversation, lists of one length: mask is 1 for what is learned, the tokens of
    answers and the end-of-text token after each, else 0. Raises BadConversation for what check() refuses, and
    ValueError for a character that the tokenizer lacks."""
    check(messages)
    return tokens_of(tokenizer, spec, messages)


def prompt_ids(tokenizer, spec, messages):
    """Return the ids of a conversation whose last message is of the user, up to "Assistant:"."""
    check(messages, last="user")
    return tokens_of(tokenizer, spec, messages)[0]


def tokens_of(tokenizer, spec, messages):
    """Return (ids, mask) of messages that are checked, with or without an answer at the end."""
    # other programs put a space before the text after each end-of-text token of SentencePiece: so does encode
    ids, mask = [bos_of(spec)], [0]
    for head, answer in turns_of(tokenizer, messages):
        before = tokenizer.encode(head)
        turn = before
        if answer:
            turn = [*tokenizer.encode(head + answer), spec["eot"]]
        if turn[: len(before)] != before:
            raise BadConversation(f"a token joins 'Assistant:' and its answer {answer[1:40]!r}")
        ids += turn
        mask += [0] * len(before) + [1] * (len(turn) - len(before))
    return ids, mask


def turns_of(tokenizer, messages):
    """Yield (the text up to "Assistant:", the answer with its space, '' if it is open) of each turn."""
    names = special_names(tokenizer)
    head = ""
    for message in messages:
        text = escaped(message["content"].strip(), names)  # servers return an answer with its space
        if message["role"] == "assistant":
            yield head, f" {text}"
            head = ""
        elif message["role"] == "user":
            head += f"User: {text}\nAssistant:"
        else:
            head = f"System: {text}\n"
    if head:
        yield head, ""


@functools.cache
def special_names(tokenizer):
    """Return the names of a tokenizer's special tokens, which other programs look for in a text."""
    model = getattr(tokenizer, "model", None)
    if isinstance(tokenizer, SentencePieceTokenizer):
        ids = [i for i in range(tokenizer.size) if model.IsControl(i) or model.IsUnknown(i)]
        return [model.IdToPiece(i) for i in ids]
    if isinstance(tokenizer, TiktokenTokenizer):
        return sorted(model.special_tokens_set)
    return [CHAR_END]


def escaped(text, names):
    """Return a text in which the names of special tokens are ordinary text: </s> becomes < /s>. Raises
    BadConversation if that does not help."""
    for name in names:
        text = text.replace(name, f"{name[:1]} {name[1:]}")
    if any(name in text for name in names):
        raise BadConversation("a text holds the name of a special token that cannot be escaped")
    return text


def jinja(spec):
    """Return the format as a Jinja template, which makes the same text: chat_template of other programs."""
    names = special_names(make_tokenizer(spec))
    pairs = [(json.dumps(name), json.dumps(f"{name[:1]} {name[1:]}")) for name in names]
    return JINJA.replace("{escapes}", "".join(f".replace({old}, {new})" for old, new in pairs))
