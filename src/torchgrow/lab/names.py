"""What can be chosen by name, where the command line finds it without importing PyTorch."""

DATASETS = ("digits", "cifar10", "imagefolder", "text")
DEVICES = ("auto", "cpu", "cuda", "mps")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")
SCALES = ("small", "full")
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
    "plain4net-imagenet",
    "resnet18-imagenette",
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
}
"""Methods whose structure does not change while they train."""

LIBRARIES = ("torchvision", "timm", "hf")
"""What may stand before the colon of a model's name; `torchgrow.lab.frames` builds them."""

SHRINKABLE = "torchvision:NAME, timm:NAME, hf:FOLDER, path/to/file.py:factory, or a recipe that `torchgrow list` shows"
"""How a network is named for ``torchgrow shrink``."""

MODELS = "torchvision:NAME, timm:NAME, hf:TYPE, path/to/file.py:factory, or a recipe that `torchgrow list` shows"
"""How a model is named for ``torchgrow inspect``."""
