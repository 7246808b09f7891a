from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from lightning_grpo.rewards import RewardModel, Scorer

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnop"]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 12,
}
PROMPTS = ["a b ", "a ", "c d e ", "f "]
COMPLETIONS = ["c", "d e f g", "h", "i j k l m n"]
TEXT_IDS = [
    [7, 8, 9],
    [7, 10, 11, 12, 13],
    [9, 10, 11, 14],
    [12, 15, 16, 17, 18, 19, 20],
]


def save_tokenizer(folder, *, pad="<pad>", eos="<eos>", bos=False, template=TEMPLATE, words=WORDS):
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token=eos, unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_model(folder, *, kind=Qwen2ForSequenceClassification, config=Qwen2Config, **changes):
    torch.manual_seed(0)
    options = {"vocab_size": len(WORDS), "num_labels": 1, "pad_token_id": None, **SIZES, **changes}
    model = kind(config(**options)).eval()
    for name, weight in model.named_parameters():
        if name.startswith(("score", "classifier")):
            torch.nn.init.normal_(weight)  # scores far enough apart to tell rows from each other
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path)
    return tmp_path


def score_of(model, ids):
    """The score head on the hidden state of the last token, of one unpadded row."""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(model.score.weight[0] @ hidden)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen2ForSequenceClassification, Qwen2Config),
        (LlamaForSequenceClassification, LlamaConfig),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_score_is_that_of_the_last_token_whatever_the_batch(tmp_path, kind, config, batch_size):
    save_tokenizer(tmp_path)
    model = save_model(tmp_path, kind=kind, config=config)
    expected = [score_of(model, ids) for ids in TEXT_IDS]
    assert min(abs(x - y) for i, x in enumerate(expected) for y in expected[:i]) > 1e-2
    scores = RewardModel(str(tmp_path), batch_size=batch_size)(
        prompts=PROMPTS, completions=COMPLETIONS
    )
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad_token_id", [None, 5])
def test_the_pad_token_of_the_tokenizer_counts_not_that_of_the_config(tmp_path, pad_token_id):
    save_tokenizer(tmp_path)
    model = save_model(tmp_path, pad_token_id=pad_token_id)
    scores = RewardModel(str(tmp_path))(prompts=PROMPTS, completions=COMPLETIONS)
    assert scores == pytest.approx([score_of(model, ids) for ids in TEXT_IDS], abs=1e-5)


def test_the_tokenizer_is_the_one_that_was_saved(folder, tmp_path):
    model = Qwen2ForSequenceClassification.from_pretrained(tmp_path).eval()
    scores = RewardModel(str(folder))(prompts=["user a "], completions=["assistant b"])
    assert scores == pytest.approx([score_of(model, [4, 7, 5, 8])], abs=1e-5)


def test_without_a_pad_token_eos_pads(tmp_path):
    save_tokenizer(tmp_path, pad=None)
    model = save_model(tmp_path)
    scores = RewardModel(str(tmp_path))(prompts=PROMPTS, completions=COMPLETIONS)
    assert scores == pytest.approx([score_of(model, ids) for ids in TEXT_IDS], abs=1e-5)


def test_an_encoder_that_reads_both_ways_does_not_see_the_padding(tmp_path):
    save_tokenizer(tmp_path)
    model = save_model(tmp_path, kind=BertForSequenceClassification, config=BertConfig)
    scores = RewardModel(str(tmp_path))(prompts=PROMPTS, completions=COMPLETIONS)
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in TEXT_IDS]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_messages_are_written_in_the_chat_template_without_a_second_bos(tmp_path):
    template = "<bos> " + TEMPLATE
    save_tokenizer(tmp_path, bos=True, template=template)
    model = save_model(tmp_path)
    prompts = [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]]
    completions = [[{"role": "assistant", "content": text}] for text in ("d", "e f")]
    expected = [
        score_of(model, [2, 4, 6, 7, 8, 1, 5, 6, 10, 1]),
        score_of(model, [2, 4, 6, 9, 1, 5, 6, 11, 12, 1]),
    ]
    reward = RewardModel(str(tmp_path))
    assert reward(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-5)
    plain = reward(prompts=["a ", "b "], completions=["b", "c"])
    assert plain == pytest.approx(
        [score_of(model, [2, 7, 8]), score_of(model, [2, 8, 9])], abs=1e-5
    )


@pytest.mark.parametrize(("max_length", "kept"), [(None, 12), (5, 5), (100, 12)])
def test_a_long_text_loses_its_beginning_and_is_counted(tmp_path, max_length, kept):
    save_tokenizer(tmp_path, bos=True)
    model = save_model(tmp_path)
    logged = []
    reward = RewardModel(str(tmp_path), max_length=max_length)
    scores = reward(
        prompts=["a b c d e f g h ", "a "],
        completions=["i j k l m n o p", "b c d"],
        log_metric=lambda *metric: logged.append(metric),
    )
    long_ids = [2, *range(7, 23)]
    expected = [score_of(model, [2, *long_ids[-kept + 1 :]]), score_of(model, [2, 7, 8, 9, 10])]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert logged == [(f"{tmp_path.name}/truncated_frac", 0.5)]


def test_the_scorer_gives_it_text_and_not_the_ids_of_the_policy(folder):
    reward = RewardModel(str(folder))
    scorer = Scorer([reward], weights=[2.0])
    ids = [[10_000 + i] for i in range(4)]  # the policy's vocabulary is larger than the model's
    scores = scorer(PROMPTS, COMPLETIONS, ids, {"answer": ["", "", "", ""]})
    alone = [reward(prompts=[p], completions=[c])[0] for p, c in zip(PROMPTS, COMPLETIONS)]
    assert scores.rewards.tolist() == pytest.approx([2 * x for x in alone], abs=1e-5)
    assert scores.metrics == {f"{folder.name}/truncated_frac": [0.0]}
    assert list(scores.function_rewards) == [folder.name]


def test_it_scores_in_eval_mode_without_gradients_at_the_dtype_asked_for(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path, attention_dropout=0.5)
    reward = RewardModel(str(tmp_path), dtype="bfloat16")
    grads_on = []
    reward.to("cpu")._model.register_forward_hook(
        lambda *_: grads_on.append(torch.is_grad_enabled())
    )
    first = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert grads_on == [False]
    assert first == reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert all(isinstance(score, float) for score in first)
    assert {weight.dtype for weight in reward._model.parameters()} == {torch.bfloat16}


def test_it_is_loaded_when_it_is_moved_or_called(folder):
    reward = RewardModel(str(folder))
    assert reward._model is None
    assert reward.to("cpu") is reward
    model = reward._model
    reward(prompts=["a "], completions=["b"])
    assert reward.to(torch.device("cpu"))._model is model
    assert reward(prompts=[], completions=[]) == []


def test_a_classifier_with_two_outputs_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path, num_labels=2)
    with pytest.raises(ValueError, match="has 2 outputs"):
        RewardModel(str(tmp_path)).to("cpu")


def test_a_language_model_without_a_score_head_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path, kind=Qwen2ForCausalLM)
    with pytest.raises(
        ValueError, match=r"no trained reward model: it lacks the weights score.weight"
    ):
        RewardModel(str(tmp_path)).to("cpu")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_tokenizer(tmp_path, words=[*WORDS, "q"])
    save_model(tmp_path)
    with pytest.raises(ValueError, match="has 24 tokens, but its model only 23"):
        RewardModel(str(tmp_path)).to("cpu")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    save_tokenizer(tmp_path, pad=None, eos=None)
    save_model(tmp_path)
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        RewardModel(str(tmp_path)).to("cpu")


def test_messages_need_a_chat_template(tmp_path):
    save_tokenizer(tmp_path, template=None)
    save_model(tmp_path)
    messages = [{"role": "user", "content": "a"}]
    reply = [{"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="has no chat template"):
        RewardModel(str(tmp_path))(prompts=[messages], completions=[reply])


def test_a_string_and_messages_do_not_mix(folder):
    reply = [{"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="must both be strings or both be messages"):
        RewardModel(str(folder))(prompts=["a"], completions=[reply])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 0}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, not 0"):
        RewardModel("folder", **options)
