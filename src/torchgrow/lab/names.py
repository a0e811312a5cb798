"""What can be chosen by name, where the command line finds it without importing PyTorch."""

DATASETS = ("digits", "cifar10", "imagefolder", "voc", "text", "shapes", "shape-masks")
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")
SCALES = ("small", "full")
SMOKE = "smoke"
"""The scale that every recipe of the lab has, without data."""
SCHEDULES = ("milestones", "cosine", "linear", "wsd")
SIZES = ("small", "medium", "large")

RECIPES = (
    "digits",
    "resnet20-cifar10",
    "vgg16-cifar10",
    "wrn28-10-cifar10",
    "basic3resnet-cifar10",
    "plain3net-cifar10",
    "bottleneck4resnet-imagenet",
    "nas-imagenet",
    "plain4net-imagenet",
    "resnet18-imagenette",
    "resnet50-imagenet",
    "mobilenetv1-imagenet",
    "mobilenetv1-half-imagenet",
    "deeplabv3-voc",
    "vit-cifar10",
    "lstm-ptb",
    "gpt-ptb",
)
"""Recipes; `torchgrow.lab.recipes` makes them by these names."""

FIXED = {
    "dense": "the whole frame",
    "uniform": "every width thinned alike, to the parameters of the budget, from scratch",
    "uniform-flops": "every width thinned alike, to the FLOPs of the network that `default` found, from scratch",
    "direct": "the network that `default` found, initialised anew, from scratch",
    "l1": "the dense one, pruned by Torch-Pruning (L1 norm), then fine-tuned for half as many epochs (at least 2)",
    "efficientnet-b0": "torchvision's EfficientNet-B0 as it is, whatever the budget, from scratch (Tan 2019)",
    "mnasnet": "torchvision's MnasNet (B1, width 1) as it is, whatever the budget, from scratch (Tan 2019)",
}
"""Methods whose structure does not change while they train."""

PUBLISHED = {"efficientnet-b0": "torchvision:efficientnet_b0", "mnasnet": "torchvision:mnasnet1_0"}
"""Those of them that are networks which others have searched for; `torchgrow.lab.frames` builds them."""

UNBUDGETED = ("dense", *PUBLISHED)
"""Those of them that no budget changes, so that one row serves them all."""

SYSTEMS = {
    "l1-norm": "the dense one, its filters of least L1 norm cut, then fine-tuned (Li 2017)",
    "sfp": "filters of least norm set to zero after every epoch, cut in the end (SoftNet: He 2018)",
    "thinet": "channels by how little the next layer's input changes without them (Luo 2017)",
    "pfp": "channels sampled by their sensitivity, in rounds with retraining (Provable: Liebenwein 2020)",
    "bar": "gates under a barrier that falls to the budget, with a teacher (Lemaire 2019)",
    "morphnet": "a penalty on batch norms' scales shapes it, then widened to the budget, from scratch (Gordon 2018)",
    "netadapt": "layer by layer, the cut with the best accuracy after short training (Yang 2018)",
    "autogrow": "blocks added while accuracy rises (Wen 2020)",
    "darts": "widths and blocks by a softmax over all of them, first order, then from scratch (Liu 2019)",
    "proxyless": "widths and blocks by sampled paths under the budgeted cost, then from scratch (Cai 2019)",
    "iss": "hidden units of LSTMs under a group penalty (Wen 2018)",
    "shrink": "the dense one, shrunk while it is fine-tuned for half as many epochs (at least 2)",
}
"""Systems of other papers, and `shrink` (also with settings, as in ``shrink:until=0.3``); `torchgrow.lab.systems` has a
file for each. Their structure changes while they train."""


def is_system(method: str) -> bool:
    """Whether a method of a comparison is one of `SYSTEMS`, with settings or without."""
    return method in SYSTEMS or method.startswith("shrink:")


LIBRARIES = ("torchvision", "timm", "hf")
"""What may stand before the colon of a model's name; `torchgrow.lab.frames` builds them."""

SHRINKABLE = "torchvision:NAME, timm:NAME, hf:FOLDER, path/to/file.py:factory, or a recipe that `torchgrow list` shows"
"""How a network is named for ``torchgrow shrink``."""

MODELS = "torchvision:NAME, timm:NAME, hf:TYPE, path/to/file.py:factory, or a recipe that `torchgrow list` shows"
"""How a model is named for ``torchgrow inspect``."""
