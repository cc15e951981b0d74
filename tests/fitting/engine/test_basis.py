"""Adam in the eigenbasis: the basis, the update, and that rows stay independent."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting.engine.basis import eigenbasis, gradient_covariance
from prototok.fitting.engine.rows import initial_vectors, make_groups
from prototok.fitting.recipe import PAPER
from prototok.model.load import load
from prototok_kernels.adamw_rows import AdamWState, adamw_rows_ref_
from tests.support import small_llama

EIGEN = Recipe(lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, eigenbasis=True, max_steps=200)


def test_basis_is_orthonormal_and_diagonalises_the_gradients(small_lm: FrozenLM) -> None:
    basis = eigenbasis(small_lm, "auto")
    eye = torch.eye(small_lm.hidden_size).expand_as(basis)
    assert torch.allclose(basis.mT @ basis, eye, atol=1e-5)
    turned = basis.mT @ gradient_covariance(small_lm, "auto") @ basis
    diagonal = turned.diagonal(dim1=1, dim2=2)
    rest = turned - torch.diag_embed(diagonal)
    assert float(rest.norm()) < 1e-4 * float(diagonal.norm())
    # The model stretches some directions far more than others; that is the point of it.
    assert float(diagonal.amax(1).min() / diagonal.mean()) > 2


def test_basis_belongs_to_the_model_alone() -> None:
    one, other = (load(small_llama(), dtype="float32") for _ in range(2))
    assert eigenbasis(one, "auto") is eigenbasis(one, "auto")
    prototok.fast_fit(one, [[1, 2, 3]], recipe=EIGEN, progress=False)
    assert torch.equal(eigenbasis(one, "auto"), eigenbasis(other, "auto"))


def test_update_is_adamw_in_turned_coordinates(small_lm: FrozenLM) -> None:
    ids = torch.tensor([5, 17, 3, 60, 41])
    seen: list[float] = []
    recipe = dataclasses.replace(EIGEN, max_steps=25, margin=1e9)
    prototok.fast_fit(
        small_lm, [ids], recipe=recipe, callback=lambda event: seen.append(event.loss.item())
    )
    basis = eigenbasis(small_lm, "auto")
    start = initial_vectors(make_groups([ids], [0], None, None)[0], 1, small_lm.hidden_size, 1.0)
    # By hand: the turned vectors are the parameters, decay included.
    z = torch.stack([start[0][0, 0] @ basis[0], start[1][0] @ basis[1]])
    state = AdamWState.zeros(z)
    expected = []
    for _ in range(25):
        z.requires_grad_()
        e, m = z[0] @ basis[0].T, z[1] @ basis[1].T
        logits = small_lm.logits(torch.cat([e[None], m.expand(4, -1)])[None])[0]
        loss = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
        expected.append(loss.item())
        (grad,) = torch.autograd.grad(loss, z)
        z = z.detach()
        rate, active = torch.full((2,), recipe.lr), torch.ones(2, dtype=torch.bool)
        adamw_rows_ref_(z, grad, state, rate, active, recipe.adamw)
    assert seen[:25] == pytest.approx(expected, rel=1e-3)


def test_rows_stay_independent(small_lm: FrozenLM) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = list(torch.randint(small_lm.vocab_size, (6, 3), generator=generator))
    together = prototok.fast_fit(small_lm, texts, recipe=EIGEN)
    for i in (0, 5):
        alone = prototok.fast_fit(small_lm, [texts[i]], recipe=EIGEN)
        assert abs(alone.steps.item() - together.steps[i].item()) <= 2
        assert torch.allclose(alone.tokens.e[0], together.tokens.e[i], atol=1e-2)


def test_paper_recipe_stays_in_the_models_coordinates(small_lm: FrozenLM) -> None:
    assert not PAPER.eigenbasis and PAPER.cycle is None
