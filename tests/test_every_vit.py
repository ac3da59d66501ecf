"""Does each placement compute its formula on each kind of ViT, through all that may happen to a model?"""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.mlp import GatedMlp

import vitadapter_ext as va
from tests.vits import (
    ARCHITECTURES,
    METHODS,
    PLACEMENTS,
    assert_same_state,
    copied_state,
    images,
    make,
    randomise_trained,
    structure,
)
from vitadapter_ext.sites import ADAPTED_BLOCKS, ADAPTED_MLPS, find_blocks

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
ONE_OF_EACH_BLOCK = ("siglip", "eva02_large", "beit", "swin")


def attached(architecture, method, **changes):
    model = va.attach(make(architecture, **changes), method)
    randomise_trained(model)
    return model


def test_every_row_has_an_architecture():
    models = [make(architecture) for architecture in ARCHITECTURES]
    blocks = [block for model in models for block in find_blocks(model).values()]
    assert {type(block) for block in blocks} == set(ADAPTED_BLOCKS)
    assert {type(block.mlp) for block in blocks} == set(ADAPTED_MLPS)
    assert len({type(find_blocks(make(architecture)).popitem()[1]) for architecture in ONE_OF_EACH_BLOCK}) == 4


# The formulas


def plain_bottleneck(adapter, x):
    """A of methods.md: without the residual, in plain PyTorch."""
    hidden = F.gelu(F.linear(x, adapter.down.weight, adapter.down.bias))
    return adapter.scale * F.linear(hidden, adapter.up.weight, adapter.up.bias)


def plain_branch(block, number, branch):
    """With what the backbone does to a branch: LayerScale or gamma, then drop-path."""
    if getattr(block, f"gamma_{number}", None) is not None:
        branch = getattr(block, f"gamma_{number}") * branch
    branch = getattr(block, f"ls{number}", torch.nn.Identity())(branch)
    return getattr(block, f"drop_path{number}")(branch)


def plain_mlp(mlp, x):
    """timm's own forward, with what reaches the last linear layer changed on its way."""
    if not hasattr(mlp, "adapter_inner"):
        return mlp(x)
    hook = mlp.fc2.register_forward_pre_hook(lambda _, args: args[0] + plain_bottleneck(mlp.adapter_inner, args[0]))
    y = type(mlp).__bases__[-1].forward(mlp, x)
    hook.remove()
    return y


def plain_block(block, placement, x, **kwargs):
    """methods.md's table, word for word."""

    def a1(x):
        return plain_bottleneck(block.adapter_attn, x)

    def a2(x):
        return plain_bottleneck(block.adapter_mlp, x)

    attention = getattr(block, "_attn", block.attn)  # Swin's makes the windows
    a = plain_branch(block, 1, attention(block.norm1(x), **kwargs))
    h = x + a + a1(a) if placement in ("houlsby", "houlsby-inner") else x + a
    if placement == "pre":
        h = h + a1(h)
    m = plain_branch(block, 2, plain_mlp(block.mlp, block.norm2(h)))
    if placement in ("houlsby", "intermediate"):
        return h + m + a2(m)
    if placement == "parallel":
        return h + m + a2(h)
    out = h + m
    if placement == "pfeiffer":
        norm = block.adapter_mlp.norm
        return out + a2(F.layer_norm(out, norm.normalized_shape, norm.weight, norm.bias))
    return out + a2(out) if placement == "post" else out


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@every_architecture
def test_placement_is_its_formula(architecture, placement, training):
    model = attached(architecture, va.Adapter(rank=3, placement=placement), drop_path_rate=0.5).double().train(training)
    block = [module for module in model.modules() if type(module).__name__.endswith("Block")][1]
    calls = []  # with the arguments that timm passes to the attention: they must arrive there
    block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(images(model, 6))
    (x,), kwargs = calls[0]
    if architecture not in ("beit", "swin"):  # whose attention takes no mask from outside
        kwargs["attn_mask"] = torch.randn(6, 1, x.shape[1], x.shape[1], dtype=torch.float64)
    # The backbone's drop-path draws from the generator, and an adapter without dropout does not.
    torch.manual_seed(1)
    ours = block(x, **kwargs)
    torch.manual_seed(1)
    plain = plain_block(block, placement, x, **kwargs)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    with va.disabled(model):
        torch.manual_seed(1)
        assert not torch.allclose(ours, block(x, **kwargs), rtol=1e-3)


@pytest.mark.parametrize("placement", ["post", "houlsby-inner"])
@every_architecture
def test_the_adapters_drop_path_drops_whole_samples(architecture, placement):
    """A sample is an image, whatever the shape of the stream: where all its drops fall, the backbone alone answers."""
    model = attached(architecture, va.Adapter(rank=3, placement=placement, drop_path=0.7)).double()
    x = images(model, 8)
    with va.disabled(model):
        frozen = model(x)
    for module in model.modules():
        if isinstance(module, va.FusedAdapter):
            module.train()
    dropped = torch.stack([torch.isclose(model(x), frozen, rtol=1e-10).all(dim=1) for _ in range(12)])
    assert 0 < dropped.sum() < dropped.numel()


# What may happen to a model


@every_architecture
def test_a_copy_is_whole_and_its_own(architecture):
    model = attached(architecture, va.Adapter(rank=3, placement="houlsby-inner"))
    x = images(model)
    logits = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), logits)
        shape = structure(va.detach(twin))
        fresh = structure(make(architecture))
        assert (shape["classes"], shape["attributes"]) == (fresh["classes"], fresh["attributes"])
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby-inner"])
@every_architecture
def test_low_precision_before_and_after(architecture, placement, dtype):
    method = va.Adapter(rank=3, placement=placement)
    before = va.attach(make(architecture).to(dtype), method)  # the adapters are float32
    after = va.attach(make(architecture), method).to(dtype)
    for model in (before, after):
        logits = model(images(model))
        logits.float().square().mean().backward()
        assert logits.dtype == dtype
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby-inner"])
@every_architecture
def test_gradients_under_autocast_and_checkpointing(architecture, placement):
    method = va.Adapter(rank=3, placement=placement, dropout=0.5, drop_path=0.5)
    model = attached(architecture, method, drop_path_rate=0.1).train()
    x = images(model)
    gradients = []
    for use in (False, True):
        model.set_grad_checkpointing(use)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def resized(model, factor=2):
    model.set_input_size(tuple(int(factor * side) for side in model.patch_embed.img_size))
    return model


@pytest.mark.parametrize("method", ["houlsby-inner", "biases", "full"])
@every_architecture
def test_images_of_another_size(architecture, method, tmp_path):
    """Resized after attaching, after loading, before loading, and back again: position embeddings follow the images."""
    model = va.attach(make(architecture), METHODS[method])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    randomise_trained(model)
    va.save(model, tmp_path / "small")
    va.save(resized(model), tmp_path / "large")
    x = images(model)
    model(x).sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in model.named_parameters())
    with torch.no_grad():  # a relative position bias that asks for a gradient takes another path through attention
        logits = model(x)
        assert torch.equal(resized(va.load(make(architecture), tmp_path / "small"))(x), logits)
        assert torch.equal(va.load(resized(make(architecture)), tmp_path / "large")(x), logits)
        if method != "full":  # which has trained the position embedding at the small size
            assert torch.equal(va.load(resized(make(architecture)), tmp_path / "small")(x), logits)
            assert_same_state(va.detach(model), resized(make(architecture)).state_dict())


@every_architecture
def test_a_trained_position_embedding_that_was_resized_cannot_be_put_back(architecture):
    model = va.attach(make(architecture), va.FullFineTune())
    randomise_trained(model)
    state = copied_state(resized(model))
    positions = [name for name, p in make(architecture).named_parameters() if p.shape != state[name].shape]
    assert positions or architecture == "dinov3"  # whose positions are all rotary
    for undo in (va.detach, lambda m: va.disabled(m).__enter__()) if positions else ():
        with pytest.raises(ValueError, match=f"{positions[0]} was .* when the method was attached and is .* now: give"):
            undo(model)
    assert_same_state(model, state)
    assert_same_state(va.detach(resized(model, 0.5)), make(architecture).state_dict())


@pytest.mark.parametrize("architecture", ONE_OF_EACH_BLOCK)
def test_inductor_trains_it_in_one_graph(architecture):
    torch._dynamo.reset()
    model = attached(architecture, va.Adapter(rank=3, placement="houlsby-inner"))
    x = images(model)
    model(x).sum().backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).sum().backward()
    for name, gradient in eager.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ONE_OF_EACH_BLOCK)
@pytest.mark.parametrize("method", ["pfeiffer", "inner", "houlsby-inner", "arc", "arc-attn", "consolidator"])
def test_a_compiled_model_sees_attach_and_disabled(architecture, method):
    torch._dynamo.reset()
    model = make(architecture)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model)
    with torch.no_grad():
        compiled(x)
        va.attach(model, METHODS[method])
        randomise_trained(model)
        torch.testing.assert_close(compiled(x), model(x))
        with va.disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))


# What is refused


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("swinv2_tiny_window8_256", "timm.models.swin_transformer_v2.SwinTransformerV2Block"),
        ("eva02_enormous_patch14_clip_224", "timm.models.eva.EvaBlockPostNorm"),
        ("resnet18", "timm.models.resnet.BasicBlock"),
        ("vit_small_patch16_18x2_224", "timm.models.vision_transformer.ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "timm.models.vision_transformer.ParallelScalingBlock"),
        ("ResPostBlock", "timm.models.vision_transformer.ResPostBlock"),
        ("DiffParallelScalingBlock", "timm.models.vision_transformer.DiffParallelScalingBlock"),
        ("mixed", "timm.models.vision_transformer.Block, timm.models.vision_transformer.ParallelScalingBlock"),
        ("convmixer_768_32", "no blocks"),
    ],
)
@pytest.mark.parametrize("method", [va.Adapter(), va.Adapter(train_biases=True)], ids=["adapters", "biases"])
def test_unsupported_blocks_are_named_and_left_alone(name, has, method):
    with torch.device("meta"):
        if name == "mixed":
            model = make()
            model.blocks[1] = timm.models.vision_transformer.ParallelScalingBlock(48, 2)
        elif timm.is_model(name):
            model = timm.create_model(name, num_classes=10)
        elif hasattr(timm.models.vision_transformer, name):
            model = make(block_fn=getattr(timm.models.vision_transformer, name))
        else:
            pytest.skip(f"timm {timm.__version__} has no {name}")
    shape = structure(model)
    with pytest.raises(ValueError) as error:
        va.attach(model, method)
    supported = (
        "timm.models.beit.Block, timm.models.eva.EvaBlock, timm.models.swin_transformer.SwinTransformerBlock, "
        "timm.models.vision_transformer.Block"
    )
    assert f"blocks of class {supported}, but" in str(error.value)
    assert str(error.value).endswith(f"this {type(model).__name__} has {has}")
    assert structure(model) == shape


def test_unsupported_mlps_are_named_and_left_alone():
    model = make(mlp_layer=GatedMlp)
    state, shape = copied_state(model), structure(model)
    with pytest.raises(ValueError) as error:
        va.attach(model, va.Adapter(placement="inner"))
    supported = "timm.layers.mlp.GluMlp, timm.layers.mlp.Mlp, timm.layers.mlp.SwiGLU"
    assert f"MLPs of class {supported}, but" in str(error.value)
    assert str(error.value).endswith("this VisionTransformer has timm.layers.mlp.GatedMlp")
    assert structure(model) == shape and list(model.state_dict()) == list(state)
    va.attach(model, va.Adapter(placement="post"))
