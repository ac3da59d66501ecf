"""Which settings go together? One table of presets; whatever is given on the command line wins over them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A method with its options, and settings of `Config`.

    `by_method` holds what changes when another method is chosen, options of that method included. `source` says where
    the numbers come from, and `checkpoint` is the timm name of the backbone that they belong to ("" for none, or the
    embedded one).
    """

    description: str
    source: str
    checkpoint: str = ""
    method: str = "adapter"
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    by_method: dict[str, dict[str, Any]] = field(default_factory=dict)


RECIPES = {
    "embedded": Recipe(
        description="the default where no --model is given: the embedded small ViT",
        source="tuned on the validation images of scikit-learn's digits",
        options={"rank": 8},
        settings={
            "epochs": 30,
            "warmup_epochs": 3,
            "batch_size": 64,
            "lr": 5e-3,
            "weight_decay": 1e-4,
            "augmentation": "affine",
            "baselines": True,
        },
        by_method={
            "arc": {"lr": 2e-2, "rank": 16},
            "mimi": {"sigma": 4},
            # Half the width of 128, as the paper's 384 of 768: blocks of 6x2, 2x2, 8x2 and 2x8. Drop-path only slowed
            # the few epochs down.
            "consolidator": {"groups": (64,), "drop_path": 0.0},
            "full": {"lr": 5e-4},
        },
    ),
    "minitab": Recipe(
        description="the default for vtab1k and minitab where no --model is given: the embedded small ViT; nothing is "
        "augmented, since some tasks ask where a sign is and how it is turned",
        source="tuned on the validation images of minitab",
        options={"rank": 8},
        # Eight epochs, so that the whole suite stays below four minutes on two cores.
        settings={"epochs": 8, "warmup_epochs": 2, "batch_size": 32, "lr": 5e-3, "weight_decay": 1e-4},
        by_method={
            "arc": {"lr": 2e-2, "rank": 16},
            "mimi": {"sigma": 4},
            "consolidator": {"groups": (64,), "drop_path": 0.0},
            "full": {"lr": 5e-4},
        },
    ),
    "general": Recipe(
        description="the default with --model",
        source="the defaults above; full fine-tuning at a tenth of their learning rate",
        by_method={"full": {"lr": 1e-4}},
    ),
    "adapter-plus": Recipe(
        description="Adapter+, as on VTAB-1k",
        source="Steitz and Roth, Adapters Strike Back, CVPR 2024, and its published code",
        checkpoint="vit_base_patch16_224.orig_in21k",
        options={"rank": 8, "placement": "post", "scale": "channel", "init": "houlsby", "drop_path": 0.1},
        settings={
            "epochs": 100,
            "warmup_epochs": 10,
            "batch_size": 64,
            "lr": 1e-3,
            "weight_decay": 1e-4,
            "backbone_drop_path": 0.1,
            "augmentation": "none",
            "amp": "bf16",
        },
    ),
    "arc-vtab": Recipe(
        description="ARC, as on VTAB-1k",
        source="Dong et al., Adapter Re-Composing, NeurIPS 2023, and its published code",
        checkpoint="vit_base_patch16_224.orig_in21k",
        method="arc",
        options={"rank": 50, "positions": ("attn", "mlp"), "dropout": 0.1, "rescale_init": "paper"},
        settings={
            "epochs": 100,
            "warmup_epochs": 10,
            "batch_size": 32,
            "lr": 1e-2,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
            "head_init": "zero",
            "augmentation": "none",
            "squash": True,
        },
    ),
    "arc-fgvc": Recipe(
        description="ARC, as on the fine-grained data sets",
        source="Dong et al., Adapter Re-Composing, NeurIPS 2023, and its published code",
        checkpoint="vit_base_patch16_224.orig_in21k",
        method="arc",
        options={"rank": 50, "positions": ("attn", "mlp"), "dropout": 0.1, "rescale_init": "paper"},
        settings={
            "epochs": 100,
            "warmup_epochs": 10,
            "batch_size": 32,
            "lr": 5e-3,
            "weight_decay": 1e-2,
            "clip_grad": 1.0,
            "head_init": "zero",
            "augmentation": "random-crop",
        },
    ),
    "consolidator-vtab": Recipe(
        description="Consolidator, as on VTAB-1k; learning rate, weight decay and drop-path are in the middle of what "
        "each task chooses from (5e-4 to 1e-2, 0 to 0.1, 0 to 0.8)",
        source="Hao et al., Consolidator, ICLR 2023, and its published code, which never shuffles",
        checkpoint="vit_base_patch16_224.orig_in21k",
        method="consolidator",
        options={"groups": (384,), "shuffle": False, "drop_path": 0.5},
        settings={
            "epochs": 100,
            "warmup_epochs": 10,
            "batch_size": 64,
            "lr": 2e-3,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "weight_decay": 1e-2,
            "backbone_drop_path": 0.1,
            "augmentation": "none",
            "squash": True,
        },
    ),
    "mimi": Recipe(
        description="MiMi, as on DomainNet and VTAB-1k: 4 phases of 80 epochs, each with half of the neurons before it",
        source="Marouf et al., Mini but Mighty, WACV 2024, and its published code",
        checkpoint="swin_tiny_patch4_window7_224.ms_in1k",
        method="mimi",
        options={"sigma": 8, "prune": 0.5, "phases": 4, "score": "paper", "init": "trunc_normal"},
        settings={
            "epochs": 320,
            "warmup_epochs": 20,
            "batch_size": 128,
            "lr": 5e-4,
            "lr_base_size": 512,
            "warmup_lr": 5e-7,
            "min_lr": 5e-6,
            "weight_decay": 0.05,
            "clip_grad": 5.0,
            "label_smoothing": 0.1,
            "backbone_drop_path": 0.1,
            "augmentation": "random-resized-crop",
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
    ),
    "seed-project": Recipe(
        description="wide adapters after the attention and inside the MLP, with the norms trained",
        source="a student project's ViT-B/16 on Pets, CIFAR-100 and PCAM, with the settings that cured its overfitting",
        checkpoint="vit_base_patch16_224.orig_in21k",
        options={
            "rank": 256,
            "placement": "houlsby-inner",
            "activation": "leaky_relu",
            "scale": 1.0,
            "dropout": 0.2,
            "dropout_out": 0.2,
            "init": "houlsby",
            "train_norms": True,
        },
        settings={
            "epochs": 30,
            "warmup_epochs": 1,
            "batch_size": 64,
            "optimizer": "adam",
            "lr": 1e-4,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
            "patience": 10,
        },
    ),
}
