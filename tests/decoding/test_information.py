"""H_LM and token accuracy."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import prototok
from prototok import FrozenLM
from prototok.decoding.information import token_accuracy
from support import shared, small_llama, stories


def by_hand(lm: FrozenLM, ids: list[int]) -> float:
    """−Σ_{i≥2} log P(t_i | t_<i) from the library's own labels loss."""
    model = AutoModelForCausalLM.from_config(lm.config)
    model.load_state_dict(lm.source.state_dict())
    row = torch.tensor([ids])
    with torch.no_grad():
        mean = model.eval()(input_ids=row, labels=row).loss
    return float(mean) * (len(ids) - 1)


def test_information_is_the_librarys_loss(small_lm: FrozenLM) -> None:
    texts = [[5, 9, 2, 30, 11], [7, 3], [8]]
    found = prototok.information(small_lm, texts)
    assert found.scored.tolist() == [4, 1, 0] and found.bos == "drop"
    assert found.nats.tolist() == pytest.approx(
        [*(by_hand(small_lm, t) for t in texts[:2]), 0.0], rel=1e-5
    )
    assert found.bits.tolist() == pytest.approx([n / math.log(2) for n in found.nats.tolist()])


def test_keeping_the_bos_scores_every_token(small_lm: FrozenLM) -> None:
    found = prototok.information(small_lm, [[5, 9, 2]], bos="keep")
    assert found.scored.tolist() == [3]
    assert found.nats.item() == pytest.approx(by_hand(small_lm, [1, 5, 9, 2]), rel=1e-5)


def test_information_of_a_general_model() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
    lm = prototok.load(model, device="cpu", dtype="float32")
    found = prototok.information(lm, [[5, 9, 2, 30]])
    assert found.nats.item() == pytest.approx(by_hand(lm, [5, 9, 2, 30]), rel=1e-5)


def test_known_text_carries_less_information_than_random_tokens() -> None:
    lm = prototok.load(shared("models", "stories3m"), device="cpu", dtype="float32")
    known = prototok.information(lm, stories(4, lm, 64), length=64)
    noise = torch.randint(lm.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    random = prototok.information(lm, noise)
    assert 1.0 < float(known.nats.mean()) / 63 < 3.0
    assert float(random.nats.mean()) > 3 * float(known.nats.mean())


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([], {}, "^texts: the list is empty"),
        ([[1, 2]], {"bos": "maybe"}, "^bos: 'maybe' is neither"),
        ([[1] * 42], {}, "^texts: 42 tokens do not fit a context of 40"),
        ([[1, 2]], {"length": 2.0}, "^length: 2.0 is not"),
    ],
)
def test_bad_input_is_named(texts: list, options: dict, says: str, small_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match=says):
        prototok.information(small_lm, texts, **options)


def test_a_model_without_bos() -> None:
    lm = prototok.load(small_llama(bos_token_id=None), device="cpu")
    with pytest.raises(ValueError, match="^bos: LlamaForCausalLM has no BOS token to keep"):
        prototok.information(lm, [[1, 2]], bos="keep")


def test_token_accuracy() -> None:
    assert token_accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    with pytest.raises(ValueError, match="^predicted: shape"):
        token_accuracy([1, 2], [1])
    with pytest.raises(ValueError, match="^predicted: shape"):
        token_accuracy([], [])
