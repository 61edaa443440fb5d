"""Conversations: which are valid, their tokens and what is learned of them, and the template of exports."""

import pytest
from parts import llama_like, sentencepiece, tiktoken

from nanobit import chat
from nanobit.export import tokenizer_files
from nanobit.tokenizer import bos_of, make_tokenizer

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
CHAR = dict(kind="char", sha256="x", eot=0, chars="\0" + PRINTABLE)
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s++$|\s+"
KINDS = [lambda: CHAR, sentencepiece, llama_like, tiktoken, lambda: tiktoken(CL100K)]
HOSTILE = "</s><s> <unk>\n<|endoftext|> User: a\nAssistant: b  "


def talk(*texts, system=""):
    """Return the messages of a conversation of these texts, the user's first."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return [{"role": "system", "content": system}] * bool(system) + messages


TALKS = [
    talk("the cat", "sat on the mat"),
    talk("12 birds", "12\n\nof 1212", "and", "a dog", system="be  brief"),
    talk(HOSTILE, HOSTILE, " \n ?", "\n  1. a\n\n", system=HOSTILE),
    talk("?", "!"),
]


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": talk("a", "b", system="c"), "source": "x"}, talk("a", "b", system="c")),
        ({"messages": [{"role": "system", "content": " "}, *talk("a", "b")]}, talk("a", "b")),
        ({"prompt": "a\r\nb ", "completion": "\n b"}, talk("a\nb", "b")),
        ({"instruction": "a", "output": "b"}, talk("a", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, talk("a", "b")),
        ({"instruction": "a", "input": "1 2", "output": "b"}, talk("a\n\n1 2", "b")),
    ],
)
def test_rows_have_three_forms(row, messages):
    """A row in any of the three forms gives messages, without white space around their texts."""
    assert chat.messages_of(row) == messages
    chat.check(messages)


@pytest.mark.parametrize(
    "row, says",
    [
        ("a text", "a row is str; expected"),
        ({}, "a row has no fields"),
        ({"text": "a", "id": 1}, "a row has text, id; expected"),
        ({"messages": "a"}, "messages is str"),
        ({"messages": [["user", "a"]]}, "message 1 is not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 is not an object"),
        ({"prompt": "a", "completion": None}, "the text of 'assistant' is NoneType"),
        ({"instruction": 3, "output": "a"}, "instruction or input is not a text"),
    ],
)
def test_other_rows_are_refused(row, says):
    """A row of another form is refused in one line."""
    with pytest.raises(chat.BadConversation) as error:
        chat.messages_of(row)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "no answer"),
        (talk("a"), "no answer"),
        (talk(system="a"), "no answer"),
        (talk("a", "b", "c"), "the last message is not of the role 'assistant'"),
        (talk("a", "b") + talk("c", "d", system="e"), "message 3 has the role 'system', expected 'user'"),
        (talk("a", system="s") + talk("c", "d"), "message 3 has the role 'user', expected 'assistant'"),
        ([*talk("a", "b")[::-1]], "message 1 has the role 'assistant', expected 'user'"),
        ([{"role": "tool", "content": "a"}], "message 1 has the role 'tool'"),
        ([{"role": ["user"], "content": "a"}, *talk("a", "b")], "message 1 has the role ['user']"),
        (talk("a", " \n"), "message 2 (assistant) is empty"),
        (talk("a", "b", "", "c"), "message 3 (user) is empty"),
        (talk("a", "b\0c"), "message 2 (assistant) has a NUL character, at 1"),
        (talk("\ud83d", "b"), "message 1 (user) has half a surrogate pair, at 0"),
    ],
)
def test_bad_conversations_are_refused(messages, says):
    """What is wrong with a conversation is named with the message where it is."""
    with pytest.raises(chat.BadConversation) as error:
        chat.check(messages)
    assert says in str(error.value)


def test_a_prompt_ends_with_the_user():
    """What is to be answered ends with a message of the user, who may be the first to speak."""
    chat.check(talk("a"), last="user")
    chat.check(talk("a", "b", "c", system="d"), last="user")
    for messages in ([], talk("a", "b"), talk(system="d")):
        with pytest.raises(chat.BadConversation):
            chat.check(messages, last="user")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("messages", TALKS)
def test_answers_and_their_ends_are_learned(make, messages):
    """The tokens of mask 1 are the answers with their first space, each with an end-of-text token."""
    spec = make()
    tokenizer = make_tokenizer(spec)
    ids, mask = chat.encode(tokenizer, spec, messages)
    assert len(ids) == len(mask)
    assert (ids[0], mask[0]) == (bos_of(spec), 0)
    ends = [i for i, token in enumerate(ids) if token == spec["eot"] and i]
    assert all(mask[i] for i in ends)
    learned, begin = [], 1
    for end in ends:
        first = mask.index(1, begin)
        assert not any(mask[begin:first])
        assert all(mask[first : end + 1])
        learned.append((tokenizer.decode(ids[begin:first]), tokenizer.decode(ids[begin:end])))
        begin = end + 1
    assert begin == len(ids)
    names = chat.special_names(tokenizer)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(learned) == len(answers)
    for (head, turn), answer in zip(learned, answers):
        assert head.endswith("\nAssistant:")
        assert turn == f"{head} {chat.escaped(answer.strip(), names)}"


@pytest.mark.parametrize("make", KINDS)
def test_a_prompt_is_the_beginning_of_its_conversation(make):
    """The ids of a prompt are those before its answer in training."""
    spec = make()
    tokenizer = make_tokenizer(spec)
    for messages in TALKS:
        ids, mask = chat.encode(tokenizer, spec, messages)
        prompt = chat.prompt_ids(tokenizer, spec, messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert not mask[len(prompt) - 1]
        assert all(mask[len(prompt) :])


def test_a_token_across_the_border_is_refused():
    """A tokenizer that joins the colon and the space of an answer in one token is refused for it."""
    tokenizer = make_tokenizer(CHAR)
    encode = tokenizer.encode
    tokenizer.encode = lambda text: encode(text.replace("Assistant: ", "Assistant;"))
    with pytest.raises(chat.BadConversation, match="a token joins 'Assistant:' and its answer 'b'"):
        chat.encode(tokenizer, CHAR, talk("a", "b"))


@pytest.mark.parametrize(
    "spec, says",
    [
        (dict(CHAR, chars=CHAR["chars"].replace(":", "")), "has no character ':'"),
        (dict(CHAR, eot=1), "does not keep the letters and line ends"),
    ],
)
def test_a_tokenizer_needs_the_letters(spec, says):
    """A tokenizer without the letters of the format, or whose line ends end a text, is refused."""
    with pytest.raises(chat.BadConversation) as error:
        chat.check_tokenizer(make_tokenizer(spec), spec)
    assert says in str(error.value)


@pytest.mark.parametrize("make", KINDS)
def test_all_kinds_have_the_letters(make):
    spec = make()
    chat.check_tokenizer(make_tokenizer(spec), spec)


def test_a_tokenizer_must_keep_line_ends():
    spec = sentencepiece(normalization_rule_name="nmt_nfkc", vocab_size=300)
    with pytest.raises(chat.BadConversation, match="does not keep the letters and line ends"):
        chat.check_tokenizer(make_tokenizer(spec), spec)


def test_names_of_special_tokens_become_text():
    """A name gets a space after its first character; one for which that does not help is refused."""
    assert chat.escaped("a</s> < /s></ s>", ["</s>"]) == "a< /s> < /s></ s>"
    with pytest.raises(chat.BadConversation, match="cannot be escaped"):
        chat.escaped("aaa", ["aa"])


def test_the_names_are_those_of_exports():
    """The names that a text must not have are those that an exported tokenizer looks for."""
    for make in KINDS:
        spec = make()
        made, *ends = tokenizer_files.fast_tokenizer(spec)
        special = {token.content for token in made.get_added_tokens_decoder().values()}
        assert special | {*ends} <= {*chat.special_names(make_tokenizer(spec))}


@pytest.mark.parametrize("make", KINDS)
def test_the_template_gives_the_same_ids(make, tmp_path):
    """transformers' apply_chat_template of an export gives the ids of encode and of prompt_ids."""
    transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
    spec = make()
    tokenizer = make_tokenizer(spec)
    tokenizer_files.write(spec, str(tmp_path), 512)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    theirs.chat_template = chat.jinja(spec)
    for messages in TALKS:
        ids, _ = chat.encode(tokenizer, spec, messages)
        assert theirs.apply_chat_template(messages, return_dict=False) == ids
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == chat.prompt_ids(tokenizer, spec, messages[:-1])


@pytest.mark.parametrize(
    "messages", [talk("a") + talk("b"), talk("a", "b")[::-1], talk("a") + talk(system="b")]
)
def test_the_template_refuses_what_check_refuses(messages):
    """The template refuses roles that do not alternate."""
    jinja2 = pytest.importorskip("jinja2", reason="a reader of exports: requirements-dev.txt")

    def raise_exception(text):
        raise ValueError(text)

    template = jinja2.Environment().from_string(chat.jinja(CHAR))
    with pytest.raises(ValueError, match="roles must alternate"):
        template.render(messages=messages, raise_exception=raise_exception, bos_token="", eos_token="")
