"""Does the picture show what is there? Its parts on every architecture, and that no text is cut off or covered."""

import io
from collections import Counter
from itertools import combinations

import pytest
import timm
import torch
from PIL import Image

import vitadapter_ext as va
from tests.vits import ARCHITECTURES, METHODS, make
from vitadapter_ext.canvas import Canvas, text
from vitadapter_ext.parameters import outermost_blocks
from vitadapter_ext.picture import block_parts, draw, model_parts, tensor_roles

BOTH = pytest.mark.parametrize(
    ("architecture", "method"),
    [pytest.param(a, METHODS[m], id=f"{a}-{m}") for a in ARCHITECTURES for m in METHODS],
)


def parts_of_blocks(model) -> dict:
    roles = tensor_roles(model)
    return {name: block_parts(block, roles) for name, block in outermost_blocks(model).items()}


def trained(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@BOTH
def test_every_trained_parameter_is_in_one_part(architecture, method):
    model = va.attach(make(architecture), method)
    assert sum(part.parameters for part in model_parts(model, tensor_roles(model))) == trained(model)
    for name, parts in parts_of_blocks(model).items():
        assert sum(part.parameters for part in parts) == trained(model.get_submodule(name))
        assert len({part.name for part in parts}) == len(parts)


@BOTH
def test_roles(architecture, method):
    model = va.attach(make(architecture), method)
    for name, parts in parts_of_blocks(model).items():
        trains = {key for key, p in model.get_submodule(name).named_parameters() if p.requires_grad}
        for part in parts:
            names = {key for key in trains if key == part.name or key.startswith(f"{part.name}.")}
            if part.name == "attn":  # its children are parts of their own
                names = {key for key in names if key.count(".") == 1}
            if not part.name.endswith(".consolidator"):  # a part of its own too
                names = {key for key in names if ".consolidator." not in key}
            added = "adapter_" in part.name or part.name.endswith((".arc", ".consolidator"))
            wanted = ("added" if added else "trained") if names else "frozen"
            assert part.role == wanted, part


# Where the adapters of each placement stand: half, name, place.
PLACES = {
    "post": [("mlp", "adapter_mlp", "after the sum")],
    "houlsby": [("attn", "adapter_attn", "on the branch"), ("mlp", "adapter_mlp", "on the branch")],
    "intermediate": [("mlp", "adapter_mlp", "on the branch")],
    "pfeiffer": [("mlp", "adapter_mlp.norm", "after the sum"), ("mlp", "adapter_mlp", "after the sum")],
    "parallel": [("mlp", "adapter_mlp", "around the branch")],
    "pre": [("attn", "adapter_attn", "after the sum")],
    "inner": [("mlp", "mlp.adapter_inner", "on the branch")],
    "houlsby-inner": [("attn", "adapter_attn", "on the branch"), ("mlp", "mlp.adapter_inner", "on the branch")],
    "arc": [("attn", "attn.arc", "on the branch"), ("mlp", "mlp.arc", "on the branch")],
    "arc-attn": [("attn", "attn.arc", "on the branch")],
}


@pytest.mark.parametrize("method", PLACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_a_method_stands(architecture, method):
    model = va.attach(make(architecture), METHODS[method])
    for parts in parts_of_blocks(model).values():
        assert [(p.half, p.name, p.place) for p in parts if p.role == "added"] == PLACES[method]
        for half in ("attn", "mlp"):
            names = [part.name for part in parts if part.half == half]
            columns = [part.column for part in parts if part.half == half]
            assert columns == sorted(columns)
            # After all that the backbone does to the branch, or inside the MLP right before its last layer.
            outer = [name for name in names if name.startswith("adapter_")]
            assert names[len(names) - len(outer) :] == outer
            if f"{half}.arc" in names:  # on what the norm gives
                assert names[1] == f"{half}.arc" and names[0].startswith("norm")
            if "mlp.adapter_inner" in names:
                assert names.index("mlp.adapter_inner") == names.index("mlp.fc2") - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_consolidator_stands_beside_its_layer(architecture):
    model = va.attach(make(architecture), METHODS["consolidator"])
    for parts in parts_of_blocks(model).values():
        names = [part.name for part in parts]
        layers = [name for name in names if name.split(".")[-1] in ("qkv", "proj", "q_proj", "k_proj", "v_proj", "fc2")]
        layers += [name for name in names if name.startswith("mlp.fc1") and not name.endswith(".consolidator")]
        added = {part.name: part for part in parts if part.role == "added"}
        assert added.keys() == {f"{layer}.consolidator" for layer in layers}
        for layer in layers:
            own, beside = parts[names.index(layer)], added[f"{layer}.consolidator"]
            assert names.index(beside.name) == names.index(layer) + 1
            assert (own.half, own.place, own.column) == (beside.half, beside.place, beside.column)
            assert own.sizes == beside.sizes and beside.words == "8 groups"


def names(architecture: str, half: str) -> list[str]:
    model = va.attach(make(architecture), va.LinearProbe())
    return [part.name for part in next(iter(parts_of_blocks(model).values())) if part.half == half]


def test_a_block_has_the_names_of_the_model():
    assert names("vit", "attn") == ["norm1", "attn.qkv", "attn", "attn.proj"]
    assert names("vit", "mlp") == ["norm2", "mlp.fc1", "mlp.act", "mlp.fc2"]
    assert names("dinov2", "attn") == ["norm1", "attn.qkv", "attn", "attn.proj", "ls1"]
    assert names("beit", "mlp") == ["norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "gamma_2"]
    assert names("eva02_large", "attn") == ["norm1", *(f"attn.{x}_proj" for x in "qkv"), "attn", "attn.proj"]
    assert names("eva02_large", "mlp") == ["norm2", "mlp.fc1_g", "mlp.fc1_x", "mlp.act", "mlp.norm", "mlp.fc2"]


def test_layers_side_by_side_share_a_column():
    (parts, *_) = parts_of_blocks(va.attach(make("eva02_large"), va.BitFit())).values()
    shared = Counter((part.half, part.column) for part in parts)
    assert [part.name for part in parts if shared[part.half, part.column] > 1] == [
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x",
    ]  # fmt: skip


def test_q_and_k_norms_stand_before_the_attention():
    (parts, *_) = parts_of_blocks(va.attach(make(qk_norm=True), va.BitFit())).values()
    in_attention = [part.name for part in parts if part.name.startswith("attn")]
    assert in_attention == ["attn.qkv", "attn.q_norm", "attn.k_norm", "attn", "attn.proj"]


def test_what_a_box_says():
    model = va.attach(make("swin"), va.Adapter(rank=3, activation="relu", train_biases=True))
    same = {parts[0].name: text(parts) for parts in zip(*parts_of_blocks(model).values(), strict=True)}
    adapters = [sum(p.numel() for p in va.FusedAdapter(dim, 3, scale="channel").parameters()) for dim in (24, 48)]
    assert same["adapter_mlp"] == [
        "adapter_mlp",
        "24 … 48 → 3 → 24 … 48",
        "relu",
        f"{adapters[0]} … {adapters[1]} parameters",
    ]
    assert same["mlp.fc1"] == ["mlp.fc1", "24 … 48 → 96 … 192", "bias: 96 … 192"]
    assert same["mlp.act"] == ["mlp.act", "GELU"]
    assert same["attn"] == ["attn", "WindowAttention"]


def test_gated_activations_are_called_so():
    words = {}
    for architecture in ("vit", "dinov2_giant", "eva02", "eva02_large"):
        (parts, *_) = parts_of_blocks(va.attach(make(architecture), va.BitFit())).values()
        words[architecture] = next(part.words for part in parts if part.name == "mlp.act")
    assert words == {"vit": "GELU", **dict.fromkeys(("dinov2_giant", "eva02", "eva02_large"), "SiLU, gated")}


def chain(model) -> list[tuple[str, str]]:
    return [(part.name, part.role) for part in model_parts(model, tensor_roles(model))]


def test_the_chain():
    assert chain(va.attach(make("siglip"), METHODS["norms"])) == [
        ("patch_embed", "frozen"),
        ("pos_embed", "frozen"),
        ("blocks", "added"),
        ("norm", "trained"),
        ("attn_pool", "trained"),
        ("head", "trained"),
    ]
    assert chain(va.attach(make("deit_distilled"), va.LinearProbe())) == [
        ("patch_embed", "frozen"),
        ("cls_token\npos_embed\ndist_token", "frozen"),
        ("blocks", "frozen"),
        ("norm", "frozen"),
        ("head", "trained"),
        ("head_dist", "trained"),
    ]
    swin = va.attach(make("swin"), va.Adapter())
    assert [name for name, _ in chain(swin)] == [
        "patch_embed", "layers.0.blocks", "layers.1.downsample", "layers.1.blocks", "norm", "head",
    ]  # fmt: skip
    assert [part.words for part in model_parts(swin, tensor_roles(swin))][1:4:2] == ["× 2", "× 1"]


def test_what_is_added_to_the_model_itself_stands_beside_the_chain():
    model = va.attach(make("swin"), METHODS["arc"])
    *before, basis = model_parts(model, tensor_roles(model))
    assert (basis.name, basis.role, basis.place) == ("arc_basis", "added", "beside")
    assert basis.parameters == 2 * 3 * (24 + 48)
    assert {part.place for part in before} == {"chain"}


@pytest.fixture
def canvases(monkeypatch):
    """The canvases that `draw` makes, with their headings."""
    made = []
    heading = Canvas.heading

    def start(self, start=Canvas.__init__):
        start(self)
        self.headings = []
        made.append(self)

    monkeypatch.setattr(Canvas, "__init__", start)
    monkeypatch.setattr(Canvas, "heading", lambda self, words: (self.headings.append(words), heading(self, words)))
    return made


def check_picture(png: bytes, canvas: Canvas) -> None:
    """A PNG of the figure's size, in which no text leaves the figure or touches another."""
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG" and image.size[0] > 600 and image.size[1] > 300
    boxes = [artist.get_window_extent() for artist in canvas.axes.texts if artist.get_text()]
    figure = canvas.figure.bbox
    assert len(boxes) > 20
    for box in boxes:
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < figure.x1 and box.y1 < figure.y1
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


DRAWN = [("vit", name) for name in METHODS] + [(name, "norms") for name in ARCHITECTURES] + [("eva02_large", "inner")]


@pytest.mark.parametrize(("architecture", "method"), DRAWN)
def test_every_picture_is_a_png(architecture, method, canvases):
    png = draw(va.attach(make(architecture), METHODS[method]))
    check_picture(png, *canvases)
    assert len(canvases[0].headings) == 1


def test_meta_tensors_and_other_formats(canvases):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    va.attach(model, va.Adapter(rank=256, placement="houlsby-inner", train_norms=True))
    check_picture(draw(model), *canvases)
    assert canvases[0].headings == ["12 blocks: blocks.0 … blocks.11"]
    assert draw(model, "svg").startswith(b"<?xml") and draw(model, "pdf").startswith(b"%PDF")


def test_blocks_alike_are_drawn_once(canvases):
    model = va.attach(make(depth=4), va.Adapter())
    model.blocks[1].adapter_mlp = va.FusedAdapter(48, 2)  # another rank is another number, not another structure
    draw(model)
    model.blocks[1].adapter_mlp.activation = "relu"
    draw(model)
    assert [canvas.headings for canvas in canvases] == [
        ["4 blocks: blocks.0 … blocks.3"],
        ["3 blocks: blocks.0, blocks.2 … blocks.3", "1 block: blocks.1"],
    ]


def test_blocks_of_an_unknown_class_are_a_box_in_the_chain(canvases):
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256", num_classes=3)
    png = draw(va.attach(model, va.LinearProbe()))
    check_picture(png, *canvases)
    (heading,) = canvases[0].headings
    assert heading.startswith("12 blocks: ") and "SwinTransformerV2Block, whose inside is not drawn" in heading
    assert chain(model)[-1] == ("head", "trained")


def test_a_bare_model_has_no_picture():
    with pytest.raises(ValueError, match="no method is attached to this VisionTransformer"):
        draw(make())
