"""Section 3: one frozen backbone plays generator, real and fake through two adapters.

References: the plain backbone, the same with merged weights W + alpha B A computed here, gradients
without checkpointing. Run: python -m pytest tests/test_roles.py, 10 seconds on one core.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import POINT, SHAPES, STEPS, VIDEO, merged
from torch.func import functional_call

import w2svd

ROLES = ("generator", "real", "fake")
KINDS = [{}, {"generator": "full"}, {"fake": "full"}, {"generator": "full", "fake": "full"}]


def inputs(draw, shape=POINT):
    given = draw(shape)["generator"]
    return given["x_in"], given["sigma"], given["cond"]


def train(roles, draws, count):
    """So many steps of Adam for both roles in turn."""
    optimizers = {role: torch.optim.Adam(roles.parameters(role), 1e-2) for role in STEPS}
    for _ in range(count):
        for role, step in STEPS.items():
            step(roles, **draws[role])
            optimizers[role].step()
            optimizers[role].zero_grad()


@SHAPES
def test_each_role_is_the_plain_backbone_with_its_merged_weights(
    new_roles, new_backbone, draw, shape
):
    roles, plain = new_roles(shape, alpha_weak=0.25, alpha_strong=1.5), new_backbone(shape).module
    x_t, sigma, cond = inputs(draw, shape)
    base, outputs = plain(x_t, sigma, cond), {}
    for role, alpha in (("generator", 1.0), ("real", 0.25), ("fake", 1.5)):
        adapter = "generator" if role == "generator" else "fake"
        weights = merged(plain, roles.state(adapter), alpha)
        expected = functional_call(plain, weights, (x_t, sigma, cond))
        outputs[role] = getattr(roles, role)(x_t, sigma, cond)
        torch.testing.assert_close(outputs[role], expected, rtol=1e-5, atol=1e-5)
        assert (outputs[role] - base).abs().max() > 1e-2  # the adapter has an effect to speak of
    assert (outputs["fake"] - outputs["generator"]).abs().max() > 1e-2


@SHAPES
def test_without_a_role_the_adapters_are_off_bit_for_bit_as_new_ones_are_in_any(
    new_roles, new_backbone, draw, shape
):
    roles, plain = new_roles(shape, alpha_weak=0.0), new_backbone(shape)
    x_t, sigma, cond = inputs(draw, shape)
    expected = plain.velocity(x_t, sigma, cond)
    assert roles.role is None
    assert torch.equal(roles.backbone.velocity(x_t, sigma, cond), expected)
    with roles.use("fake"):
        assert torch.equal(roles.plain(x_t, sigma, cond), expected)
    assert torch.equal(roles.real(x_t, sigma, cond), expected)  # alpha_weak = 0 is no adapter
    untrained = w2svd.Roles(plain, 3, 0.25, 1.0)
    for role in ROLES:
        assert torch.equal(getattr(untrained, role)(x_t, sigma, cond), expected)


def test_roles_nest_and_the_one_before_comes_back_also_after_an_exception(new_roles, draw):
    roles, at = new_roles(), inputs(draw)
    velocity = {role: getattr(roles, role)(*at) for role in ROLES}
    forward = roles.backbone.velocity

    def active():
        out = forward(*at)
        return [role for role in ROLES if torch.equal(out, velocity[role])]

    def fails(*args):
        raise KeyError("in the backbone")

    with roles.use("fake"):
        with roles.use("generator"):
            roles.real(*at)
            assert active() == ["generator"]
        with roles.use(None, 0.0):
            assert active() == []
        assert active() == ["fake"]
        with pytest.raises(ZeroDivisionError), roles.use("generator"):
            raise ZeroDivisionError
        roles.backbone.velocity = fails
        with pytest.raises(KeyError):
            roles.generator(*at)
        assert roles.role == "fake" and active() == ["fake"]
    assert roles.role is None and active() == []


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_each_step_gives_gradients_to_its_own_role_alone(new_roles, draw, kinds):
    roles = new_roles(VIDEO, **kinds)
    for own, other in (("fake", "generator"), ("generator", "fake")):
        STEPS[own](roles, **draw(VIDEO)[own])
        assert all(p.grad is None for p in roles.parameters(other))
        assert all(p.grad is not None for p in roles.parameters(own))
        assert sum(p.grad.abs().sum() for p in roles.parameters(own)) > 0
        for parameter in roles.parameters(own):
            parameter.grad = None
    assert all(p.grad is None for p in roles.backbone.module.parameters())


@pytest.mark.parametrize("kinds", [KINDS[0], KINDS[-1]], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_backbone_does_not_move_in_training(
    new_roles, new_backbone, draw, kinds, checkpointing
):
    roles, plain = new_roles(VIDEO, **kinds), new_backbone(VIDEO).module
    if checkpointing:
        roles.use_checkpointing()
    sum_before = w2svd.base_sum(roles)
    train(roles, draw(VIDEO), 3)
    expected = plain.state_dict()
    for name, x in roles.backbone.module.state_dict().items():  # peft renames those of layers
        assert "lora_" in name or torch.equal(x, expected[name.replace(".base_layer", "")]), name
    assert w2svd.base_sum(roles) == sum_before


def test_full_roles_own_their_copies_and_the_real_dit_is_the_plain_backbone(
    new_roles, new_backbone, draw
):
    roles, at = new_roles(generator="full", fake="full"), inputs(draw)
    plain = new_backbone().velocity(*at)
    train(roles, draw(), 1)
    assert torch.equal(roles.real(*at), plain)
    generator, fake = roles.generator(*at), roles.fake(*at)
    assert not torch.equal(generator, plain) and not torch.equal(fake, plain)
    assert not torch.equal(generator, fake)
    trained = [roles.parameters("generator"), roles.parameters("fake")]
    memory = [{p.data_ptr() for p in ps} for ps in (*trained, roles.backbone.module.parameters())]
    assert sum(map(len, memory)) == len(set.union(*memory))  # they share nothing
    names = [n for n, _ in new_backbone().module.named_parameters()]
    assert list(roles.state("generator")) == list(roles.state("fake")) == names


def gradients(roles, role, at, situation):
    """d |v|^2 / d the role's parameters, its backward in a situation other than its forward's."""
    trained = roles.parameters("fake" if role == "real" else role)
    loss = getattr(roles, role)(*at).square().sum()
    if situation == "another alpha":
        roles.alpha_weak, roles.alpha_strong = 0.9, 0.6
        with roles.use("real"):
            return torch.autograd.grad(loss, trained)
    with roles.use(situation, None if situation else 0.0):
        return torch.autograd.grad(loss, trained)


@SHAPES
@pytest.mark.parametrize("situation", ["real", "fake", "generator", "another alpha", None])
@pytest.mark.parametrize("role", ROLES)
def test_no_gradient_depends_on_where_the_backward_is_nor_on_checkpointing(
    new_roles, draw, shape, role, situation
):
    at, roles = inputs(draw, shape), new_roles(shape)
    expected = gradients(new_roles(shape), role, at, role)
    found = [gradients(roles, role, at, situation)]
    roles.alpha_weak, roles.alpha_strong = 0.25, 1.0
    roles.use_checkpointing()
    found.append(gradients(roles, role, at, situation))
    for plain, recomputed, exact in zip(*found, expected):
        assert exact.abs().sum() > 0
        assert torch.equal(plain, exact) and torch.equal(recomputed, exact)


def test_adapters_have_diffusers_names_of_the_backbones_layers(new_roles, new_backbone):
    roles, plain = new_roles(rank=3), dict(new_backbone().module.named_modules())
    for role in ("generator", "fake"):
        layers = {name.rsplit(".lora_", 1)[0] for name in roles.state(role)}
        assert layers == {n for n in plain if "_blocks." in n and type(plain[n]) is torch.nn.Linear}
        expected = {f"{n}.lora_{part}.weight" for n in layers for part in "AB"}
        assert set(roles.state(role)) == expected
        for layer in layers:
            A, B = (roles.state(role)[f"{layer}.lora_{part}.weight"] for part in "AB")
            assert A.shape == (3, plain[layer].in_features)
            assert B.shape == (plain[layer].out_features, 3)
    assert roles.parameters("fake") == list(roles.state("fake").values())


@pytest.mark.parametrize("written", ["transformer.", ""])
@pytest.mark.parametrize("own", ["transformer.", ""])
def test_weights_load_with_and_without_the_prefix_of_diffusers_files(own, written):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module = torch.nn.ModuleDict({"transformer": layers}) if own else layers
    backbone = SimpleNamespace(module=module, velocity=None, lora_targets=r"(.*\.)?[01]")
    roles = w2svd.Roles(backbone, 2, 0.25, 1.0)
    expected = {n.removeprefix(own): x.detach() + 1 for n, x in roles.state("generator").items()}
    roles.load("generator", {written + name: x for name, x in expected.items()})
    assert len(expected) == 4
    for name, parameter in roles.state("generator").items():
        assert torch.equal(parameter, expected[name.removeprefix(own)])


def test_weights_with_other_names_or_shapes_are_refused_and_change_nothing(new_roles):
    roles = new_roles()
    good = {name: p.detach() + 1 for name, p in roles.state("generator").items()}
    first = next(iter(good))
    before = [p.detach().clone() for p in roles.parameters("generator")]
    missing = {name: x for name, x in good.items() if name != first}
    extra, turned = {**good, "extra.weight": good[first]}, {**good, first: good[first].T}
    for wrong, name in ((missing, first), (extra, "extra.weight"), (turned, first)):
        with pytest.raises(w2svd.Refused, match=name):
            roles.load("generator", wrong)
    for parameter, old in zip(roles.parameters("generator"), before):
        assert torch.equal(parameter, old)
