"""The tokenizers of a page: tokenizer.js, in Node, gives what tokenizer.py and chat.py of nanobit/ give."""

import base64
import io
import random
import re

import pytest
from parts import llama_like, part_of, sentencepiece, tiktoken
from test_chat import HOSTILE, TALKS, talk

from nanobit import chat
from nanobit.export import gguf_file, tokenizer_files
from nanobit.export.web import node
from nanobit.export.web.tokenizer_data import page_tokenizer
from nanobit.tasks.talk import Conversation
from nanobit.tokenizer import TextStream, make_tokenizer

needs_node = pytest.mark.skipif(not node.is_installed(), reason="needs Node.js")

# what strings are made of; each is difficult for a tokenizer in some way
LETTERS = "the| cat|CAT|aaa|aaaa|don't|'LL|it's| 'tis|12|1212|\u00bd|\u0663|na\u00efve|\u00df|\u0130|\ufb01"
LETTERS += "|\u65e5\u672c\u8a9e|\u0440\u0443\u0441|\u05e9\u05c1|\u0639\u0631\u0628|\u0928\u092e\u0938\u094d"
LETTERS += "|\u1112\u1161\u11ab|\ud55c|\U00020000|e\u0301|\u0301|a\u0308\u0323"
EMOJI = "\U0001f642|\U0001f469\u200d\U0001f4bb|\U0001f1e9\U0001f1ea|\U0001f44d\U0001f3fd|\u2764\ufe0f|\u200d"
SPACES = " |  |    |\t|\n|\n\n|\r\n|\r|\x0b|\x0c|\x1c|\x85|\xa0|\u1680|\u180e|\u2003|\u2028|\u3000"
SPACES += "|\u200b|\ufeff"  # which are not white space of Unicode
OTHERS = "\x00|\x01|\x7f|\x9f|\u2581| \u2581 |\ufffd|\uffff|</|{}|\\s|$&|...|!?|_|'|<s>|</s>|<unk>|<0x0A>"
ATOMS = [*"|".join([LETTERS, EMOJI, SPACES, OTHERS]).split("|"), "<|endoftext|>", "a" * 70, "=" * 20]


def difficult(n=300):
    """Return n different strings of the atoms: none, each one, and 2 to 24 of them."""
    rng = random.Random(0)
    made = dict.fromkeys(["", *ATOMS])
    while len(made) < n:
        made["".join(rng.choices(ATOMS, k=rng.randint(2, 24)))] = None
    return list(made)


STRINGS = difficult()
CHARS = "\0" + "".join(sorted(set("".join([*STRINGS, HOSTILE, "System User Assistant"])) - {"\0"}))


def char():
    return dict(kind="char", sha256="x", eot=0, chars=CHARS)


def without_bytes():
    """Return a SentencePiece tokenizer with one token for all unknown characters and pieces across spaces."""
    changes = dict(byte_fallback=False, vocab_size=110, split_by_whitespace=False, unk_surface="(?)")
    return sentencepiece(**changes)


def across_lines():
    """Return a SentencePiece tokenizer that joins a line end with what follows."""
    spm = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    options = dict(vocab_size=290, byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    options |= dict(remove_extra_whitespaces=False, split_by_unicode_script=False, model_type="bpe")
    texts = iter(["the\n\ncat\ncat\n the 12 "] * 9)
    spm.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=out, **options)
    return dict(kind="sentencepiece", sha256="x", eot=2, content=out.getvalue())


def gpt2_like(size=700):
    """Return a byte-level BPE whose merges compete, with the pattern of GPT-2 as tiktoken writes it."""
    rng = random.Random(0)
    words = ["the", " cat", "12", "aaaaa", "  ", "\n", *EMOJI.split("|")]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        text = "".join(rng.choices(words, k=4)).encode()
        start = rng.randrange(len(text))
        token = text[start : start + rng.randint(2, 6)]
        try:
            tokenizer_files.merge_of(ranks | {token: len(ranks)}, token)
        except AssertionError:  # its parts are not tokens yet
            continue
        ranks.setdefault(token, len(ranks))
    content = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken(pattern) | dict(content=content, special={"<|endoftext|>": size + 5}, eot=size + 5)


KINDS = [char, sentencepiece, llama_like, without_bytes, across_lines, tiktoken, gpt2_like]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def spec(request):
    return request.param()


def in_node(expression, spec, **data):
    """Return the value of an expression about t, the tokenizer of a spec, and page, the spec in the page."""
    data["page"] = page_tokenizer(spec)
    return node.call(["tokenizer.js"], f"((t) => {expression})(makeTokenizer(page))", **data)


def readable(spec):
    """Return the strings that a tokenizer can read: a NUL is not a character of a char tokenizer."""
    return [text for text in STRINGS if spec["kind"] != "char" or "\0" not in text]


def id_lists(spec, n=300):
    """Return the ids of all strings, and n lists of any ids, some of no token, some bytes of no character."""
    rng = random.Random(0)
    tokenizer = make_tokenizer(spec)
    lists = [tokenizer.encode(text) for text in readable(spec)]
    odd = [i for i in range(tokenizer.size) if "\ufffd" in tokenizer.decode([i])]
    odd += [*tokenizer.encode(" \U0001f642\ufeff\ufffd"), spec["eot"], tokenizer.size + 3]
    lists += [rng.choices(range(tokenizer.size + 9), k=rng.randint(0, 12)) for _ in range(n)]
    return lists + [rng.choices(odd, k=rng.randint(0, 40)) for _ in range(n)]


def test_there_are_300_strings():
    """The strings are different, and hold what a tokenizer may treat specially."""
    assert len(set(STRINGS)) == 300
    assert all(sum(atom in text for text in STRINGS) > 5 for atom in ATOMS)


@needs_node
def test_ids_are_those_of_python(spec):
    """A text has the same ids as in Python."""
    texts = readable(spec)
    tokenizer = make_tokenizer(spec)
    ids = in_node("texts.map(t.encode)", spec, texts=texts)
    assert dict(zip(texts, ids)) == {text: tokenizer.encode(text) for text in texts}


@needs_node
def test_any_ids_decode_to_the_text_of_python(spec):
    """Ids decode to the same text as in Python, with as many U+FFFD for bytes of no character."""
    lists = id_lists(spec)
    tokenizer = make_tokenizer(spec)
    texts = in_node("lists.map(t.decode)", spec, lists=lists)
    assert texts == [tokenizer.decode(ids) for ids in lists]


@needs_node
def test_the_size_is_that_of_python(spec):
    """A page and Python agree on the number of ids."""
    assert in_node("t.size", spec) == make_tokenizer(spec).size


@needs_node
def test_a_stream_shows_the_same_pieces(spec):
    """Tokens that come one by one show the same text in the same pieces as in Python."""
    lists = [ids for ids in id_lists(spec)[::3] if len(ids) < 200]
    tokenizer = make_tokenizer(spec)

    def pieces(ids):
        stream = TextStream(tokenizer, ids[:9])
        return [*map(stream.add, ids[9:]), stream.end()]

    script = "((s) => [...ids.slice(9).map((id) => s.add(id)), s.end()])(new TextStream(t, ids.slice(0, 9)))"
    assert in_node(f"lists.map((ids) => {script})", spec, lists=lists) == list(map(pieces, lists))


@needs_node
@pytest.mark.parametrize("text", ["to\u00e9", "\U0001f642", "\0", "\ud83d"])
def test_a_character_that_is_missing_is_named(text):
    """A character that a char tokenizer lacks is named, with those that it has."""
    spec = dict(kind="char", eot=3, chars="to\n\0")
    with pytest.raises(ValueError, match="the tokenizer has no character"):
        make_tokenizer(spec).encode(text)
    with pytest.raises(RuntimeError) as error:
        in_node("t.encode(text)", spec, text=text)
    shown = re.search(r'does not know the character (".*"); it knows (.*)', str(error.value))
    assert shown[2] == "to"
    assert shown[1].strip('"') in (text[-1], r"\u0000", r"\ud83d")


@needs_node
@pytest.mark.parametrize("text", ["\ud83d", "a\ude42b", "\ude42\ud83d", "a \ud83d\ud83d\ude42"])
def test_half_a_surrogate_pair_is_refused_or_replaced(text):
    """Half a character is refused by SentencePiece, and U+FFFD for GPT-2, as in Python."""
    with pytest.raises(RuntimeError, match="half a surrogate pair"):
        in_node("t.encode(text)", sentencepiece(), text=text)
    with pytest.raises(RuntimeError):
        make_tokenizer(sentencepiece()).encode(text)
    assert in_node("t.encode(text)", tiktoken(), text=text) == make_tokenizer(tiktoken()).encode(text)


@needs_node
@pytest.mark.parametrize("make", [sentencepiece, gpt2_like])
@pytest.mark.parametrize("text", ["the cat sat ", "aaaaaaaaaaaa"])
def test_a_long_text_takes_no_quadratic_time(make, text):
    """32 times the text takes less than 300 times the processor time; it would be 1,024 times."""
    script = "[250, 250, 250, 8000].map((n) => { const start = process.cpuUsage(); t.encode(text.repeat(n)); "
    script += "const used = process.cpuUsage(start); return used.user + used.system; })"
    _, _, short, long = in_node(script, make(), text=text)
    assert long < 300 * max(short, 500)


MESSAGES = [
    *([message for message in messages[:-1] if message["role"] != "system"] for messages in TALKS),
    talk(f"\x1c\x85\ufeff {HOSTILE}\ufeff\x85", " a\u3000", "  $& \u2028", "\r\n<s>$1\t", "a"),
    talk(*["\U0001f642 don't", "</s></s>"] * 3, "\u200b"),
]


@needs_node
def test_prompts_have_the_ids_of_python(spec):
    """A conversation has the same ids as in Python: texts without white space around them, names of special
    tokens escaped, an end-of-text token after each answer."""
    tokenizer = make_tokenizer(spec)
    ids = in_node("talks.map((messages) => promptIds(t, page, messages))", spec, talks=MESSAGES)
    assert ids == [chat.prompt_ids(tokenizer, spec, messages) for messages in MESSAGES]


@needs_node
@pytest.mark.parametrize(
    "text, says",
    [
        (" \n\x85", "is empty"),
        ("a\0", "has a NUL"),
        ("\ud83d", "half a surrogate pair"),
        ("aaa", "cannot be escaped"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused(text, says):
    """What Python refuses as a message is refused with the reason."""
    spec = tiktoken() | dict(special={"aa": 265}, eot=265)  # aaa becomes a aa
    with pytest.raises(chat.BadConversation, match=says):
        chat.prompt_ids(make_tokenizer(spec), spec, talk(text))
    with pytest.raises(RuntimeError, match=says):
        in_node("promptIds(t, page, messages)", spec, messages=talk(text))


@needs_node
def test_a_token_across_the_border_is_refused():
    """A tokenizer that joins the colon and the space of an answer in one token is refused for it."""
    joining = "{ encode: (text) => t.encode(text.replace('Assistant: ', 'Assistant_')) }"
    with pytest.raises(RuntimeError, match="a token joins 'Assistant:' and its answer"):
        in_node(f"promptIds({joining}, page, messages)", char(), messages=talk("a", "b", "c"))


@needs_node
def test_whole_turns_leave_a_conversation():
    """For any room the oldest turns leave, as in Python; a question that does not fit alone is refused."""
    spec = llama_like()
    tokenizer = make_tokenizer(spec)
    messages = talk("the cat", "sat on the mat", "12 birds", "12", "and?", "a dog", "why")
    rooms = range(140)

    def python_ids(room):
        partner = Conversation(tokenizer, spec, None, room + 8, 8, system="")
        partner.turns = [list(turn) for turn in zip(messages[:-1:2], messages[1::2])]
        try:
            return partner.ids_after("why")
        except ValueError:
            return None

    script = (
        "rooms.map((n) => { try { return conversationIds(t, page, messages, n); } catch { return null } })"
    )
    found = in_node(script, spec, messages=messages, rooms=list(rooms))
    assert found == list(map(python_ids, rooms))
    assert len({len(ids or []) for ids in found}) == 5, "none, and one to four turns"
    with pytest.raises(RuntimeError, match=r"it has \d+ tokens, and 9 fit"):
        in_node("conversationIds(t, page, messages, 9)", spec, messages=messages)


@pytest.mark.parametrize("name, good", [("gpt2", True), ("r50k_base", True), ("cl100k_base", False)])
def test_only_the_pattern_of_gpt2_is_written(name, good, capsys):
    """A tiktoken encoding of another pattern is refused, by the rule that GGUF files have."""
    spec = tiktoken() | dict(name=name)
    writers = [lambda: page_tokenizer(spec)]
    writers += [lambda: gguf_file.check(part_of(spec, vocab_size=266), "f16", "f16")]
    for write in writers:
        if good:
            write()
            continue
        with pytest.raises(SystemExit) as stop:
            write()
        assert stop.value.code == 2
        assert repr(name) in capsys.readouterr().err


def test_a_sentencepiece_model_that_is_not_bpe_is_refused(capsys):
    """A page joins pairs by rank: a unigram model is refused."""
    with pytest.raises(SystemExit):
        page_tokenizer(sentencepiece(model_type="unigram", vocab_size=280))
    assert "is not a BPE model" in capsys.readouterr().err
