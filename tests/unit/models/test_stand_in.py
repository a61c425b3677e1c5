"""Media that stand in for those that a rank has not: in the order in which others encode theirs."""

from __future__ import annotations

import itertools

import gemma4_zoo as zoo
import pytest
import torch

from gemtune.models import StandIns

KINDS = ("image", "video", "audio")


def inputs_of(model, kinds):
    """A batch with one medium of each of these kinds."""
    images, videos, audios = ((1, 0) if k in kinds else (0, 0) for k in KINDS)
    return zoo.batch(model, images, videos, audios_per_row=audios)


@pytest.fixture(scope="module")
def model():
    return zoo.build("e2b", torch.float32, hears=True)


@pytest.fixture
def made(model):
    """(kinds, without_autograd) -> StandIns of the model, whose hooks are gone afterwards."""
    modules = [model.model, model.model.language_model]
    modules += [model.model.vision_tower, model.model.audio_tower]
    before = [set(module._forward_pre_hooks) for module in modules]
    yield lambda kinds, **options: StandIns(model, kinds, **({"without_autograd": True} | options))
    for module, known in zip(modules, before, strict=True):
        for key in set(module._forward_pre_hooks) - known:
            module._forward_pre_hooks.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def subsets():
    return [set(c) for n in range(4) for c in itertools.combinations(KINDS, n)]


def passes(model):
    """Filled with "vision" and "audio" as layers of the towers run, forward and backward."""
    order, handles = [], []
    for name in ("vision", "audio"):
        tower = getattr(model.model, f"{name}_tower")
        layer = (tower.encoder if name == "vision" else tower).layers[0]
        handles.append(layer.register_forward_hook(lambda *_, name=name: order.append(name)))
        handles.append(
            layer.register_full_backward_hook(lambda *_, name=name: order.append(f"{name} back"))
        )
    return order, handles


def test_towers_run_in_one_order_whatever_a_rank_has(model, made):
    """Forward images, videos, audio; backward the other way round: so do the collectives."""
    made(KINDS)
    for kinds in subsets():
        order, handles = passes(model)
        output = model(**inputs_of(model, kinds), use_cache=False)
        output.loss.backward()
        for handle in handles:
            handle.remove()
        forward = ["vision", "vision", "audio"]
        assert order == forward + [f"{name} back" for name in reversed(forward)], kinds


def test_nothing_changes_but_that_gradients_of_zero_are_there(model, made):
    expected = {}
    for kinds in subsets():
        expected[frozenset(kinds)] = zoo.loss_and_gradients(model, inputs_of(model, kinds))
    made(KINDS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for kinds in subsets():
        loss, gradients = zoo.loss_and_gradients(model, inputs_of(model, kinds))
        stock_loss, stock = expected[frozenset(kinds)]
        assert torch.equal(loss, stock_loss)
        assert gradients.keys() >= {n for n in trained if "tower" in n or "embed_" in n}
        for name, gradient in gradients.items():
            if name in stock:
                assert torch.equal(gradient, stock[name]), (kinds, name)
            else:
                assert not gradient.any(), (kinds, name)


def test_every_trained_parameter_gets_a_gradient_as_ddp_wants_it(model, made):
    made({"image", "audio"}, without_autograd=False)
    _, gradients = zoo.loss_and_gradients(model, inputs_of(model, {"image", "audio"}))
    of_stock = set(gradients)
    for kinds in subsets():
        _, gradients = zoo.loss_and_gradients(model, inputs_of(model, kinds))
        assert set(gradients) == of_stock, kinds


def test_without_autograd_towers_run_only_where_that_is_asked(model, made):
    for without, forward in ((True, ["vision", "vision", "audio"]), (False, ["vision"])):
        order, handles = passes(model)
        if without:
            made(KINDS)
        with torch.no_grad():
            if not without:
                for module in (model.model, model.model.language_model):
                    module._forward_pre_hooks.clear()
                made(KINDS, without_autograd=False)
            model(**inputs_of(model, {"image"}), use_cache=False)
        for handle in handles:
            handle.remove()
        assert order == forward


def test_gradients_of_a_tower_that_no_rank_fed_are_none(model, made):
    stand_ins = made(KINDS)
    towers = {"vision": "vision_", "audio": "audio_"}

    def fed():
        return {
            name
            for name, part in towers.items()
            if any(part in n and p.grad is not None for n, p in model.named_parameters())
        }

    for kinds, remaining in (
        ({"video"}, {"vision"}),
        ({"audio"}, {"audio"}),
        (set(), set()),
        (set(KINDS), {"vision", "audio"}),
    ):
        zoo.loss_and_gradients(model, inputs_of(model, kinds))
        assert fed() == {"vision", "audio"}
        stand_ins.forget_unfed(lambda here: here)
        assert fed() == remaining
    zoo.loss_and_gradients(model, inputs_of(model, set()))
    stand_ins.forget_unfed(lambda here: True)  # another rank had some
    assert fed() == {"vision", "audio"}
    asked = []
    stand_ins.forget_unfed(lambda here: asked.append(here) or True, {"video"})
    assert len(asked) == 1  # of audio alone


def test_a_frozen_tower_does_not_run_and_its_projector_does():
    model = zoo.build("e2b", torch.float32, hears=True, frozen=("vision_tower", "audio_tower"))
    StandIns(model, KINDS, without_autograd=False)
    order, _ = passes(model)
    _, gradients = zoo.loss_and_gradients(model, inputs_of(model, set()))
    assert not order
    assert not gradients["model.embed_audio.embedding_projection.weight"].any()
    assert not gradients["model.embed_vision.embedding_projection.weight"].any()


def test_generation_with_every_kind_gives_the_tokens_of_stock(model, made):
    model.eval()
    inputs = inputs_of(model, {"image", "audio"})
    del inputs["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    made(KINDS)
    assert torch.equal(model.generate(**inputs, **options), expected)
    model.train()
