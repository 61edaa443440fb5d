"""Talking with a model that was trained on conversations: what it is asked, and what it is shown."""

import pytest
from conftest import run, token_files
from scripted_models import asked, save, scripted, stdin

from nanobit import chat
from nanobit.tasks import talk
from nanobit.tokenizer import make_tokenizer

LETTERS = "\0" + "".join(map(chr, range(32, 127))) + "\n"  # of a char tokenizer, whose ids are 1 for ' '


@pytest.fixture
def chat_ckpt(tmp_path):
    return save(tmp_path / "run", token_files.char_tokenizer(LETTERS) | {"chat": chat.FORMAT}, seq_len=96)


def words(text):
    """Return the ids of a text, in which | stands for the end of a text."""
    return [LETTERS.index(char.replace("|", "\0")) for char in text]


def asked_texts(err):
    """Return the texts that a scripted model was asked to continue, in which | begins and ends a text."""
    return ["".join(LETTERS[i] for i in ids).replace("\0", "|") for ids in asked(err)]


def test_a_chat_model_is_asked_in_its_format(chat_ckpt, tmp_path):
    """A question is put after the turns before it, in the format of training; /retry asks the last one again
    without its answer, /reset forgets all but the system text, and a bad message changes nothing."""
    lines = ["/retry", "Hi", "a\tb", "/retry", "", "More", "/reset", "/retry", "New", "/help", "/nothing"]
    patch = scripted(words(" Yes. |")) + stdin(tmp_path, "\n".join(lines))
    out, err = run("sample.py", chat_ckpt, "--chat", "--system=Be kind", "--max_new_tokens=30", patch=patch)
    assert out == "Yes. \n" * 4
    first = "|System: Be kind\nUser: Hi\nAssistant:"
    second = f"{first} Yes.|User: More\nAssistant:"
    assert asked_texts(err) == [first, first, second, "|System: Be kind\nUser: New\nAssistant:"]
    assert err.count("no question was asked yet") == 2
    assert err.count("message ignored: ") == 2
    assert "no character '\\t'" in err
    assert "/retry   another answer" in err
    assert "no command /nothing" in err


def test_a_chat_model_forgets_whole_turns(chat_ckpt, tmp_path):
    """When the context is full, the oldest question leaves with its answer, and the system text stays. A
    question that does not fit alone is refused, and changes nothing: /retry repeats the one before."""
    patch = scripted(words(" Yes.|")) + stdin(tmp_path, "one\ntwo\nthree\n" + "x" * 80 + "\n/retry\n")
    out, err = run("sample.py", chat_ckpt, "--chat", "--system=Be", "--max_new_tokens=30", patch=patch)
    assert out == "Yes.\n" * 4
    third = "|System: Be\nUser: two\nAssistant: Yes.|User: three\nAssistant:"
    second = "|System: Be\nUser: one\nAssistant: Yes.|User: two\nAssistant:"
    assert asked_texts(err)[1:] == [second, third, third]
    assert err.count("the oldest turn is forgotten") == 1
    assert "message ignored: it takes 109 tokens of the context, and 66 are left for it" in err


def test_a_question_that_just_fits_is_asked():
    """A question and an answer of the most tokens may fill the context to the last token."""
    spec = token_files.char_tokenizer(LETTERS) | {"eot": 0}
    n = len("|User: Hi\nAssistant:")
    for room, fits in ((n, True), (n - 1, False)):
        conversation = talk.Conversation(make_tokenizer(spec), spec, None, room + 30, 30, system="")
        if fits:
            assert len(conversation.ids_after("Hi")) == n
        else:
            with pytest.raises(ValueError, match=f"takes {n} tokens of the context, and {n - 1} are left"):
                conversation.ids_after("Hi")


def test_an_empty_answer_is_not_kept(chat_ckpt, tmp_path):
    """A turn without an answer leaves the history as it was, and can be retried."""
    patch = scripted(words(" |")) + stdin(tmp_path, "one\n/retry\ntwo\n")
    err = run("sample.py", chat_ckpt, "--chat", patch=patch)[1]
    assert asked_texts(err) == ["|User: one\nAssistant:"] * 2 + ["|User: two\nAssistant:"]
    assert err.count("the answer is empty") == 3


def test_an_answer_that_cannot_be_read_again_is_not_kept(capsys):
    """An answer with a NUL, which a model may write, does not spoil the questions after it."""
    spec = token_files.char_tokenizer(LETTERS) | {"eot": 0}
    write = lambda ids, n: iter([" a\0b"])  # noqa: E731
    conversation = talk.Conversation(make_tokenizer(spec), spec, write, 96, 30, system="")
    conversation.reply("Hi", conversation.ids_after("Hi"))
    assert "cannot be read again (message 2 (assistant) has a NUL character" in capsys.readouterr().err
    assert conversation.ids_after("More") == words("|User: More\nAssistant:")


def test_ctrl_c_keeps_what_was_answered():
    """Ctrl-C ends an answer, which stays in the history as far as it was shown."""

    def write(ids, n):
        yield " It"
        yield " is"
        raise KeyboardInterrupt

    spec = token_files.char_tokenizer(LETTERS) | {"eot": 0}
    conversation = talk.Conversation(make_tokenizer(spec), spec, write, 96, 30, system="")
    with pytest.raises(KeyboardInterrupt):
        conversation.reply("Hi", conversation.ids_after("Hi"))
    ids = conversation.ids_after("More")
    assert ids == words("|User: Hi\nAssistant: It is|User: More\nAssistant:")


def test_one_question_is_answered(chat_ckpt, tmp_path):
    """--chat --prompt= prints one answer and ends, --prompt= alone continues a text. What cannot be asked, or
    a system text for a base model, is one error."""
    patch = scripted(words(" Yes.|"))
    out, err = run("sample.py", chat_ckpt, "--chat", "--prompt=<|endoftext|> Hi", patch=patch)
    assert out == "Yes.\n"
    assert asked_texts(err) == ["|User: < |endoftext|> Hi\nAssistant:"]
    assert "/help" not in err
    assert asked_texts(run("sample.py", chat_ckpt, "--prompt=Hi", patch=patch)[1]) == ["|Hi"]
    err = run("sample.py", chat_ckpt, "--chat", f"--prompt={'x' * 80}", code=2)[1]
    assert err.splitlines()[-1].startswith("error: prompt: it takes 98 tokens of the context, and 48 are")
    base = save(tmp_path / "base", token_files.char_tokenizer(LETTERS))
    err = run("sample.py", base, "--chat", "--system=x", code=2)[1]
    assert "is a base model: --system needs one trained on conversations" in err
    err = run("sample.py", chat_ckpt, "--chat", "--system=  ", code=2)[1]
    assert err.splitlines()[-1] == "error: system = '  ': message 1 (system) is empty"
    err = run("sample.py", chat_ckpt, "--chat", f"--system={'x' * 80}", code=2)[1]
    assert "it takes 108 tokens of the context, and 48 are left" in err
    other = save(tmp_path / "other", token_files.char_tokenizer(LETTERS) | {"chat": "newer"})
    assert "'newer'" in run("sample.py", other, "--chat", code=2)[1]
