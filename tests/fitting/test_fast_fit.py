"""The public fit: inputs, bad inputs, results, save and load, and real models."""

from __future__ import annotations

import pickle
import pydoc
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prototok
from prototok import FitResult, FrozenLM, ProtoTokens, Recipe, fast_fit
from prototok.fitting.engine.run import FitEvent
from support import shared, small_llama, stories

QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=300)
IDS = [[5, 9, 2], [7, 3]]


@pytest.fixture(scope="module")
def fit(small_lm: FrozenLM) -> FitResult:
    return fast_fit(small_lm, IDS, seeds=2, recipe=QUICK)


def test_shapes_and_meaning_of_the_result(fit: FitResult, small_lm: FrozenLM) -> None:
    assert fit.tokens.e.shape == (2, 2, 32) and fit.tokens.m is not None
    assert fit.tokens.m.shape == (2, 2, 32) and fit.tokens.e.dtype == torch.float32
    for name in ("accuracy", "exact", "margin", "correct", "loss", "steps", "seconds"):
        assert getattr(fit, name).shape == (2, 2), name
    lengths = torch.tensor([[3, 3], [2, 2]])
    torch.testing.assert_close(fit.accuracy, fit.correct / lengths)
    assert torch.equal(fit.exact, fit.correct == lengths)
    assert torch.equal(fit.exact, (fit.margin > 0) & (fit.accuracy == 1))
    decoded = prototok.decode(small_lm, fit.tokens)
    assert decoded.shape == (4, 3) and decoded[2:, 2].tolist() == [-1, -1]
    for row, (text, seed) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        right = int((decoded[row, : len(IDS[text])] == torch.tensor(IDS[text])).sum())
        assert right == fit.correct[text, seed]


@pytest.mark.parametrize(
    "texts",
    [
        torch.tensor([[5, 9], [7, 3]]),
        [torch.tensor([5, 9]), torch.tensor([7, 3])],
        [np.array([5, 9]), np.array([7, 3])],
        ((5, 9), (7, 3)),
    ],
)
def test_forms_of_token_ids(texts: object, small_lm: FrozenLM) -> None:
    fit = fast_fit(small_lm, texts, recipe=Recipe(max_steps=1))
    assert [ids.tolist() for ids in fit.targets] == [[5, 9], [7, 3]]


def test_length_cuts_the_targets(small_lm: FrozenLM) -> None:
    fit = fast_fit(small_lm, [[5, 9, 2, 4], [7, 3, 8]], length=2, recipe=Recipe(max_steps=1))
    assert [ids.tolist() for ids in fit.targets] == [[5, 9], [7, 3]]


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([], {}, "^texts: the list is empty"),
        ("one string", {}, "^texts: one string was passed"),
        ([""], {}, "^texts: text 0 is empty"),
        ([[1], []], {}, "^texts: text 1 has no tokens"),
        ([list(range(41))], {}, "^texts: text 0 is too long; length: 41 tokens need 41 positions"),
        (
            [list(range(40))],
            {"arrangement": "e m*+1"},
            "^texts: text 0 is too long; .* 41 positions",
        ),
        ([[1, 97]], {}, "^texts: text 0 holds token id 97, outside the vocabulary of 97"),
        ([[1, -1]], {}, "^texts: text 0 holds token id -1"),
        ([[1.5, 2.0]], {}, "^texts: text 0 is torch.float32"),
        (torch.tensor([1, 2, 3]), {}, r"^texts: text 0 is torch.int64 of shape \(\)"),
        ([{"a": 1}], {}, "^texts: text 0 is dict"),
        (7, {}, "^texts: int is not a list"),
        ([[1, 2]], {"length": 0}, "^length: 0 is not a positive integer"),
        ([[1, 2]], {"length": 1.5}, "^length: 1.5 is not a positive integer"),
        ([[1, 2]], {"length": True}, "^length: True is not a positive integer"),
        ([[1, 2]], {"length": 3}, "^texts: text 0 has 2 tokens, fewer than length = 3"),
        ([[1, 2]], {"arrangement": "m e"}, "^arrangement: 'm e' is not known"),
        ([[1, 2]], {"recipe": "quick"}, "^recipe: 'quick' is not"),
        ([[1, 2]], {"backend": "tpu"}, "^backend: 'tpu' is not"),
        ([[1, 2]], {"share": "both"}, "^share: 'both' is not"),
        ([[1, 2]], {"share": "m", "arrangement": "e*"}, "^share: 'm' cannot be shared"),
        ([[1, 2]], {"group_size": 2}, "^group_size: 2 is not"),
        ([[1, 2]], {"share": "m", "group_size": 0}, "^group_size: 0 is not"),
        ([[1, 2]], {"seeds": 0}, "^seeds: 0 is not"),
        ([[1, 2]], {"seeds": [1, 1]}, "^seeds: .* is not"),
        ([[1, 2]], {"batch_size": 0}, "^batch_size: 0 is not"),
        ([[1, 2]], {"batch_size": "big"}, "^batch_size: 'big' is not"),
    ],
)
def test_bad_input_is_named(texts: object, options: dict, says: str, small_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        fast_fit(small_lm, texts, **options)
    assert "\n" not in str(caught.value)


def test_a_raw_model_is_not_a_frozen_one() -> None:
    with pytest.raises(ValueError, match=r"^lm: LlamaForCausalLM is not a FrozenLM"):
        fast_fit(small_llama(), [[1]])


def test_seeds_by_number_are_the_seeds_by_name(small_lm: FrozenLM) -> None:
    both = fast_fit(small_lm, IDS, seeds=2, recipe=Recipe(max_steps=2))
    second = fast_fit(small_lm, IDS, seeds=[1], recipe=Recipe(max_steps=2))
    torch.testing.assert_close(both.tokens.e[:, 1], second.tokens.e[:, 0], rtol=1e-4, atol=1e-4)


def test_best_takes_the_best_seed(small_lm: FrozenLM) -> None:
    fit = fast_fit(small_lm, [[5, 9, 2, 8, 1]], seeds=4, recipe=Recipe(lr=0.1, max_steps=40))
    best = fit.best()
    assert best.correct.item() == fit.correct.max().item()
    assert (prototok.decode(small_lm, best.tokens)[0] == fit.targets[0]).sum() == best.correct
    assert best.best().correct.item() == best.correct.item()


def test_saved_and_loaded_again(fit: FitResult, tmp_path: Path) -> None:
    folder = tmp_path / "fits"
    fit.save(folder)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["fits"]
    again = FitResult.load(folder)
    for name in ("accuracy", "exact", "margin", "correct", "loss", "steps", "seconds"):
        assert torch.equal(getattr(again, name), getattr(fit, name)), name
    assert torch.equal(again.tokens.e, fit.tokens.e) and again.tokens.model == fit.tokens.model
    assert again.tokens.provenance == fit.tokens.provenance
    assert [t.tolist() for t in again.targets] == IDS
    fit.save(folder)  # over itself
    frame = again.to_pandas()
    assert len(frame) == 4 and frame["length"].tolist() == [3, 3, 2, 2]
    assert list(frame["targets"][2]) == IDS[1]


def test_saving_never_replaces_something_else(fit: FitResult, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"^folder: .* holds something else"):
        fit.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"^folder: .* holds no fit"):
        FitResult.load(tmp_path)


def test_shared_vectors_are_stored_once(small_lm: FrozenLM, tmp_path: Path) -> None:
    fit = fast_fit(small_lm, [[5], [9], [2]], share="m", group_size=2, seeds=2, recipe=QUICK)
    assert fit.tokens.m is not None and fit.tokens.m.shape == (2, 32)
    fit.tokens.save(tmp_path / "t.safetensors")
    again = ProtoTokens.load(tmp_path / "t.safetensors")
    assert torch.equal(prototok.decode(small_lm, again), prototok.decode(small_lm, fit.tokens))
    assert torch.equal(
        prototok.decode(small_lm, again.select([2])), prototok.decode(small_lm, again)[4:]
    )


@pytest.mark.parametrize(
    ("texts", "arrangement", "unlike"),
    [
        ([[5, 6], [5, 7], [6, 7], [6, 8]], "e m*", None),
        ([[5, 6], [6, 7], [6, 8], [6, 7]], "e m*", "in 1 of 2 groups"),
        ([[5, 6], [6, 7], [7, 8], [8, 7]], "e m*+1", None),
        ([[5, 6, 7], [5, 6, 8], [5, 6, 7], [5, 7, 7]], "e2 m*", "in 1 of 2 groups"),
        ([[5, 6], [5, 7], [6, 7], [6, 8]], "e*", "in 2 of 2 groups"),
    ],
)
def test_texts_that_share_e_begin_alike(
    texts: list[list[int]], arrangement: str, unlike: str | None, small_lm: FrozenLM
) -> None:
    options = {"share": "e", "group_size": 2, "arrangement": arrangement, "recipe": QUICK}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fast_fit(small_lm, texts, **options)  # type: ignore[arg-type]
    said = [w for w in seen if str(w.message).startswith("share: with e shared")]
    assert [w.filename for w in said] == [__file__] * (unlike is not None)
    assert all(str(unlike) in str(w.message) for w in said)


def test_leading_vectors_and_the_one_vector_arrangement(small_lm: FrozenLM, tmp_path: Path) -> None:
    for arrangement, e_shape, has_m in (
        ("e3 m*+2", (1, 1, 3, 32), True),
        ("e*", (1, 1, 32), False),
    ):
        fit = fast_fit(small_lm, [[5, 9]], arrangement=arrangement, recipe=QUICK)
        assert fit.tokens.e.shape == e_shape and (fit.tokens.m is not None) is has_m
        fit.tokens.save(tmp_path / "t.safetensors")
        again = ProtoTokens.load(tmp_path / "t.safetensors")
        assert (
            int((prototok.decode(small_lm, again)[0] == torch.tensor([5, 9])).sum()) == fit.correct
        )


def test_reading_more_tokens_than_were_fitted(fit: FitResult, small_lm: FrozenLM) -> None:
    longer = prototok.decode(small_lm, fit.tokens, length=6)
    own = prototok.decode(small_lm, fit.tokens)
    assert longer.shape == (4, 6) and torch.equal(longer[:2, :3], own[:2])
    assert torch.equal(prototok.decode(small_lm, fit.tokens, batch_size=4), own)
    with pytest.raises(ValueError, match="^length: 41 tokens need 41 positions"):
        prototok.decode(small_lm, fit.tokens, length=41)


def test_vectors_of_another_model_are_refused(fit: FitResult) -> None:
    other = prototok.load(small_llama(num_hidden_layers=1), device="cpu")
    with pytest.raises(ValueError, match=r"^tokens: fitted on LlamaForCausalLM \(weights"):
        prototok.decode(other, fit.tokens)


def test_text_needs_the_tokenizer_it_was_fitted_with(tiny_lm: FrozenLM) -> None:
    import dataclasses

    fit = fast_fit(tiny_lm, ["Once"], recipe=Recipe(max_steps=1))
    stranger = dataclasses.replace(
        fit.tokens, model=dataclasses.replace(fit.tokens.model, tokenizer_hash="0" * 32)
    )
    with pytest.raises(ValueError, match="^tokens: fitted with another tokenizer"):
        prototok.decode(tiny_lm, stranger, text=True)
    assert prototok.decode(tiny_lm, stranger).shape == (1, len(fit.targets[0]))


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "not safetensors":
        path.write_bytes(b"hello" * 100)
    elif how == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if how == "wrong shape":
            tensors["e"] = tensors["e"][:, :, :-1].contiguous()
        if how == "wrong dtype":
            tensors["m"] = tensors["m"].half()
        if how == "missing":
            del tensors["m"]
        if how == "nan":
            tensors["m"][0, 0, 0] = float("nan")
        if how == "future":
            metadata["prototok"] = metadata["prototok"].replace('"version": 1', '"version": 2')
        save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "is not a whole safetensors file"),
        ("not safetensors", "is not a whole safetensors file"),
        ("foreign", "but not one of proto-tokens"),
        ("wrong shape", "e is F32 .* where F32"),
        ("wrong dtype", "m is F16 .* where F32"),
        ("missing", r"it holds \['e', 'lengths'\]"),
        ("nan", "holds values in m that are not finite"),
        ("future", "has format version 2; this prototok reads 1"),
    ],
)
def test_damaged_files_are_refused(how: str, says: str, fit: FitResult, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    fit.tokens.save(path)
    damage(path, how)
    with pytest.raises(ValueError, match=f"^path: .*{says}"):
        ProtoTokens.load(path)


def test_missing_file() -> None:
    with pytest.raises(ValueError, match="^path: there is no file"):
        ProtoTokens.load("nowhere.safetensors")


def test_callback_sees_every_step(small_lm: FrozenLM) -> None:
    events: list[FitEvent] = []
    fast_fit(small_lm, IDS, recipe=Recipe(max_steps=4, margin=1e9), callback=events.append)
    assert [e.steps.tolist() for e in events] == [[i, i] for i in range(4)]


@pytest.mark.parametrize("share", [None, "m"])
def test_callback_can_ask_for_the_best_vectors(share: str | None, small_lm: FrozenLM) -> None:
    recipe = Recipe(max_steps=3, margin=1e9)  # scores at steps 0, 1 and 2, keeps the best of them
    seen: dict[int, torch.Tensor] = {}
    events: list[FitEvent] = []

    def note(event: FitEvent) -> None:
        events.append(event)
        seen.update({row: event.best_of(row) for row in event.rows.tolist()})
        assert event.best_of(4) is None  # there are four rows

    fit = fast_fit(small_lm, IDS, seeds=2, share=share, recipe=recipe, callback=note)
    for row in range(4):
        assert torch.equal(seen[row], fit.tokens.vectors(row))
    assert events[-1].best_of(0) is None  # nothing of the device is kept
    assert torch.equal(pickle.loads(pickle.dumps(events[0])).loss, events[0].loss)


@pytest.mark.parametrize(
    "name", ["capacity", "decode", "fast_fit", "learn_optimizer", "learn_shared"]
)
def test_every_way_to_import_gives_the_function(name: str) -> None:
    code = (
        "import sys, pickle, types, prototok; assert 'torch' not in sys.modules\n"
        f"import prototok.{name}; assert isinstance(prototok.{name}, types.FunctionType)\n"
        f"from prototok import {name}; assert {name} is prototok.{name}\n"
        f"from prototok.{name} import {name} as again; assert again is {name}\n"
        f"assert pickle.loads(pickle.dumps(prototok.{name})) is {name}\n"
        f"try: prototok.{name}(None, ['a'])\n"
        "except (ValueError, AttributeError): pass\n"
        "else: raise SystemExit('accepted')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_shows_the_function() -> None:
    """Its signature and docstring, not those of a module."""
    text = pydoc.plain(pydoc.render_doc(prototok.fast_fit))
    assert "function fast_fit in module" in text
    assert "share: str | None = None" in text or "share: 'str | None' = None" in text
    assert "Fit proto-tokens" in text


def test_exact_means_plain_transformers_agree(tmp_path: Path) -> None:
    """Every text claimed exact comes back from plain transformers in fp32, from the file alone."""
    path = shared("models", "stories3m")
    lm = prototok.load(path, device="cpu")
    texts = stories(8, lm, 12)
    fit = fast_fit(lm, texts, length=12)
    assert fit.exact.float().mean() >= 0.85
    fit.tokens.save(tmp_path / "t.safetensors")
    stored = load_file(tmp_path / "t.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for i, target in enumerate(fit.targets):
        e, m = stored["e"][i, 0], stored["m"][i, 0]
        embeds = torch.cat([e[None], m.expand(11, -1)])[None]
        with torch.no_grad():
            ids = plain(inputs_embeds=embeds).logits[0].argmax(-1)
        assert not fit.exact[i, 0] or torch.equal(ids, target)


@pytest.mark.parametrize(("name", "length"), [("stories260k", 16), ("neox4m", 8)])
def test_other_real_models(name: str, length: int) -> None:
    lm = prototok.load(shared("models", name), device="cpu")
    if name == "neox4m":
        book = shared("corpora", "novels", "E_ENG18652_Carroll.txt").read_text()
        ids = lm.encode(book[20_000:40_000])
        texts: list = [ids[i : i + length] for i in range(0, 12 * length, length)]
    else:
        texts = stories(12, lm, length)
    fit = fast_fit(lm, texts, length=length)
    assert fit.exact.float().mean() >= 0.9
