"""Rendering and tokenizing rows: strings, templates, chats, special tokens, bounds on length."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_grpo.prompts import PromptFormat, prepare_prompts, render_prompt
from lightning_grpo.sources import read_rows
from lightning_grpo.tokenizing import left_truncate, tokenize_prompts

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<sys>"]
PAD, BOS, EOS, USER, BOT, SYS = range(6)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<sys>{% elif m['role'] == 'user' %}<user>"
    "{% elif m['role'] == 'assistant' %}<bot>"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}"
    "{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<bot>:{% endif %}"
)


def make_tokenizer(adds: str = "", chat_template: str | None = CHAT_TEMPLATE):
    """One token per character; `adds` is the frame of special tokens around a plain text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"0123456789=:QA? \nab"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>", "<sys>"],
        chat_template=chat_template,
    )


def digits(text: str) -> list[int]:
    return [len(SPECIAL) + int(character) for character in text]


# Rendering


def test_the_prompt_column_is_the_prompt():
    assert render_prompt({"prompt": "1+1=", "answer": "2"}, PromptFormat()) == "1+1="
    assert render_prompt({"q": "1"}, PromptFormat(prompt_column="q")) == "1"


def test_a_template_is_filled_from_the_columns():
    row = {"question": "1+1", "answer": "2", "n": 3, "parts": ["x", "y"]}
    made = PromptFormat(prompt_template="Q: {question} {{{n:02d}}} {parts[1]}\nA:")
    assert render_prompt(row, made) == "Q: 1+1 {03} y\nA:"


def test_chat_makes_a_string_a_user_message_and_system_prompt_implies_it():
    row = {"prompt": "1"}
    user = {"role": "user", "content": "1"}
    system = {"role": "system", "content": "Be brief."}
    assert render_prompt(row, PromptFormat(chat=True)) == [user]
    assert render_prompt(row, PromptFormat(system_prompt="Be brief.")) == [system, user]


def test_messages_stay_a_chat_and_keep_a_system_message_of_their_own():
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "1"}]
    assert render_prompt({"prompt": own}, PromptFormat()) == own
    assert render_prompt({"prompt": own}, PromptFormat(system_prompt="other")) == own
    without = own[1:]
    rendered = render_prompt({"prompt": without}, PromptFormat(system_prompt="own"))
    assert rendered == own
    assert without == [{"role": "user", "content": "1"}]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"q": "1", "a": "2"}, {}, r"no column 'prompt'; the row has \['a', 'q'\]"),
        ({"prompt": None}, {}, "the column 'prompt' is null"),
        ({"prompt": ""}, {}, "the prompt is empty"),
        ({"prompt": " \n"}, {"chat": True}, "the prompt is empty"),
        ({"prompt": 3}, {}, "a string or a list of messages, not int 3"),
        ({"prompt": []}, {}, "a string or a list of messages"),
        ({"prompt": ["hi"]}, {}, "a message needs role and content, got 'hi'"),
        ({"prompt": [{"role": "user"}]}, {}, "a message needs role and content"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, {}, "nothing is left to answer"),
        ({"q": "1"}, {"prompt_template": "{question}"}, r"prompt_template.*no column 'question'"),
        ({"q": None}, {"prompt_template": "{q}"}, "prompt_template.*'q' is null"),
        ({"q": "1"}, {"prompt_template": "{}"}, "prompt_template.*no column ''"),
        ({"q": "1"}, {"prompt_template": "{q"}, "prompt_template.*expected '}'"),
        ({"q": "1"}, {"prompt_template": "{q[x]}"}, "prompt_template"),
        ({"q": "1"}, {"prompt_template": "{q.nothing}"}, "prompt_template.*nothing"),
        ({"q": "1"}, {"prompt_template": "{q:d}"}, "prompt_template"),
        ({"q": ""}, {"prompt_template": "{q}"}, "the prompt is empty"),
    ],
)
def test_a_row_that_makes_no_prompt_is_refused(row, options, message):
    with pytest.raises(ValueError, match=message):
        render_prompt(row, PromptFormat(**options))


def test_the_number_of_the_faulty_row_is_named():
    rows = [{"prompt": "1"}, {"prompt": "2"}, {"answer": "3"}]
    with pytest.raises(ValueError, match="row 3 of 3: no column 'prompt'"):
        prepare_prompts(rows, PromptFormat(), make_tokenizer())
    with pytest.raises(ValueError, match="row 2 of 2 is a str"):
        prepare_prompts([{"prompt": "1"}, "2"], PromptFormat(), make_tokenizer())


# Tokenizing


def test_a_string_gets_the_special_tokens_that_the_tokenizer_adds():
    assert tokenize_prompts(["12", "3"], make_tokenizer()) == [digits("12"), digits("3")]
    assert tokenize_prompts(["12"], make_tokenizer("<bos> $A")) == [[BOS, *digits("12")]]


def test_a_string_with_a_bos_of_its_own_gets_no_second_one():
    assert tokenize_prompts(["<bos>12"], make_tokenizer("<bos> $A")) == [[BOS, *digits("12")]]


def test_an_eos_that_the_tokenizer_adds_is_taken_off():
    tokenizer = make_tokenizer("<bos> $A <eos>")
    assert tokenize_prompts(["12"], tokenizer) == [[BOS, *digits("12")]]
    assert tokenize_prompts(["12<eos>"], make_tokenizer("<bos> $A")) == [[BOS, *digits("12"), EOS]]


def test_a_chat_has_one_bos_and_ends_where_the_answer_begins():
    chat = [{"role": "system", "content": "7"}, {"role": "user", "content": "12"}]
    colon = len(SPECIAL) + 11
    expected = [BOS, SYS, *digits("7"), EOS, USER, *digits("12"), EOS, BOT, colon]
    for adds in ("", "<bos> $A", "<bos> $A <eos>"):
        tokenizer = make_tokenizer(adds)
        assert tokenize_prompts([chat], tokenizer) == [expected]
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert whole == expected


def test_strings_and_chats_may_be_mixed_and_keep_their_order():
    chat = [{"role": "user", "content": "2"}]
    ids = tokenize_prompts(["1", chat, "3"], make_tokenizer())
    assert [ids[0], ids[2]] == [digits("1"), digits("3")]
    assert ids[1][:3] == [BOS, USER, *digits("2")]


def test_a_chat_without_a_chat_template_says_what_to_do():
    chat = [{"role": "user", "content": "2"}]
    with pytest.raises(ValueError, match=r"row 2 is a chat.*chat_template\.jinja"):
        tokenize_prompts(["1", chat], make_tokenizer(chat_template=None))


def test_a_chat_that_the_template_refuses_is_named():
    rows = ["1", [{"role": "tool", "content": "2"}]]
    with pytest.raises(ValueError, match="row 2: the chat template refuses it: no role tool"):
        tokenize_prompts(rows, make_tokenizer())


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="row 2: the tokenizer makes no token"):
        tokenize_prompts(["1", [{"role": "user", "content": "2"}]], make_tokenizer("", "{{ '' }}"))


# Bounds


ROWS = [{"prompt": "1", "n": 0}, {"prompt": "123456", "n": 1}, {"prompt": "1234"}]


def prepared(adds: str = "<bos> $A", **options):
    return prepare_prompts(ROWS, PromptFormat(), make_tokenizer(adds), **options)


def test_without_a_bound_all_prompts_are_kept_with_their_columns():
    prompts = prepared()
    assert prompts.prompts == ["1", "123456", "1234"]
    assert prompts.columns == {"n": [0, 1, None]}
    assert (prompts.longest, prompts.num_overlong) == (7, 0)
    assert prepared(max_prompt_tokens=7).num_overlong == 0


def test_an_overlong_prompt_is_an_error_that_names_row_and_lengths():
    with pytest.raises(ValueError, match=r"row 2 has a prompt of 7 tokens; 2 of 3 .*=4.* has 7"):
        prepared(max_prompt_tokens=4)


def test_overlong_prompts_can_be_dropped_and_counted():
    prompts = prepared(max_prompt_tokens=5, overlong_prompts="drop")
    assert prompts.prompts == ["1", "1234"]
    assert prompts.columns == {"n": [0, None]}
    assert prompts.row_indices == [0, 2]
    assert prompts.num_overlong == 1
    with pytest.raises(ValueError, match=r"3 of 3 rows .* would leave none"):
        prepared(max_prompt_tokens=1, overlong_prompts="drop")


def test_left_truncation_keeps_the_end_and_the_bos():
    prompts = prepared(max_prompt_tokens=4, overlong_prompts="left_truncate")
    assert prompts.prompt_ids == [
        [BOS, *digits("1")],
        [BOS, *digits("456")],
        [BOS, *digits("234")],
    ]
    assert prompts.prompts[1] == "123456"
    assert (prompts.longest, prompts.num_overlong) == (4, 2)
    without_bos = prepared("", max_prompt_tokens=3, overlong_prompts="left_truncate")
    assert without_bos.prompt_ids[1] == digits("456")
    assert left_truncate("12", [BOS, *digits("12")], 1, make_tokenizer()) == [BOS]


def test_left_truncation_never_cuts_the_end_of_the_chat_template():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "123"}]
    ids = tokenize_prompts([chat], tokenizer)[0]
    assert len(ids) == 8  # <bos> <user> 1 2 3 <eos> <bot> :
    assert left_truncate(chat, ids, 4, tokenizer) == [BOS, EOS, *ids[-2:]]
    with pytest.raises(ValueError, match=r"max_prompt_tokens=3 .* at least 4"):
        left_truncate(chat, ids, 3, tokenizer)


def test_the_template_leaves_all_columns_to_the_rewards():
    rows = [{"question": "1", "answer": "2"}]
    tokenizer = make_tokenizer()
    by_column = prepare_prompts(rows, PromptFormat(prompt_column="question"), tokenizer)
    by_template = prepare_prompts(rows, PromptFormat(prompt_template="{question}="), tokenizer)
    assert by_column.columns == {"answer": ["2"]}
    assert by_template.columns == {"question": ["1"], "answer": ["2"]}
    from_prompt = prepare_prompts(
        [{"prompt": "1"}], PromptFormat(prompt_template="{prompt}="), tokenizer
    )
    assert (from_prompt.prompts, from_prompt.columns) == (["1="], {"prompt": ["1"]})


def test_select_gives_rows_in_the_asked_order_with_the_given_groups():
    batch = prepared().select([2, 0], [7, 9])
    assert batch.prompts == ["1234", "1"]
    assert batch.prompt_ids == [[BOS, *digits("1234")], [BOS, *digits("1")]]
    assert batch.columns == {"n": [None, 0]}
    assert batch.group_ids == [7, 9]
    assert prepared().select([], []).columns == {"n": []}


def test_the_hash_is_of_the_rendered_prompts_and_their_columns_in_their_order():
    import hashlib
    import json

    prompts = prepared()
    names = sorted(prompts.columns)
    rows = [
        [text, *(prompts.columns[n][i] for n in names)] for i, text in enumerate(prompts.prompts)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + json.dumps(names)
    assert prompts.sha256() == hashlib.sha256(text.encode()).hexdigest()


def test_rows_of_a_file_are_prepared(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "12", "answer": "3"}\n')
    rows = read_rows(str(tmp_path / "a.jsonl"))
    prompts = prepare_prompts(rows, PromptFormat(prompt_column="q"), make_tokenizer())
    assert prompts.prompt_ids == [digits("12")]
